"""Reads a story by the generator's own tables: what it could have written, and what contradicts the rest of the story.

Every way to tell a beat (see `script`) is cut into sentences, whose slots fit the words that the generator draws from.
A story is read with each plot that it may have, and the reading with the fewest faults counts. A reading follows the
plot from sentence to sentence and remembers what each role was called: name, kind, gender, noun, look, place. A story
without a fault is one that the generator can tell, whichever split its hero and thing belong to.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import CHARACTERS, CHILDREN, Plot, dress
from slmkit.data.stories.template import PRONOUNS, Alternatives, EntitySlot, Node, Note, WordSlot
from slmkit.data.stories.words import WordBook

SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]")) (?=["A-Z])')
WORD_END = re.compile(r"(?<=\w)\b")
MOST_ENDS = 12  # of words within which a slot ends: `to the post office`, `a mole's pocket`
PLOTS = 4  # with which a story is read: those that most of its sentences belong to
READINGS = 12  # kept after each sentence
FAULTS = {
    "sentence": "the generator cannot write this sentence",
    "plot": "a sentence of another plot",
    "order": "a sentence that does not follow the one before it",
    "end": "the last sentence does not end the plot",
    "stranger": "a name that nobody in the story has",
    "person": "the name of another character",
    "owner": "the name of another character, in a sentence about a thing",
    "kind": "another kind, or a kind that does not fit the name, or that another character is of",
    "pronoun": "a pronoun that does not fit the character",
    "thing": "another thing",
    "look": "another colour or look, or one that the thing cannot have",
    "place": "another place",
    "detail": "another word than the one that was said before",
}  # fmt: skip
CONTRADICTIONS = [*FAULTS][4:]  # between sentences which are all possible
FAULT_OF = {"name": "person", "noun": "thing", "gender": "pronoun", "word": "detail"}  # others: named as the attribute
DISTINCT = ("name", "kind", "noun", "place")  # no two roles of a story have the same one


class Slot(NamedTuple):
    """A gap in a sentence: the role and attribute it is about, and each text that fits, with the word it stands for.

    Attributes: name, kind, gender, noun, look, place, word (said before), and "new word". Without a role: any word.
    """

    role: str
    attribute: str
    words: Mapping[str, str]


Part = str | Slot | list  # fixed text, a gap, or options, each a list of parts
Position = tuple[int, int, int]  # beat, way, sentence
Said = list[tuple[str, str, str]]  # role, attribute, word


class Match(NamedTuple):
    """Where in a plot a sentence may stand, and what it says of the roles then."""

    position: Position
    said: Said


class Fault(NamedTuple):
    """A kind of fault (a key of `FAULTS`), and the sentence in which it shows."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Reading:
    """A story, or its beginning, read with a plot."""

    plot: str
    next: frozenset[Position]  # where the next sentence may stand
    last: Position = (-1, 0, 0)
    is_lost: bool = False  # the last sentence was none of the plot's: any later one may follow
    faults: tuple[Fault, ...] = ()
    possible: int = 0  # sentences that the generator can write, with any plot
    sentences: int = 0
    known: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (role, attribute) → word


class Script:
    """A plot as sentences: `beats[beat][way][sentence]` is a list of parts. An empty way leaves the beat out."""

    def __init__(self, plot: Plot, book: WordBook) -> None:
        self.plot, self.book = plot, book
        self.remembered: dict[str, set[str]] = {}  # name → words that may be remembered by it
        for slot in _slots(plot.nodes):
            if slot.bind:
                self.remembered.setdefault(slot.bind, set()).update(slot.words)
        girls, boys = (
            {word for names in CHARACTERS.values() for word in book.lists[names[column]]} for column in (1, 2)
        )
        self.female, self.male = girls | {"girl"}, boys | {"boy"}
        self.beats: list[list[list[list[Part]]]] = []
        for is_beat, nodes in itertools.groupby(plot.nodes, _is_beat):
            for ways in [node.options for node in nodes] if is_beat else [[tuple(nodes)]]:
                self.beats.append([_sentences(self._parts(way)) for way in ways])

    def _parts(self, nodes: Iterable[Node]) -> list[Part]:
        parts: list[Part] = [""]
        for node in nodes:
            new = self._parts_of(node)
            if isinstance(parts[-1], str) and new and isinstance(new[0], str):
                parts[-1] += new.pop(0)
            parts += new
        return [part for part in parts if part != ""]

    def _parts_of(self, node: Node) -> list[Part]:
        if isinstance(node, str):
            return [node]
        if isinstance(node, Note):
            return []
        if isinstance(node, Alternatives):
            return [[self._parts(option) for option in node.options]]

        if isinstance(node, WordSlot):
            return [Slot(node.bind or "", "new word", _texts(node.words, node.article, node.capital))]
        role, lists = self.plot.roles.get(node.name), self.book.lists
        form = node.article, node.capital
        if role is None:
            return [Slot(node.name, "word", _texts(tuple(sorted(self.remembered[node.name])), *form))]
        if role.sort == "character":
            kinds, female, male = CHARACTERS[role.lists[0]]
            if node.aspect in PRONOUNS:
                pronouns = node.aspect, PRONOUNS[node.aspect]
                return [Slot(role.name, "gender", dict(zip(_texts(pronouns, *form), ("he", "she"))))]
            attribute, words = ("kind", lists[kinds]) if node.aspect else ("name", lists[female] + lists[male])
            return [Slot(role.name, attribute, _texts(words, *form))]
        nouns = tuple(noun for name in role.lists for noun in lists[name])
        if role.sort == "place":
            before = {"": "", "to": "to the "}.get(node.aspect)
            texts = [(f"{self.book.prepositions[noun]} the " if before is None else before) + noun for noun in nouns]
            return [Slot(role.name, "place", dict(zip(_texts(tuple(texts), *form), nouns)))]
        looks = tuple(sorted({look for noun in nouns for look in self.book.looks[noun]}))
        look = Slot(role.name, "look", _texts(looks, *form))
        noun = Slot(role.name, "noun", _texts(nouns, *(("", False) if node.aspect else form)))
        return {"": [noun], "look": [look], "full": [look, " ", noun]}[node.aspect]

    def beginnings(self, beat: int) -> frozenset[Position]:
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

    def followed(self, reading: Reading, sentence: str, matches: Sequence[Match] | None) -> Iterator[Reading]:
        """The reading with one more sentence, in each way; `matches`: in this plot, None if no plot has the sentence."""
        step = {"sentences": reading.sentences + 1, "possible": reading.possible + (matches is not None)}
        if not matches:
            fault = Fault("sentence" if matches is None else "plot", sentence)
            yield replace(reading, **step, is_lost=True, next=frozenset(), faults=(*reading.faults, fault))
        for position, said in matches or ():
            known = dict(reading.known)
            kinds = [self._contradiction(known, *one) for one in said]
            if any(attribute == "noun" for _, attribute, _ in said):
                kinds = ["owner" if kind == "person" else kind for kind in kinds]
            if position not in reading.next and not (reading.is_lost and position > reading.last):
                kinds.append("order")
            faults = tuple(Fault(kind, sentence) for kind in dict.fromkeys(kinds) if kind)
            where = {"next": self.after(position), "last": position, "is_lost": False}
            yield replace(reading, **step, **where, faults=reading.faults + faults, known=known)

    def _contradiction(self, known: dict[tuple[str, str], str], role: str, attribute: str, word: str) -> str:
        """Remember what a sentence says of a role; the kind of fault if it contradicts what is known, else ""."""
        if attribute == "new word":
            known[role, "word"] = word
            return ""
        others = {known[key] for key in known if key[0] != role and key[1] in DISTINCT}
        is_new = (role, attribute) not in known
        before = known.setdefault((role, attribute), word)
        if before != word or (is_new and word in others and attribute in DISTINCT and word not in CHILDREN):
            is_stranger = attribute == "name" and word not in others
            return "stranger" if is_stranger else FAULT_OF.get(attribute, attribute)
        noun, look = known.get((role, "noun")), known.get((role, "look"))
        if attribute in ("noun", "look") and noun and look and look not in self.book.looks[noun]:
            return "look"
        gender = "she" if word in self.female else "he" if word in self.male else ""
        if attribute in ("name", "kind") and gender:
            return "kind" if known.setdefault((role, "gender"), gender) != gender else ""
        return ""


@functools.cache
def _texts(words: tuple[str, ...], article: str, capital: bool) -> dict[str, str]:
    """Each word as it stands in a text → the word."""
    return {dress(word, article, capital): word for word in words}


class Known(NamedTuple):
    """A sentence of the library: its parts, the longest fixed text of them, and where it stands in each plot."""

    fixed: str
    parts: list[Part]
    places: list[tuple[int, Position]]  # number of the plot, position in it


@functools.cache
def _scripts() -> tuple[list[Script], list[Known]]:
    """The plots and their sentences; those of fragments stand in many plots."""
    library = load_library()
    scripts = [Script(plot, library.book) for plot in library.plots]
    known: dict[object, Known] = {}
    for number, script in enumerate(scripts):
        for beat, ways in enumerate(script.beats):
            for way, sentences in enumerate(ways):
                for place, parts in enumerate(sentences):
                    fixed = max((part for part in parts if isinstance(part, str)), key=len, default="")
                    one = known.setdefault(_key(parts), Known(fixed, parts, []))
                    one.places.append((number, (beat, way, place)))
    return scripts, [*known.values()]


def _key(part: object) -> object:
    """Equal for equal parts (the words of equal lists are one object, see `_texts`)."""
    if isinstance(part, list):
        return tuple(map(_key, part))
    return (part.role, part.attribute, *part.words) if isinstance(part, Slot) else part


def read_story(text: str) -> Reading:
    """The reading of a story with the fewest faults."""
    scripts, known = _scripts()
    sentences = SENTENCE_END.split(text.strip())
    found: list[dict[int, list[Match]]] = []
    for sentence in sentences:
        matches: dict[int, list[Match]] = {}
        for fixed, parts, places in known:
            if fixed in sentence:
                for said in _matches(parts, sentence):
                    for number, position in places:
                        matches.setdefault(number, []).append(Match(position, said))
        found.append(matches)
    votes = Counter(number for matches in found for number in matches)
    readings = [_read(scripts[number], number, sentences, found) for number, _ in votes.most_common(PLOTS) or [(0, 0)]]
    return min(readings, key=lambda reading: len(reading.faults))


def _read(script: Script, number: int, sentences: Sequence[str], found: Sequence[dict[int, list[Match]]]) -> Reading:
    readings = [Reading(script.plot.name, script.beginnings(0))]
    for sentence, matches in zip(sentences, found):
        here = matches.get(number, []) if matches else None
        further = (one for reading in readings for one in script.followed(reading, sentence, here))
        readings = heapq.nsmallest(READINGS, further, key=lambda reading: len(reading.faults))
    end = Fault("end", sentences[-1])
    ended = [
        reading if (len(script.beats), 0, 0) in reading.next else replace(reading, faults=(*reading.faults, end))
        for reading in readings
    ]
    return min(ended, key=lambda reading: len(reading.faults))


def _matches(parts: Sequence[Part], text: str) -> Iterator[Said]:
    """Every way to read a text as these parts: what it says of each role."""
    if not parts:
        if not text:
            yield []
        return
    part, rest = parts[0], parts[1:]
    if isinstance(part, str):
        if text.startswith(part):
            yield from _matches(rest, text[len(part) :])
    elif isinstance(part, Slot):
        for end in _ends(text, rest):
            word = part.words.get(text[:end])
            if word is not None:
                said = [(part.role, part.attribute, word)] if part.role else []
                yield from (said + more for more in _matches(rest, text[end:]))
    else:
        for option in part:
            yield from _matches([*option, *rest], text)


def _ends(text: str, rest: Sequence[Part]) -> list[int]:
    """Where a gap at the beginning of a text may end, if `rest` follows it."""
    if not rest:
        return [len(text)]
    ends = re.finditer(re.escape(rest[0]), text) if isinstance(rest[0], str) else WORD_END.finditer(text)
    return [end.start() for end in itertools.islice(ends, MOST_ENDS)]


def _sentences(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of a way to tell a beat, cut into sentences as `SENTENCE_END` cuts the text."""
    sentences: list[list[Part]] = [[]]
    for part, following in itertools.zip_longest(parts, parts[1:], fillvalue="a"):
        if not isinstance(part, str):
            sentences[-1].append(part)
            continue
        # A letter stands for what follows, since a sentence ends only before a capital or a quotation mark.
        first, *others = SENTENCE_END.split(part + ("A" if _beginning(following).isupper() else "a"))
        sentences[-1].append(first)
        sentences += [[other] for other in others]
        sentences[-1][-1] = sentences[-1][-1][:-1]
    if sentences[0] and isinstance(sentences[0][0], str):
        sentences[0][0] = sentences[0][0].removeprefix(" ")
    cleaned = [[part for part in sentence if part != ""] for sentence in sentences]
    return [sentence for sentence in cleaned if sentence]


def _beginning(part: Part) -> str:
    """A character that the part may begin with."""
    if isinstance(part, Slot):
        return next(iter(part.words))[0]
    if isinstance(part, list):
        return _beginning(part[-1][0])
    return part[0]


def _is_beat(node: Node) -> bool:
    """Whether a plot's node is the choice between the ways of a beat: each of them begins with a space, or is empty."""
    return isinstance(node, Alternatives) and all(str(option[0])[0] == " " for option in node.options if option)


def _slots(nodes: Iterable[Node]) -> Iterator[WordSlot]:
    """All slots for words in a template."""
    for node in nodes:
        if isinstance(node, WordSlot):
            yield node
        elif isinstance(node, Alternatives):
            yield from _slots(itertools.chain(*node.options))
