"""The teller: walks through a plot, makes every choice, writes the text, and tracks its probability.

Characters, things and places choose each word of theirs when the text is about to contain it. So text and choices
advance together, every choice shows in the text, and a parser of the text can recover every choice.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slmkit.data.stories.template import PRONOUNS, Alternatives, EntitySlot, Note, Template, WordSlot
from slmkit.data.stories.words import ScriptError, WordBook, held_out_things

CHARACTERS = {  # class of a role → the lists of its kinds, its female names and its male names
    "anyone": ("anyone", "girl_name", "boy_name"),
    "animal": ("animal", "girl_name", "boy_name"),
    "child": ("child", "girl_name", "boy_name"),
    "grownup": ("job", "woman_name", "man_name"),
}
CHILDREN = ("girl", "boy")
SOUNDS_LIKE_A_CONSONANT = ("uni", "use", "one", "eu")
SOUNDS_LIKE_A_VOWEL = ("honest", "hour")


@dataclass
class Role:
    """A role of a plot: its name, its sort (character, thing, place), and the word lists for it."""

    name: str
    sort: str
    lists: tuple[str, ...]
    _options: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def things(self, kind: str, teller: Teller) -> tuple[str, ...]:
        """The things allowed in a story of this split whose hero is of this kind."""
        key = (kind, teller.split)
        if key not in self._options:
            self._options[key] = tuple(word for name in self.lists for word in self._share(name, kind, teller))
        return self._options[key]

    def _share(self, list_name: str, kind: str, teller: Teller) -> tuple[str, ...]:
        words = teller.book.lists[list_name]
        held_out = held_out_things(kind, words)
        if teller.split == "train":
            return tuple(word for word in words if word not in held_out)
        return tuple(word for word in words if word in held_out) if self.name == "thing" else words


@dataclass
class Character:
    """A character with a name, a kind (fox, girl, baker) and, once named, a gender."""

    role: Role
    name: str = ""
    kind: str = ""
    female: bool | None = None

    def say(self, aspect: str, teller: Teller) -> str:
        """The name, the kind, or the pronoun `aspect` (given in masculine form) in this character's gender."""
        if aspect == "":
            return self.name or self._choose_name(teller)
        if aspect == "kind":
            return self.kind or self._choose_kind(teller)
        if self.female is None:
            raise ScriptError(f"`{self.role.name}.{aspect}` before {self.role.name} has a name")
        return PRONOUNS[aspect] if self.female else aspect

    def _choose_name(self, teller: Teller) -> str:
        _, female, male = CHARACTERS[self.role.lists[0]]
        names: tuple[str, ...] = ()
        if self.female is not False:
            names += teller.book.lists[female]
        if self.female is not True:
            names += teller.book.lists[male]
        self.name = teller.pick_unused(names)
        self.female = self.name in teller.book.lists[female]
        return self.name

    def _choose_kind(self, teller: Teller) -> str:
        kinds = teller.book.lists[CHARACTERS[self.role.lists[0]][0]]
        if self.female is not None:  # a girl's name fits only a girl; animals may have any
            kinds = tuple(kind for kind in kinds if kind not in CHILDREN or (kind == "girl") == self.female)
        self.kind = teller.pick_unused(kinds)
        if self.kind in CHILDREN:
            teller.used.discard(self.kind)  # two girls may occur, but two foxes would be ambiguous
            self.female = self.kind == "girl"
        return self.kind


@dataclass
class Thing:
    """A thing: a noun, and an adjective that is chosen when it is first described."""

    role: Role
    noun: str = ""
    look: str = ""

    def say(self, aspect: str, teller: Teller) -> str:
        """The noun, the look, or both."""
        if not self.noun and aspect == "look":
            raise ScriptError(f"`{self.role.name}.look` before {self.role.name} is told")
        if not self.noun:
            hero = teller.bound["hero"]
            if not (isinstance(hero, Character) and hero.kind):
                raise ScriptError(f"`{self.role.name}` before the hero's kind is told")
            self.noun = teller.pick_unused(self.role.things(hero.kind, teller))
        if aspect and not self.look:
            self.look = teller.pick(teller.book.looks[self.noun])
        return {"": self.noun, "full": f"{self.look} {self.noun}", "look": self.look}[aspect]


@dataclass
class Place:
    """A place: `meadow`, `in the meadow`, `to the meadow`."""

    role: Role
    noun: str = ""

    def say(self, aspect: str, teller: Teller) -> str:
        """The noun, alone or with a preposition of location or direction."""
        if not self.noun:
            self.noun = teller.pick_unused(tuple(word for name in self.role.lists for word in teller.book.lists[name]))
        if aspect == "at":
            return f"{teller.book.prepositions[self.noun]} the {self.noun}"
        return f"to the {self.noun}" if aspect == "to" else self.noun


@dataclass
class Word:
    """A word or phrase that was used and may be repeated."""

    text: str

    def say(self, aspect: str, teller: Teller) -> str:
        return self.text


Entity = Character | Thing | Place | Word
SORTS: dict[str, Callable[[Role], Entity]] = {"character": Character, "thing": Thing, "place": Place}


@dataclass(frozen=True)
class AskedOf:
    """A question and its answer, to be filled in from a finished story."""

    question: Template
    answer: Template


@dataclass(frozen=True)
class Form:
    """The wordings of a relation's question, and which of its facts count.

    `last_of` is "subject" or "object" if a later fact about the same one replaces an earlier one.
    """

    last_of: str
    wordings: tuple[AskedOf, ...] = ()


@dataclass(frozen=True)
class Plot:
    """A parsed plot: its roles, its beats and facts in order, and its own questions."""

    name: str
    roles: dict[str, Role]
    nodes: Template
    questions: tuple[AskedOf, ...]


@dataclass(frozen=True)
class Library:
    """The parsed scripts: words, plots, and forms of questions by relation."""

    book: WordBook
    plots: tuple[Plot, ...]
    forms: dict[str, Form]


@dataclass(frozen=True)
class Fact:
    """A fact of a story, such as `hero gave thing to friend`, with the entities."""

    relation: str
    subject: Entity
    object: Entity | Template | None = None
    recipient: Entity | None = None


class Teller:
    """Tells one story. Subclasses override the choices, from which all else follows."""

    plot: Plot

    def __init__(self, library: Library, split: str, chance: Callable[[], float]):
        self.library, self.book, self.split, self.chance = library, library.book, split, chance
        self.log_probability = 0.0
        self.used: set[str] = set()
        self.bound: dict[str, Entity] = {}
        self.parts: list[str] = []
        self.facts: list[Fact] = []

    def tell(self) -> None:
        """Choose a plot and tell it from the first beat to the last."""
        self.plot = self.library.plots[self.choose(self.library.plots)]
        self.bound = {name: SORTS[role.sort](role) for name, role in self.plot.roles.items()}
        self.tell_all(self.plot.nodes)

    def tell_all(self, nodes: Template) -> None:
        """Tell the nodes of a template one after the other."""
        for node in nodes:
            if isinstance(node, str):
                self.write(node)
            elif isinstance(node, Alternatives):
                self.tell_all(node.options[self.choose(node.options)])
            elif isinstance(node, WordSlot):
                word = self.pick(node.words)
                if node.bind:
                    self.bound[node.bind] = Word(word)
                self.write(dress(word, node.article, node.capital))
            elif isinstance(node, EntitySlot):
                if node.name not in self.bound:
                    raise ScriptError(f"`{node.name}` is used before it is told")
                self.write(dress(self.bound[node.name].say(node.aspect, self), node.article, node.capital))
            else:
                self.note(node)

    @property
    def text(self) -> str:
        """The text so far, without the space that the first beat begins with."""
        return "".join(self.parts)[1:]

    def choose(self, options: Sequence[object]) -> int:
        """The index of a uniformly chosen option."""
        self.log_probability -= math.log(len(options))
        return int(self.chance() * len(options))

    def pick(self, words: tuple[str, ...]) -> str:
        """A chosen word, weighted if the list has weights; it is written next, perhaps after an article."""
        weights = self.book.weights_of(words)
        if weights is None:
            self.log_probability -= math.log(len(words))
            return words[int(self.chance() * len(words))]
        total = sum(weights)
        index = bisect.bisect(list(itertools.accumulate(weights)), self.chance() * total)
        self.log_probability += math.log(weights[index] / total)
        return words[index]

    def pick_unused(self, words: tuple[str, ...]) -> str:
        """Choose a word that no other entity of this story has."""
        if not self.used.isdisjoint(words):
            words = tuple(word for word in words if word not in self.used)
        word = self.pick(words)
        self.used.add(word)
        return word

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


def dress(text: str, article: str, capital: bool) -> str:
    """The text with the right article before it, and a capital letter if required."""
    if article:
        vowel = text[0] in "aeiou" and not text.startswith(SOUNDS_LIKE_A_CONSONANT)
        vowel = vowel or text.startswith(SOUNDS_LIKE_A_VOWEL)
        return f"{article[0]}{'n' if vowel else ''} {text}"
    return text[0].upper() + text[1:] if capital else text


def random_stream(*key: object) -> random.Random:
    """A random generator seeded by the key alone, the same in every process and on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))
