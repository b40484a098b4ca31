"""The built-in sources: endless, seeded streams of texts, conversations, and questions with answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slmkit.data import stories
from slmkit.data.sources.documents import Message
from slmkit.data.sources.pair_formats import Pair
from slmkit.data.stories.primer import primer_text
from slmkit.data.stories.sums import sum_pair

STORIES, PRIMER, SUMS = "stories", "primer", "sums"  # names of the sources


@dataclass(frozen=True)
class BuiltIn:
    """Functions from a seed, an index, and whether the item is held out, to an item.

    There are so many stories that held-out ones only need another seed.
    """

    text: Callable[[int, int, bool], str]
    conversation: Callable[[int, int, bool], list[Message]]
    pair: Callable[[int, int, bool], Pair]

    def question(self, seed: int, index: int, held_out: bool) -> list[Message]:
        """A conversation that ends with the answer to a question."""
        return self.pair(seed, index, held_out).chosen


def _answered(messages: list[Message], answer: str) -> list[Message]:
    return [*messages, {"role": "assistant", "content": answer}]


def _pair(messages: list[Message], right: str, wrong: str) -> Pair:
    return Pair(_answered(messages, right), _answered(messages, wrong), shared=len(messages))


def _story_pair(seed: int, index: int, held_out: bool) -> Pair:
    asked = stories.question_pair(seed, index)
    return _pair(asked.messages, asked.right, asked.wrong)


def _story_talk(seed: int, index: int, held_out: bool) -> list[Message]:
    return stories.conversation(seed, index)


def _sum_pair(seed: int, index: int, held_out: bool) -> Pair:
    asked, right, wrong = sum_pair(seed, index, held_out)
    return _pair([{"role": "user", "content": asked}], right, wrong)


BUILT_IN = {
    STORIES: BuiltIn(lambda seed, index, held_out: stories.tell(seed, index).text, _story_talk, _story_pair),
    PRIMER: BuiltIn(lambda seed, index, held_out: primer_text(seed, index), _story_talk, _story_pair),
    SUMS: BuiltIn(
        lambda seed, index, held_out: " ".join(sum_pair(seed, index, held_out)[:2]),
        lambda seed, index, held_out: _sum_pair(seed, index, held_out).chosen,
        _sum_pair,
    ),
}
