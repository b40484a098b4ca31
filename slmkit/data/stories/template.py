"""Templates: text with choices and slots in it, read once and told many times (see `Teller.tell_all`).

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
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from slmkit.data.stories.words import ScriptError, WordBook

PRONOUNS = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
ASPECTS = {  # what may be said of each sort of entity
    "character": ("", "kind", *PRONOUNS),
    "thing": ("", "full", "look"),
    "place": ("", "at", "to"),
    "word": ("",),
    "anything": ("", "kind", *PRONOUNS, "full", "look", "at", "to"),
}
SLOT = re.compile(r"(?:(?P<article>[Aa]n?) )?(?P<name>[A-Za-z_]+\d?)(?:\.(?P<aspect>[A-Za-z]+))?(?:=(?P<bind>\w+))?")
# A bracket or bar, a slot (a fact in one may hold slots), plain text, or a `{` without its `}`.
TOKEN = re.compile(r"[\[|\]]|\{(?:[^{}]|\{[^{}]*\})*\}|[^\[{|\]]+|\{")
BARE_ARTICLE = re.compile(r"(^|\W)[Aa]n? $")


@dataclass(frozen=True)
class Alternatives:
    """Options, of which one is told."""

    options: tuple[Template, ...]


@dataclass(frozen=True)
class WordSlot:
    """A slot for a word from a list, chosen when it is written."""

    words: tuple[str, ...]
    article: str
    capital: bool
    bind: str | None


@dataclass(frozen=True)
class EntitySlot:
    """A slot for a character, thing, place or remembered word."""

    name: str
    aspect: str
    article: str
    capital: bool


@dataclass(frozen=True)
class Note:
    """A fact: `hero found thing`, `hero gave thing to friend`; `needed` ones are checked, not recorded."""

    relation: str
    subject: str
    object: str | Template | None
    recipient: str | None
    needed: bool
    where: str


Node = str | Alternatives | WordSlot | EntitySlot | Note
Template = tuple[Node, ...]  # told one after the other; a `str` is fixed text


@dataclass
class Scope:
    """The names that a template may use: word lists, entities with their sorts (see `ASPECTS`), relations of facts."""

    book: WordBook
    sorts: Mapping[str, str]
    relations: Set[str]


def parse_template(text: str, scope: Scope, where: str) -> Template:
    """Parse a template. Raises `ScriptError` for a name that is no role, list or remembered word, and for a bracket
    without the other.
    """
    tokens = TOKEN.findall(text)[::-1]  # the next one is the last
    nodes = _sequence(tokens, scope, where)
    if tokens:
        raise ScriptError(f"{where}: {tokens[-1]!r} without its opening bracket in {text!r}")
    return nodes


def _sequence(tokens: list[str], scope: Scope, where: str) -> Template:
    """Nodes of the tokens up to the `|` or `]` that ends this alternative; they are taken from `tokens`."""
    nodes: list[Node] = []
    while tokens and tokens[-1] not in "|]":
        token = tokens.pop()
        if token == "{":
            raise ScriptError(f"{where}: `{{` without `}}`")
        node: Node = _alternatives(tokens, scope, where) if token == "[" else token
        if token[0] == "{":
            node = _slot(token[1:-1], scope, where)
        before = nodes[-1] if nodes and isinstance(nodes[-1], str) else ""
        if isinstance(node, WordSlot | EntitySlot) and BARE_ARTICLE.search(before):
            raise ScriptError(f"{where}: write {{a word}}, so that the article fits, not `a {{word}}`")
        nodes.append(node)
    return tuple(nodes)


def _alternatives(tokens: list[str], scope: Scope, where: str) -> Alternatives:
    """The alternatives after a `[`, through its `]`."""
    options: list[Template] = []
    sources: list[str] = []
    end = "|"
    while end == "|":
        before = tokens.copy()
        options.append(_sequence(tokens, scope, where))
        sources.append("".join(reversed(before[len(tokens) :])))
        if not tokens:
            raise ScriptError(f"{where}: `[` without `]`")
        end = tokens.pop()
    return alternatives(options, sources, where)


def alternatives(options: Iterable[Template], sources: list[str], where: str) -> Alternatives:
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
    sort = scope.sorts.get(name)
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
        if not word.startswith('"') and word not in scope.sorts:
            raise ScriptError(f"{where}: {word!r} is no role and no remembered word")
    object_: str | Template | None = words[2] if len(words) > 2 else None
    if len(words) > 2 and words[2].startswith('"'):
        object_ = parse_template(words[2][1:-1], scope, where)
    return Note(words[1], words[0], object_, words[4] if len(words) == 5 else None, needed, where)
