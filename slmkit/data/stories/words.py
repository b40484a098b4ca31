"""The word lists of the story world (`words.txt`), and which pairs of hero and thing are held out.

The format, line by line:

    # a comment
    = colour                     a list; its words follow, separated by commas (`girl * 3` weighs three times as much)
    = look: colour + quality     a list that is the union of others
    = thing toy: colour + stuff  a list of things, and the lists their looks are taken from
    = place open                 a list of places, each with its preposition: `in meadow, on hill`
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "heldout")
WHOLE, MEDIUM, SMALL = 1.0, 0.35, 0.1  # sizes of the world: the share of its words and plots
FEWEST_WORDS = 6  # that a smaller world keeps of a list
HELD_OUT_SHARE = 10  # one pair of hero's kind and thing in ten never occurs in the train split


class ScriptError(ValueError):
    """An invalid word list or plot; names the file and the line."""


@dataclass
class WordBook:
    """All word lists by name, attributes of things and places, and weights other than 1."""

    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)  # word → weight, if it is not 1
    looks: dict[str, tuple[str, ...]] = field(default_factory=dict)  # thing → adjectives for it
    thing_lists: set[str] = field(default_factory=set)
    prepositions: dict[str, str] = field(default_factory=dict)  # place → in, on, at, by
    place_lists: set[str] = field(default_factory=set)
    unions: set[str] = field(default_factory=set)

    def weights_of(self, words: tuple[str, ...]) -> list[int] | None:
        """The weight of each word [words]; None if all are equal."""
        if self.weights.keys().isdisjoint(words):
            return None
        return [self.weights.get(word, 1) for word in words]


def held_out_things(kind: str, things: tuple[str, ...]) -> frozenset[str]:
    """The things of one list that are held out for heroes of this kind: those with the smallest hashes."""
    ranked = sorted(things, key=lambda thing: hashlib.sha256(f"{kind}/{thing}".encode()).digest())
    return frozenset(ranked[: max(1, round(len(things) / HELD_OUT_SHARE))])


def load_words(path: Path, size: float = WHOLE) -> WordBook:
    """Read a file of word lists. A world of a smaller size has the first words of each list.

    Raises `ScriptError` for invalid lines.
    """
    book = WordBook()
    name, kind = "", ""
    sources: tuple[str, ...] = ()
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), start=1):
        line = line.split("#")[0].strip()
        where = f"{path.name}:{number}"
        if line.startswith("="):
            _shorten(book, name, size)
            name, sources, kind = _heading(book, line, where)
        elif line:
            _add_words(book, name, sources, kind, line, where)
    _shorten(book, name, size)
    book.weights = {word: max(1, round(size * weight)) for word, weight in book.weights.items()}
    return book


def _shorten(book: WordBook, name: str, size: float) -> None:
    """Keep the first words of a list; a union's lists are shortened already."""
    if name and name not in book.unions:
        words = book.lists[name]
        book.lists[name] = words[: max(FEWEST_WORDS, math.ceil(size * len(words)))]


def _heading(book: WordBook, line: str, where: str) -> tuple[str, tuple[str, ...], str]:
    """Open the list of a `=` line; returns its name, the lists it draws on, and thing, place or nothing."""
    head, _, tail = line[1:].partition(":")
    kind, _, name = head.strip().rpartition(" ")
    sources = tuple(part.strip() for part in tail.split("+") if part.strip())
    if name in book.lists or kind not in ("", "thing", "place"):
        raise ScriptError(f"{where}: {line!r} is a second list of that name, or neither a thing nor a place list")
    for source in sources:
        if source not in book.lists:
            raise ScriptError(f"{where}: unknown word list {source!r}")
    union = tuple(word for source in sources for word in book.lists[source])
    book.lists[name] = union if kind == "" else ()
    if kind == "" and sources:
        book.unions.add(name)
    if kind == "thing":
        book.thing_lists.add(name)
    if kind == "place":
        book.place_lists.add(name)
    return name, union, kind


def _add_words(book: WordBook, name: str, looks: tuple[str, ...], kind: str, line: str, where: str) -> None:
    """Add a line of words to the open list."""
    words = []
    for entry in line.rstrip(",").split(","):
        word, _, weight = (part.strip() for part in entry.partition("*"))
        if weight:
            book.weights[word] = int(weight)
        if kind == "place":
            preposition, _, word = word.partition(" ")
            if not word or preposition not in ("in", "on", "at", "by", "under"):
                raise ScriptError(f"{where}: a place reads `in meadow`, not {entry.strip()!r}")
            book.prepositions[word] = preposition
        if kind == "thing":
            book.looks[word] = looks
        words.append(word)
    book.lists[name] += tuple(words)
