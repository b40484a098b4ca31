"""Stories by number: story `index` of stream `seed`, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from slmkit.data.stories.cast import Character, Thing
from slmkit.data.stories.questions import Question, questions_about
from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import Teller, random_stream
from slmkit.data.stories.words import SPLITS


@dataclass(frozen=True)
class Story:
    """A story, its log-probability in nats, its plot, hero and thing."""

    text: str
    log_probability: float
    plot: str
    hero: str
    hero_kind: str
    thing: str
    teller: Teller = field(repr=False, compare=False)  # with the state of the world at the story's end

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """The questions that the text answers, made on first use."""
        return questions_about(self.teller)


def tell(seed: int, index: int, split: str = "train") -> Story:
    """Story `index` of the stream `seed`. Raises `UserError` for an unknown split."""
    if split not in SPLITS:
        from slmkit.config import UserError  # not at the top: its import takes longer than this whole package's

        raise UserError(f"split {split!r} of the story corpus: expected one of {', '.join(SPLITS)}")
    teller = Teller(load_library(), split, random_stream("story", seed, split, index).random)
    teller.tell()
    hero, thing = teller.bound["hero"], teller.bound["thing"]
    assert isinstance(hero, Character)
    assert isinstance(thing, Thing)
    return Story(teller.text, teller.log_probability, teller.plot.name, hero.name, hero.kind, thing.noun, teller)


def tell_many(seed: int, count: int, split: str = "train", start: int = 0) -> Iterator[Story]:
    """Stories `start` to `start + count` of the stream `seed`."""
    return (tell(seed, index, split) for index in range(start, start + count))
