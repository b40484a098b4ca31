"""Templates: text with choices and slots in it, read once and told many times.

plain text                     is written as it stands
[walked|hurried|ran]           one of these, each as likely; they may hold slots and brackets, and may be empty
{hero} {friend.kind} {his}     a role of the plot; a bare pronoun is the hero's, `{friend.his}` the friend's
{thing.full} {place.at}        a thing with its look (`red kite`), a place with its preposition (`on the hill`)
{feeling}                      a word from the list `feeling`, chosen anew each time
{feeling=mood} ... {mood}      the same, remembered and said again
{a thing.full} {An animal}     with the article that fits; a capital anywhere in a slot's first letter is kept
{! hero has thing}             a fact, recorded here (see `script`)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from slmkit.data.stories.cast import ASPECTS, PRONOUNS, Entity, Role, Word
from slmkit.data.stories.words import ScriptError, WordBook

SLOT = re.compile(r"(?:(?P<article>[Aa]n?) )?(?P<name>[A-Za-z_]+\d?)(?:\.(?P<aspect>[A-Za-z]+))?(?:=(?P<bind>\w+))?")
BARE_ARTICLE = re.compile(r"(^|\W)[Aa]n? $")
SOUNDS_LIKE_A_CONSONANT = ("uni", "use", "one", "eu")
SOUNDS_LIKE_A_VOWEL = ("honest", "hour")


class Teller(Protocol):
    """The interface that a template requires of the teller."""

    book: WordBook
    split: str
    used: set[str]
    bound: dict[str, Entity]

    def choose(self, options: tuple[str, ...]) -> int: ...
    def pick(self, words: tuple[str, ...]) -> str: ...
    def write(self, text: str) -> None: ...
    def note(self, fact: Note) -> None: ...


class Node(Protocol):
    """A piece of a template."""

    def tell(self, teller: Teller) -> None: ...


@dataclass
class Scope:
    """The names that a template may use: word lists, a plot's roles, remembered words, relations of facts."""

    book: WordBook
    roles: dict[str, Role]
    words: set[str]
    relations: frozenset[str]
    anything: frozenset[str] = frozenset()  # names for the entities of a fact

    def sort_of(self, name: str) -> str | None:
        """character, thing, place, word or anything; None for an unknown name."""
        if name in self.roles:
            return self.roles[name].sort
        return "word" if name in self.words else "anything" if name in self.anything else None


@dataclass
class Text:
    """Fixed text."""

    text: str

    def tell(self, teller: Teller) -> None:
        teller.write(self.text)


@dataclass
class Sequence:
    """Nodes told one after the other."""

    nodes: tuple[Node, ...]

    def tell(self, teller: Teller) -> None:
        for node in self.nodes:
            node.tell(teller)

    @property
    def head(self) -> str:
        """The fixed text that it begins with."""
        return self.nodes[0].text if self.nodes and isinstance(self.nodes[0], Text) else ""


@dataclass
class Alternatives:
    """Options, of which one is told."""

    options: tuple[Sequence, ...]
    heads: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.heads = tuple(option.head for option in self.options)

    def tell(self, teller: Teller) -> None:
        self.options[teller.choose(self.heads)].tell(teller)


def dress(text: str, article: str, capital: bool) -> str:
    """The text with the right article before it, and a capital letter if required."""
    if article:
        vowel = text[0] in "aeiou" and not text.startswith(SOUNDS_LIKE_A_CONSONANT)
        vowel = vowel or text.startswith(SOUNDS_LIKE_A_VOWEL)
        return f"{article[0]}{'n' if vowel else ''} {text}"
    return text[0].upper() + text[1:] if capital else text


@dataclass
class WordSlot:
    """A slot for a word from a list, chosen when it is written."""

    words: tuple[str, ...]
    article: str
    capital: bool
    bind: str | None

    def tell(self, teller: Teller) -> None:
        word = teller.pick(self.words)
        if self.bind:
            teller.bound[self.bind] = Word(word)
        teller.write(dress(word, self.article, self.capital))


@dataclass
class EntitySlot:
    """A slot for a character, thing, place or remembered word."""

    name: str
    aspect: str
    article: str
    capital: bool

    def tell(self, teller: Teller) -> None:
        if self.name not in teller.bound:
            raise ScriptError(f"`{self.name}` is used before it is told")
        teller.write(dress(teller.bound[self.name].say(self.aspect, teller), self.article, self.capital))


@dataclass
class Note:
    """A fact: `hero found thing`, `hero gave thing to friend`; `needed` ones are checked, not recorded."""

    relation: str
    subject: str
    object: str | Sequence | None
    recipient: str | None
    needed: bool
    where: str

    def tell(self, teller: Teller) -> None:
        teller.note(self)


def parse_template(text: str, scope: Scope, where: str) -> Sequence:
    """Parse a template. Raises `ScriptError` for a name that is no role, list or remembered word."""
    nodes, end = _sequence(text, 0, scope, where)
    if end != len(text):
        raise ScriptError(f"{where}: {text[end]!r} without its opening bracket in {text!r}")
    return nodes


def _sequence(text: str, at: int, scope: Scope, where: str) -> tuple[Sequence, int]:
    """Nodes from `at` to the end of the text, or to the `|` or `]` that ends this alternative."""
    nodes: list[Node] = []
    while at < len(text) and text[at] not in "|]":
        if text[at] == "[":
            node, at = _alternatives(text, at + 1, scope, where)
        elif text[at] == "{":
            end = _closing_brace(text, at, where)
            node, at = _slot(text[at + 1 : end], scope, where), end + 1
        else:
            end = min((i for i in (text.find(mark, at) for mark in "[{|]") if i >= 0), default=len(text))
            node, at = Text(text[at:end]), end
        if (
            isinstance(node, WordSlot | EntitySlot)
            and nodes
            and isinstance(nodes[-1], Text)
            and BARE_ARTICLE.search(nodes[-1].text)
        ):
            raise ScriptError(f"{where}: write {{a word}}, so that the article fits, not `a {{word}}`: {text!r}")
        nodes.append(node)
    return Sequence(tuple(nodes)), at


def _closing_brace(text: str, at: int, where: str) -> int:
    """The end of the slot that opens at `at`; a fact in a slot may contain slots."""
    depth = 0
    for i in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ScriptError(f"{where}: `{{` without `}}` in {text!r}")


def _alternatives(text: str, at: int, scope: Scope, where: str) -> tuple[Node, int]:
    """The alternatives after a `[`, through its `]`."""
    options, starts = [], [at]
    while True:
        option, at = _sequence(text, at, scope, where)
        options.append(option)
        if at >= len(text):
            raise ScriptError(f"{where}: `[` without `]` in {text!r}")
        at += 1
        if text[at - 1] == "]":
            break
        starts.append(at)
    return alternatives(options, [text[a : b - 1] for a, b in zip(starts, [*starts[1:], at])], where), at


def alternatives(options: Iterable[Sequence], sources: list[str], where: str) -> Alternatives:
    """Alternatives, which must differ: equal ones would make one text from two choices. Raises `ScriptError`."""
    if len(sources) < 2 or len(set(sources)) < len(sources):
        raise ScriptError(f"{where}: expected two or more different alternatives, found {sources}")
    return Alternatives(tuple(options))


def _slot(source: str, scope: Scope, where: str) -> Node:
    """The slot between `{` and `}`."""
    if source.startswith("!"):
        return parse_note(source[1:], scope, where)
    match = SLOT.fullmatch(source)
    if match is None:
        raise ScriptError(f"{where}: cannot read the slot {{{source}}}")
    article, name, aspect, bind = match["article"] or "", match["name"], match["aspect"] or "", match["bind"]
    capital = name[0].isupper() or aspect[:1].isupper()
    name, aspect = name.lower(), aspect.lower()
    if name in PRONOUNS and not aspect:
        name, aspect = "hero", name
    sort = scope.sort_of(name)
    if sort and aspect in ASPECTS[sort] and not bind:
        return EntitySlot(name, aspect, article, capital)
    if sort is None and name in scope.book.lists and not aspect:
        return WordSlot(scope.book.lists[name], article, capital, bind)
    raise ScriptError(f"{where}: {{{source}}} is no role or remembered word with that aspect, and no word list")


def parse_note(source: str, scope: Scope, where: str) -> Note:
    """Parse `[needs] subject relation [object [to recipient]]`; an object may be a "quoted template"."""
    words = re.findall(r'"[^"]*"|\S+', source)
    needed = words[:1] == ["needs"]
    words = words[1:] if needed else words
    if len(words) not in (2, 3, 5) or words[1] not in scope.relations or (len(words) == 5 and words[3] != "to"):
        raise ScriptError(f"{where}: expected `subject relation object [to somebody]`, found {source.strip()!r}")
    for word in words[:1] + words[2:3] + words[4:]:
        if not word.startswith('"') and scope.sort_of(word) is None:
            raise ScriptError(f"{where}: {word!r} is no role and no remembered word")
    object_: str | Sequence | None = words[2] if len(words) > 2 else None
    if len(words) > 2 and words[2].startswith('"'):
        object_ = parse_template(words[2][1:-1], scope, where)
    return Note(words[1], words[0], object_, words[4] if len(words) == 5 else None, needed, where)
