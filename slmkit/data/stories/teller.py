"""The teller: walks through a plot, makes every choice, writes the text, and tracks its probability."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from slmkit.data.stories.cast import Entity
from slmkit.data.stories.script import Library, Plot
from slmkit.data.stories.template import Note, Sequence
from slmkit.data.stories.words import ScriptError, WordBook

LOG = [0.0, *(math.log(n) for n in range(1, 2000))]


def random_stream(*key: object) -> random.Random:
    """A random generator seeded by the key alone, the same in every process and on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Fact:
    """A fact of a story, such as `hero gave thing to friend`, with the entities."""

    relation: str
    subject: Entity
    object: Entity | Sequence | None
    recipient: Entity | None


class Teller:
    """Tells one story. Subclasses override the choices, from which all else follows."""

    def __init__(self, library: Library, split: str, chance: Callable[[], float]):
        self.book: WordBook = library.book
        self.library = library
        self.split = split
        self.chance = chance
        self.plot: Plot
        self.log_probability = 0.0
        self.used: set[str] = set()
        self.bound: dict[str, Entity] = {}
        self.parts: list[str] = []
        self.facts: list[Fact] = []

    def tell(self) -> None:
        """Choose a plot and tell it from the first beat to the last."""
        plots = self.library.plots
        self.plot = plots[self.choose(("",) * len(plots))]
        self.bound = {name: role.new() for name, role in self.plot.roles.items()}
        for node in self.plot.nodes:
            node.tell(self)

    @property
    def text(self) -> str:
        """The text so far, without the space that the first beat begins with."""
        return "".join(self.parts)[1:]

    def choose(self, options: tuple[str, ...]) -> int:
        """The index of a uniformly chosen option; each option is given by its first text."""
        self.log_probability -= LOG[len(options)]
        return int(self.chance() * len(options))

    def pick(self, words: tuple[str, ...]) -> str:
        """A chosen word, weighted if the list has weights; it is written next, perhaps after an article."""
        weights = self.book.weights_of(words)
        if weights is None:
            self.log_probability -= LOG[len(words)]
            return words[int(self.chance() * len(words))]
        total = sum(weights)
        index = bisect.bisect(list(itertools.accumulate(weights)), self.chance() * total)
        self.log_probability += math.log(weights[index] / total)
        return words[index]

    def write(self, text: str) -> None:
        """Append to the story."""
        self.parts.append(text)

    def note(self, note: Note) -> None:
        """Record a fact, or check a needed one. Raises `ScriptError` if it does not hold."""
        try:
            object_ = self.bound[note.object] if isinstance(note.object, str) else note.object
            recipient = self.bound[note.recipient] if note.recipient else None
            fact = Fact(note.relation, self.bound[note.subject], object_, recipient)
        except KeyError as missing:
            raise ScriptError(f"{note.where}: {missing} has not been told on every way here") from None
        if not note.needed:
            self.facts.append(fact)
        elif fact not in self.standing_facts():
            raise ScriptError(f"{note.where}: `{note.subject} {note.relation} {note.object}` does not hold here")

    def standing_facts(self) -> list[Fact]:
        """The facts that hold now: of those that change (who has a thing, where someone is), the last."""
        standing: dict[object, Fact] = {}
        for fact in self.facts:
            rule = self.library.forms[fact.relation].last_of
            changing = fact.subject if rule == "subject" else fact.object
            key = (fact.relation, id(changing)) if rule else id(fact)
            standing.pop(key, None)
            standing[key] = fact
        return list(standing.values())
