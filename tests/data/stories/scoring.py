"""The exact probability of any text under the story generator, found by parsing it.

The generator is replayed against the text. At each choice only the options that match the text are kept; if several
match, each is replayed in turn. A story has one parse, so its probability is also known from generation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import Library, Teller

REACH = 32  # characters within which a chosen word follows, after a preposition, an article, a look


class DeadEndError(Exception):
    """The choices so far cannot lead to the text."""


class Follower(Teller):
    """Replays the choices of a prefix, then follows the text; other matching choices are collected in `branches`."""

    def __init__(self, library: Library, split: str, text: str, prefix: list[int]):
        super().__init__(library, split, random.random)
        self.target = f" {text}"
        self.place = 0
        self.prefix = prefix
        self.taken: list[int] = []
        self.branches: list[list[int]] = []

    def choose(self, options: Sequence[object]) -> int:
        """Take the first option that matches the text."""
        self.log_probability -= math.log(len(options))
        if len(self.taken) < len(self.prefix):
            return self._take([self.prefix[len(self.taken)]])
        return self._take([i for i, one in enumerate(options) if self.target.startswith(head(one), self.place)])

    def pick(self, words: tuple[str, ...]) -> str:
        """Take the first word that occurs in the next `REACH` characters."""
        if len(self.taken) < len(self.prefix):
            index = self._take([self.prefix[len(self.taken)]])
        else:
            ahead = self.target[self.place : self.place + REACH].lower()
            index = self._take([i for i, word in enumerate(words) if word.lower() in ahead])
        weights = self.book.weights_of(words) or [1] * len(words)
        self.log_probability += math.log(weights[index] / sum(weights))
        return words[index]

    def _take(self, candidates: list[int]) -> int:
        if not candidates:
            raise DeadEndError
        self.branches += [[*self.taken, other] for other in candidates[1:]]
        self.taken.append(candidates[0])
        return candidates[0]

    def write(self, text: str) -> None:
        """Advance in the target, which must have the same text. Raises `DeadEndError` if it has not."""
        if not self.target.startswith(text, self.place):
            raise DeadEndError
        self.place += len(text)


def head(option: object) -> str:
    """The fixed text that a template begins with; nothing for a plot."""
    return option[0] if isinstance(option, tuple) and option and isinstance(option[0], str) else ""


def parses(text: str, split: str = "train") -> list[float]:
    """The log-probability of every sequence of choices that gives exactly this text."""
    library = load_library()
    found = []
    open_prefixes: list[list[int]] = [[]]
    while open_prefixes:
        follower = Follower(library, split, text, open_prefixes.pop())
        try:
            follower.tell()
        except DeadEndError:
            pass
        else:
            if follower.place == len(follower.target):
                found.append(follower.log_probability)
        open_prefixes += follower.branches
    return found


def count_parses(text: str, split: str = "train") -> int:
    """How many sequences of choices give this text: 1 for a story, 0 for anything else."""
    return len(parses(text, split))


def log_probability(text: str, split: str = "train") -> float:
    """Log-probability in nats that the generator gives exactly this story; -inf if it cannot."""
    found = parses(text, split)
    if not found:
        return -math.inf
    most = max(found)
    return most + math.log(sum(math.exp(one - most) for one in found))
