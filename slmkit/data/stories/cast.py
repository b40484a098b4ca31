"""Entities of a story: characters, things and places. Each word of theirs is chosen at its first mention.

An entity asks the teller for a word only when the text is about to contain it. So text and choices advance together,
every choice shows in the text, and a parser of the text can recover every choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from slmkit.data.stories.words import ScriptError, WordBook, held_out_things

CHARACTERS = {  # class of a role → the lists of its kinds, its female names and its male names
    "anyone": ("anyone", "girl_name", "boy_name"),
    "animal": ("animal", "girl_name", "boy_name"),
    "child": ("child", "girl_name", "boy_name"),
    "grownup": ("job", "woman_name", "man_name"),
}
CHILDREN = ("girl", "boy")
PRONOUNS = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
ASPECTS = {
    "character": ("", "kind", *PRONOUNS),
    "thing": ("", "full", "look"),
    "place": ("", "at", "to"),
    "word": ("",),
    "anything": ("", "kind", *PRONOUNS, "full", "look", "at", "to"),
}


class Chooser(Protocol):
    """The interface that an entity requires of the teller."""

    book: WordBook
    split: str
    used: set[str]
    bound: dict[str, Entity]

    def pick(self, words: tuple[str, ...]) -> str: ...


class Entity(Protocol):
    """Anything that a slot can name."""

    def say(self, aspect: str, teller: Chooser) -> str: ...


@dataclass
class Role:
    """A role of a plot: its name, its sort (character, thing, place), and the word lists for it."""

    name: str
    sort: str
    lists: tuple[str, ...]
    _options: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def things(self, kind: str, teller: Chooser) -> tuple[str, ...]:
        """The things allowed in a story of this split whose hero is of this kind."""
        key = (kind, teller.split)
        if key not in self._options:
            self._options[key] = tuple(word for name in self.lists for word in self._share(name, kind, teller))
        return self._options[key]

    def _share(self, list_name: str, kind: str, teller: Chooser) -> tuple[str, ...]:
        words = teller.book.lists[list_name]
        held_out = held_out_things(kind, words)
        if teller.split == "train":
            return tuple(word for word in words if word not in held_out)
        if self.name == "thing":
            return tuple(word for word in words if word in held_out)
        return words

    def new(self) -> Entity:
        """An entity with no words chosen yet."""
        return {"character": Character, "thing": Thing, "place": Place}[self.sort](self)


def pick_unused(teller: Chooser, words: tuple[str, ...]) -> str:
    """Choose a word that no other entity of this story has."""
    if not teller.used.isdisjoint(words):
        words = tuple(word for word in words if word not in teller.used)
    word = teller.pick(words)
    teller.used.add(word)
    return word


@dataclass
class Character:
    """A character with a name, a kind (fox, girl, baker) and, once named, a gender."""

    role: Role
    name: str = ""
    kind: str = ""
    female: bool | None = None

    def say(self, aspect: str, teller: Chooser) -> str:
        """The name, the kind, or the pronoun `aspect` (given in masculine form) in this character's gender."""
        if aspect == "":
            return self.name or self._choose_name(teller)
        if aspect == "kind":
            return self.kind or self._choose_kind(teller)
        if self.female is None:
            raise ScriptError(f"`{self.role.name}.{aspect}` before {self.role.name} has a name")
        return PRONOUNS[aspect] if self.female else aspect

    def _choose_name(self, teller: Chooser) -> str:
        _, female, male = CHARACTERS[self.role.lists[0]]
        names: tuple[str, ...] = ()
        if self.female is not False:
            names += teller.book.lists[female]
        if self.female is not True:
            names += teller.book.lists[male]
        self.name = pick_unused(teller, names)
        self.female = self.name in teller.book.lists[female]
        return self.name

    def _choose_kind(self, teller: Chooser) -> str:
        kinds = teller.book.lists[CHARACTERS[self.role.lists[0]][0]]
        if self.female is not None:  # a girl's name fits only a girl; animals may have any
            kinds = tuple(kind for kind in kinds if kind not in CHILDREN or (kind == "girl") == self.female)
        self.kind = pick_unused(teller, kinds)
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

    def say(self, aspect: str, teller: Chooser) -> str:
        """The noun, the look, or both."""
        if not self.noun and aspect == "look":
            raise ScriptError(f"`{self.role.name}.look` before {self.role.name} is told")
        if not self.noun:
            hero = teller.bound["hero"]
            if not (isinstance(hero, Character) and hero.kind):
                raise ScriptError(f"`{self.role.name}` before the hero's kind is told")
            self.noun = pick_unused(teller, self.role.things(hero.kind, teller))
        if aspect and not self.look:
            self.look = teller.pick(teller.book.looks[self.noun])
        return {"": self.noun, "full": f"{self.look} {self.noun}", "look": self.look}[aspect]


@dataclass
class Place:
    """A place: `meadow`, `in the meadow`, `to the meadow`."""

    role: Role
    noun: str = ""

    def say(self, aspect: str, teller: Chooser) -> str:
        """The noun, alone or with a preposition of location or direction."""
        if not self.noun:
            self.noun = pick_unused(teller, tuple(word for name in self.role.lists for word in teller.book.lists[name]))
        if aspect == "at":
            return f"{teller.book.prepositions[self.noun]} the {self.noun}"
        return f"to the {self.noun}" if aspect == "to" else self.noun


@dataclass
class Word:
    """A word or phrase that was used and may be repeated."""

    text: str

    def say(self, aspect: str, teller: Chooser) -> str:
        """The text."""
        return self.text
