"""Reads a story by the generator's own rules: what it could have written, and what contradicts the rest of the story.

A story is read with each plot that it may have, and the reading with the fewest faults counts. A reading follows the
plot from sentence to sentence and remembers what each role was called: name, kind, gender, noun, look, place. A story
without a fault is one that the generator can tell, whichever split its hero and thing belong to.
"""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from slmkit.data.stories.script import load_library
from slmkit.data.stories.sentences import SENTENCE_END, Position, Said, Script, all_scripts, matches
from slmkit.data.stories.teller import CHARACTERS, CHILDREN

PLOTS = 4  # with which a story is read: those that most of its sentences belong to
STATES = 12  # kept after each sentence
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


class Fault(NamedTuple):
    """A kind of fault (a key of `FAULTS`), and the sentence in which it shows."""

    kind: str
    sentence: str


class Reading(NamedTuple):
    """A story read with a plot. Of its `sentences`, `possible` could be the generator's, in some plot."""

    plot: str
    faults: tuple[Fault, ...]
    sentences: int
    possible: int


@dataclass(frozen=True)
class State:
    """What is known after some sentences."""

    next: frozenset[Position] | None  # where the next sentence may stand; None: the last was none of the plot's
    last: Position = (-1, 0, 0)
    faults: tuple[Fault, ...] = ()
    known: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (role, attribute) → word

    def at_fault(self, kind: str, sentence: str) -> State:
        return State(None, self.last, (*self.faults, Fault(kind, sentence)), self.known)


def read_story(text: str) -> Reading:
    """The reading of a story with the fewest faults."""
    sentences = SENTENCE_END.split(text.strip())
    found = [matches(sentence) for sentence in sentences]
    plots = Counter(number for places in found for number in places).most_common(PLOTS) or [(0, 0)]
    possible = sum(map(bool, found))
    readings = []
    for number, _ in plots:
        script = all_scripts()[0][number]
        states = [State(script.beginnings())]
        for sentence, places in zip(sentences, found):
            further = (new for state in states for new in _followed(script, state, sentence, places.get(number, ())))
            if number not in places:
                further = (state.at_fault("plot" if places else "sentence", sentence) for state in states)
            states = heapq.nsmallest(STATES, further, key=lambda state: len(state.faults))
        end = (len(script.beats), 0, 0)
        states = [one if end in (one.next or ()) else one.at_fault("end", sentences[-1]) for one in states]
        faults = min((state.faults for state in states), key=len)
        readings.append(Reading(script.plot.name, faults, len(sentences), possible))
    return min(readings, key=lambda reading: len(reading.faults))


def _followed(script: Script, state: State, sentence: str, places: Sequence[tuple[Position, Said]]) -> Iterator[State]:
    """The state after one more sentence, for each place in the plot where it may stand."""
    for position, said in places:
        known = dict(state.known)
        kinds = [_contradiction(script, known, *one) for one in said]
        if any(attribute == "noun" for _, attribute, _ in said):
            kinds = ["owner" if kind == "person" else kind for kind in kinds]
        follows = position > state.last if state.next is None else position in state.next
        kinds.append("" if follows else "order")
        faults = tuple(Fault(kind, sentence) for kind in dict.fromkeys(kinds) if kind)
        yield State(script.after(position), position, state.faults + faults, known)


def _contradiction(script: Script, known: dict[tuple[str, str], str], role: str, attribute: str, word: str) -> str:
    """Remember what a sentence says of a role; the kind of fault if it contradicts what is known, else ""."""
    if attribute == "new word":
        known[role, "word"] = word
        return ""
    others = {known[key] for key in known if key[0] != role and key[1] in DISTINCT}
    is_taken = (role, attribute) not in known and attribute in DISTINCT and word in others and word not in CHILDREN
    if known.setdefault((role, attribute), word) != word or is_taken:
        is_stranger = attribute == "name" and word not in others
        return "stranger" if is_stranger else FAULT_OF.get(attribute, attribute)
    noun, look = known.get((role, "noun")), known.get((role, "look"))
    if attribute in ("noun", "look") and noun and look and look not in script.book.looks[noun]:
        return "look"
    gender = _genders().get(word, "") if attribute in ("name", "kind") else ""
    return "kind" if gender and known.setdefault((role, "gender"), gender) != gender else ""


@functools.cache
def _genders() -> dict[str, str]:
    """Pronouns of names, girls and boys."""
    lists = load_library().book.lists
    both = [(lists[name], pronoun) for _, *names in CHARACTERS.values() for name, pronoun in zip(names, ("she", "he"))]
    return {name: pronoun for names, pronoun in both for name in names} | {"girl": "she", "boy": "he"}
