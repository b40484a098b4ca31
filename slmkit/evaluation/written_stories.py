"""Stories that a model wrote: are they consistent by the generator's rules, and are they new?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from slmkit.data.stories import tell_many
from slmkit.data.stories.reader import CONTRADICTIONS, FAULTS, read_story
from slmkit.data.stories.words import WHOLE
from slmkit.evaluation.results import Item

TRAINING_STORIES = 10_000  # the first of the training stream 0, with which the stories are compared
COPIED = 8  # words in a row from which on they count as copied
GOOD = "consistent", "no_contradiction", "possible_sentences", f"novel_{COPIED}grams", "distinct_2", "distinct_4"
BAD = *(f"fault_{kind}" for kind in FAULTS), "verbatim", "longest_copy"  # longest_copy: words
METRICS = dict.fromkeys(GOOD, "mean") | dict.fromkeys(BAD, "loss")  # → their form in a `TaskResult`
Gram = tuple[str, ...]


class TrainingStories:
    """The training stories, and where in them the runs of `COPIED` words of some `texts` stand."""

    def __init__(
        self, texts: Sequence[str], progress: Callable[[int, int], None], world: float = WHOLE
    ) -> None:  # fmt: skip
        wanted = {gram for text in texts for gram in grams(text, COPIED)}
        self.texts, self.where, places = set[str](), dict[Gram, list[int]](), itertools.count()
        for done, story in enumerate(tell_many(0, TRAINING_STORIES, world=world), start=1):
            self.texts.add(story.text)
            for place, gram in zip(places, grams(story.text, COPIED)):  # leaves out one place behind each story
                if gram in wanted:
                    self.where.setdefault(gram, []).append(place)
            if not done % 500:
                progress(done, TRAINING_STORIES)

    def copied(self, text: str) -> list[int]:
        """For each run of `COPIED` words of the text, the words of the longest copied run that ends with it, or 0."""
        runs: list[int] = []
        lengths: dict[int, int] = {}  # place → words of the run that ends there
        for gram in grams(text, COPIED):
            lengths = {place: lengths.get(place - 1, COPIED - 1) + 1 for place in self.where.get(gram, ())}
            runs.append(max(lengths.values(), default=0))
        return runs


def grams(text: str, n: int) -> Iterator[Gram]:
    """All runs of n words of a text."""
    words = text.split()
    return zip(*(words[start:] for start in range(n)))


def story_items(stories: Sequence[str | None], training: TrainingStories, given: int) -> list[Item]:
    """An item for each story, by number, with the `METRICS`; None is left out.

    Of each story the first `given` sentences are not the model's, and do not count as possible sentences. A new n-gram
    counts for the first story that has it, so that distinct-n is the number of n-grams by the number of their
    occurrences in all stories.
    """
    items, known = [], {2: set[Gram](), 4: set[Gram]()}
    for number, text in enumerate(stories):
        if text is None:
            continue
        reading, runs = read_story(text), training.copied(text)
        faults = {fault.kind: fault.sentence for fault in reversed(reading.faults)}  # the first of each kind
        values = {
            "consistent": (not faults, 1),
            "no_contradiction": (faults.keys().isdisjoint(CONTRADICTIONS), 1),
            "possible_sentences": (max(0, reading.possible - given), reading.sentences - given),
            "verbatim": (text.strip() in training.texts, 1),
            "longest_copy": (max(runs, default=0), 1),
            f"novel_{COPIED}grams": (runs.count(0), len(runs)),
        } | {f"fault_{kind}": (kind in faults, 1) for kind in FAULTS}
        for n, seen in known.items():
            told = [*grams(text, n)]
            values[f"distinct_{n}"] = len({*told} - seen), len(told)
            seen.update(told)
        figures = {name: (float(a), float(b)) for name, (a, b) in values.items()}
        items.append(Item(str(number), figures, {"story": text, "plot": reading.plot, "faults": faults}))
    return items
