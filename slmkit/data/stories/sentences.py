"""The sentences of the plots, as patterns that recognise them and tell what they say of the story's roles.

Every way to tell a beat (see `script`) is cut into sentences. A sentence is a list of parts: fixed text, gaps for words
that the generator draws, and choices between lists of parts.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import CHARACTERS, Plot, dress
from slmkit.data.stories.template import PRONOUNS, Alternatives, EntitySlot, Node, Note, WordSlot
from slmkit.data.stories.words import WordBook

# While a way is cut, a gap is one character of Unicode's private use: from U+E000 if it begins with a capital letter.
CAPITAL, SMALL = 0xE000, 0xF000
SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]")) (?=["A-Z\ue000-\uefff])')
GAP = re.compile("([\ue000-\uf8ff])")
WORD_END = re.compile(r"(?<=\w)\b")
MOST_ENDS = 12  # of words within which a gap ends: `to the post office`, `a mole's pocket`


class Gap(NamedTuple):
    """What a gap says of a role (""; of none), and each text that fits, with the word that it stands for.

    Attributes: name, kind, gender, noun, look, place, word (said before), and "new word".
    """

    role: str
    attribute: str
    words: Mapping[str, str]


Part = str | Gap | list  # a list: options, each a list of parts
Position = tuple[int, int, int]  # beat, way, sentence
Said = list[tuple[str, str, str]]  # role, attribute, word


class Sentence(NamedTuple):
    """A sentence, the longest fixed text of it, and where it stands: number of the plot and position in it."""

    fixed: str
    parts: list[Part]
    places: list[tuple[int, Position]]


class Script:
    """A plot as sentences: `beats[beat][way][sentence]` is a list of parts. An empty way leaves the beat out."""

    def __init__(self, plot: Plot, book: WordBook) -> None:
        self.plot, self.book = plot, book
        self.remembered: dict[str, set[str]] = {}  # name → words that may be remembered by it
        for slot in _word_slots(plot.nodes):
            self.remembered.setdefault(slot.bind or "", set()).update(slot.words)
        self.beats: list[list[list[list[Part]]]] = []
        for is_beat, nodes in itertools.groupby(plot.nodes, _is_beat):
            for ways in [node.options for node in nodes] if is_beat else [(tuple(nodes),)]:  # type: ignore[union-attr]
                self.beats.append([_sentences(self._parts(way)) for way in ways])

    def _parts(self, nodes: Iterable[Node]) -> list[Part]:
        return list(itertools.chain.from_iterable(self._parts_of(node) for node in nodes if not isinstance(node, Note)))

    def _parts_of(self, node: str | Alternatives | WordSlot | EntitySlot) -> list[Part]:
        if isinstance(node, str):
            return [node]
        if isinstance(node, Alternatives):
            return [[self._parts(option) for option in node.options]]
        form = node.article, node.capital
        if isinstance(node, WordSlot):
            return [Gap(node.bind or "", "new word", _texts(node.words, *form))]
        role, lists = self.plot.roles.get(node.name), self.book.lists
        if role is None:
            return [Gap(node.name, "word", _texts(tuple(sorted(self.remembered[node.name])), *form))]
        if role.sort == "character":
            kinds, female, male = CHARACTERS[role.lists[0]]
            if node.aspect in PRONOUNS:
                texts = _texts((node.aspect, PRONOUNS[node.aspect]), *form)
                return [Gap(role.name, "gender", dict(zip(texts, ("he", "she"))))]
            attribute, words = ("kind", lists[kinds]) if node.aspect else ("name", lists[female] + lists[male])
            return [Gap(role.name, attribute, _texts(words, *form))]
        nouns = tuple(noun for name in role.lists for noun in lists[name])
        if role.sort == "place":
            before = {noun: {"at": f"{self.book.prepositions[noun]} the ", "to": "to the "} for noun in nouns}
            texts = _texts(tuple(before[noun].get(node.aspect, "") + noun for noun in nouns), *form)
            return [Gap(role.name, "place", dict(zip(texts, nouns)))]
        if not node.aspect:
            return [Gap(role.name, "noun", _texts(nouns, *form))]
        looks = sorted({look for noun in nouns for look in self.book.looks[noun]})
        described: list[Part] = [Gap(role.name, "look", _texts(tuple(looks), *form))]
        return described + ([" ", Gap(role.name, "noun", _texts(nouns, "", False))] if node.aspect == "full" else [])

    def beginnings(self, beat: int = 0) -> frozenset[Position]:
        """The first sentences of a beat, and of the next if it may be left out; after the last beat, the end."""
        if beat == len(self.beats):
            return frozenset([(beat, 0, 0)])
        found = frozenset((beat, way, 0) for way, sentences in enumerate(self.beats[beat]) if sentences)
        return found | self.beginnings(beat + 1) if [] in self.beats[beat] else found

    def after(self, position: Position) -> frozenset[Position]:
        """What may follow a sentence."""
        beat, way, sentence = position
        if sentence + 1 < len(self.beats[beat][way]):
            return frozenset([(beat, way, sentence + 1)])
        return self.beginnings(beat + 1)


@functools.cache
def all_scripts() -> tuple[list[Script], list[Sentence]]:
    """The plots, and their sentences; those of fragments stand in many plots."""
    library = load_library()
    scripts = [Script(plot, library.book) for plot in library.plots]
    sentences: dict[str, Sentence] = {}
    for number, script in enumerate(scripts):
        for beat, ways in enumerate(script.beats):
            for way, told in enumerate(ways):
                for place, parts in enumerate(told):
                    fixed = max((part for part in parts if isinstance(part, str)), key=len, default="")
                    sentence = sentences.setdefault(str(parts), Sentence(fixed, parts, []))
                    sentence.places.append((number, (beat, way, place)))
    return scripts, [*sentences.values()]


def matches(text: str) -> dict[int, list[tuple[Position, Said]]]:
    """Where a sentence may stand, by the number of the plot, and what it says of the roles there."""
    found: dict[int, list[tuple[Position, Said]]] = {}
    for fixed, parts, places in all_scripts()[1]:
        if fixed in text:
            for said, (number, position) in itertools.product(_readings(parts, text), places):
                found.setdefault(number, []).append((position, said))
    return found


def _readings(parts: Sequence[Part], text: str) -> Iterator[Said]:
    """Every way to read a text as these parts: what it says of each role."""
    if not parts:
        yield from [[]] if not text else []
        return
    part, rest = parts[0], parts[1:]
    if isinstance(part, str):
        if text.startswith(part):
            yield from _readings(rest, text[len(part) :])
    elif isinstance(part, Gap):
        for end in _ends(text, rest):
            word = part.words.get(text[:end])
            if word is not None:
                said = [(part.role, part.attribute, word)] if part.role else []
                yield from (said + more for more in _readings(rest, text[end:]))
    else:
        for option in part:
            yield from _readings([*option, *rest], text)


def _ends(text: str, rest: Sequence[Part]) -> list[int]:
    """Where a gap at the beginning of a text may end, if `rest` follows it."""
    if not rest:
        return [len(text)]
    ends = re.finditer(re.escape(rest[0]), text) if isinstance(rest[0], str) else WORD_END.finditer(text)
    return [end.start() for end in itertools.islice(ends, MOST_ENDS)]


def _sentences(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of a way to tell a beat, cut into sentences as `SENTENCE_END` cuts the text."""
    gaps = [part for part in parts if not isinstance(part, str)]
    numbers = itertools.count()
    text = "".join(
        part if isinstance(part, str) else chr((CAPITAL if _is_capital(part) else SMALL) + next(numbers))
        for part in parts
    )
    return [
        [gaps[ord(piece) % SMALL % CAPITAL] if GAP.match(piece) else piece for piece in GAP.split(sentence) if piece]
        for sentence in SENTENCE_END.split(text.strip())
        if sentence
    ]


def _is_capital(part: Part) -> bool:
    """Whether a part begins with a capital letter; of options, the last."""
    if isinstance(part, list):
        return bool(part[-1]) and _is_capital(part[-1][0])
    return (part if isinstance(part, str) else next(iter(part.words)))[0].isupper()


@functools.cache
def _texts(words: tuple[str, ...], article: str, capital: bool) -> dict[str, str]:
    """Each word as it stands in a text → the word."""
    return {dress(word, article, capital): word for word in words}


def _is_beat(node: Node) -> bool:
    """Whether a plot's node is the choice between the ways of a beat: each of them begins with a space, or is empty."""
    return isinstance(node, Alternatives) and all(str(option[0])[0] == " " for option in node.options if option)


def _word_slots(nodes: Iterable[Node]) -> Iterator[WordSlot]:
    """All slots for words in a template."""
    for node in nodes:
        if isinstance(node, WordSlot):
            yield node
        elif isinstance(node, Alternatives):
            yield from _word_slots(itertools.chain(*node.options))
