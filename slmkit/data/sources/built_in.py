"""The built-in sources: endless, seeded streams of texts, conversations, and questions with answers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from slmkit.data import stories
from slmkit.data.sources.documents import Document, Judged, Message, Pair, Position
from slmkit.data.stories.story import primer_text
from slmkit.data.stories.talk import sum_pair
from slmkit.data.stories.words import MEDIUM, SMALL, WHOLE

STORIES, SUMS = "stories", "sums"
# Source → size of its world. The smaller ones are for models that are trained for minutes on a slow machine.
STORY_WORLDS = {STORIES: WHOLE, "medium-stories": MEDIUM, "small-stories": SMALL}
WORLDS = STORY_WORLDS | {"primer": WHOLE, "medium-primer": MEDIUM, "small-primer": SMALL}


@dataclass(frozen=True)
class BuiltIn:
    """Functions from a seed, an index, and whether the item is held out, to an item.

    There are so many stories that held-out ones only need another seed.
    """

    text: Callable[[int, int, bool], str]
    conversation: Callable[[int, int, bool], list[Message]]
    pair: Callable[[int, int, bool], Pair]

    def item(self, kind: str, *which: Any) -> Any:
        """The item of a kind, such as `pairs`, of a seed, an index, and whether it is held out."""
        if kind == "text":
            return Document(self.text(*which))
        if kind == "conversations":
            return self.conversation(*which)
        pair = self.pair(*which)
        if kind == "judgements":  # right and wrong answers alternately, each to its own question
            return Judged(pair.sides[which[1] % 2], label=which[1] % 2 == 0)
        return pair.chosen if kind == "questions" else pair


@dataclass(frozen=True)
class BuiltInPart:
    """The part of a source that is an endless stream; the position is a `row`."""

    name: str
    seed: int
    held_out: bool = False

    def items(self, kind: str, start: Position, unused: Counter[str]) -> Iterator[tuple[Any, Position]]:
        for row in itertools.count(start.get("row", 0)):
            yield BUILT_IN[self.name].item(kind, self.seed, row, self.held_out), {"row": row + 1}

    def describe(self) -> dict[str, Any]:
        return {"path": self.name, "seed": self.seed}

    def stat(self) -> tuple[str, int | None, int | None]:
        return f"{self.name} {self.seed}", None, None


def _pair(messages: list[Message], right: str, wrong: str) -> Pair:
    chosen, rejected = ([*messages, {"role": "assistant", "content": answer}] for answer in (right, wrong))
    return Pair(chosen, rejected, shared=len(messages))


def _of_world(source: str, world: float) -> BuiltIn:
    def text(seed: int, index: int, held_out: bool) -> str:
        if source in STORY_WORLDS:
            return stories.tell(seed, index, world=world).text
        return primer_text(seed, index, world)

    def pair(seed: int, index: int, held_out: bool) -> Pair:
        asked = stories.question_pair(seed, index, world=world)
        return _pair(asked.messages, asked.right, asked.wrong)

    return BuiltIn(text, lambda seed, index, held_out: stories.conversation(seed, index, world=world), pair)


def _sum_pair(seed: int, index: int, held_out: bool) -> Pair:
    asked, right, wrong = sum_pair(seed, index, held_out)
    return _pair([{"role": "user", "content": asked}], right, wrong)


BUILT_IN = {
    **{source: _of_world(source, world) for source, world in WORLDS.items()},
    SUMS: BuiltIn(
        lambda seed, index, held_out: " ".join(sum_pair(seed, index, held_out)[:2]),
        lambda seed, index, held_out: _sum_pair(seed, index, held_out).chosen,
        _sum_pair,
    ),
}
