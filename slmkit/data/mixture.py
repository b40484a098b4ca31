"""The source of each training row: weights, phases of weights (a curriculum), and what happens when a source ends.

Within a phase, of the first n rows each source has its weight times n, to within a row or two. This order is periodic,
so that the source of any row, and how many rows of that source precede it, follow in closed form: no step needs a
replay.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from slmkit.config import Settings, UserError, did_you_mean

PERIOD = 10_000  # approximate rows in a period: shares are exact to 0.01 %


class Schedule:
    """The source of every row, and its index among the rows of that source.

    `sizes`: rows of each source; None if not known (yet). At the end of a source: `stop` ends all rows; `repeat` starts
    its next epoch; `redistribute` gives its weight to the phase's other sources in proportion to theirs, and ends all
    rows if none has any left.
    """

    def __init__(self, phases: Sequence[Phase], sizes: Sequence[int | None], when_exhausted: WhenExhausted) -> None:
        self._segments: list[_Segment] = []  # of rows with one table
        self.total: int | None = None  # number of rows; None if endless
        before = np.zeros(len(sizes), dtype=np.int64)
        start = 0
        for until, weights in phases:
            left = np.array(weights, dtype=np.float64)
            while until is None or start < until:
                if when_exhausted == "redistribute":
                    left[np.array([size is not None and count >= size for size, count in zip(sizes, before)])] = 0
                if not left.any():
                    self.total = start
                    return
                segment = _Segment(start, before, left)
                self._segments.append(segment)
                end = None if when_exhausted == "repeat" else segment.first_missing(sizes)
                if end is None or (until is not None and end >= until):
                    end = until
                elif when_exhausted == "stop":
                    self.total = end
                    return
                if end is None:
                    return
                start, before = end, segment.counts(end)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row, and its index in that source: int64 [n] → int64 [n] each."""
        rows = np.asarray(rows, dtype=np.int64)
        starts = [segment.start for segment in self._segments]
        sources, numbers = np.empty_like(rows), np.empty_like(rows)
        which = np.searchsorted(starts, rows, side="right") - 1
        for index in np.unique(which).tolist():
            here = which == index
            sources[here], numbers[here] = self._segments[index].locate(rows[here])
        return sources, numbers

    def counts(self, row: int) -> np.ndarray:
        """The number of rows of each source before `row`: int64 [sources]."""
        index = bisect_right(self._segments, row, key=lambda segment: segment.start) - 1
        return self._segments[max(0, index)].counts(row)


class _Segment:
    """Rows from `start` on that follow one periodic table of sources."""

    def __init__(self, start: int, before: np.ndarray, weights: np.ndarray) -> None:
        self.start, self.before = start, before  # rows of each source before `start`: int64 [sources]
        self.order = turns(weights)  # the source of each row of a period
        self.period_counts = np.bincount(self.order, minlength=len(weights))
        self.numbers = np.empty_like(self.order)  # index of each row among its source's in the period
        for source in np.unique(self.order):
            here = self.order == source
            self.numbers[here] = np.arange(here.sum())

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # int64 [n] → [n] each
        periods, places = np.divmod(rows - self.start, len(self.order))
        sources = self.order[places]
        return sources, self.before[sources] + periods * self.period_counts[sources] + self.numbers[places]

    def counts(self, row: int) -> np.ndarray:  # int64 [sources]
        periods, place = divmod(row - self.start, len(self.order))
        begun = np.bincount(self.order[:place], minlength=len(self.before))
        return self.before + periods * self.period_counts + begun

    def first_missing(self, sizes: Sequence[int | None]) -> int | None:
        """The first row whose source has ended; None if there is none."""
        missing = []
        for source, size in enumerate(sizes):
            if size is not None and self.period_counts[source]:
                periods, number = divmod(size - int(self.before[source]), int(self.period_counts[source]))
                place = int(np.flatnonzero(self.order == source)[number])
                missing.append(self.start + periods * len(self.order) + place)
        return min(missing, default=None)


def turns(weights: np.ndarray) -> np.ndarray:
    """The source of each row of a period, mixed as evenly as possible: float64 [sources] → int64 [period].

    The j-th of a source's n rows is due at (j + ½) / n of the period, and rows are sorted by when they are due (stride
    scheduling: Waldspurger and Weihl, 1995).
    """
    shares = weights / weights.sum()
    counts = np.where(shares > 0, np.maximum(1, np.rint(shares * PERIOD)), 0).astype(np.int64)
    counts //= np.gcd.reduce(counts)
    due = np.concatenate([(np.arange(count) + 0.5) / max(1, count) for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]


WhenExhausted = Literal["stop", "repeat", "redistribute"]


class PhaseSettings(Settings):
    """Weights by source name, until a number of tokens has been seen since the run began; the last phase has no end."""

    until_tokens: int | None = Field(None, gt=0)  # where the phase ends, in tokens seen
    weights: dict[str, float]  # source name: weight


class Phase(NamedTuple):
    """`until`: one past the last row, None if endless. `weights`: one per source, in order."""

    until: int | None
    weights: tuple[float, ...]


def plan_phases(settings: Sequence[PhaseSettings], weights: Mapping[str, float], length: int) -> list[Phase]:
    """Phases in rows of `length` tokens; without settings, one endless phase with the sources' own `weights` by name.

    Raises `UserError` for phases out of order, unknown sources, and weights that are negative or all zero.
    """
    if not settings:
        settings = [PhaseSettings(weights=dict(weights))]
    phases: list[Phase] = []
    for number, phase in enumerate(settings, start=1):
        where = f"data.phases: phase {number}"
        for name, weight in phase.weights.items():
            if name not in weights:
                raise UserError(f"{where}: no source is named {name!r}; {did_you_mean(name, weights)}")
            if not 0 <= weight < float("inf"):
                raise UserError(f"{where}: expected a weight of 0 or more for {name!r}, found {weight}")
        if not any(phase.weights.values()):
            raise UserError(f"{where}: all weights are 0, so that nothing would be read; give one source a weight")
        is_last = number == len(settings)
        if phase.until_tokens is None and not is_last:
            raise UserError(f"{where}: only the last phase may have no end; set until_tokens of this one")
        until = None if is_last or phase.until_tokens is None else round(phase.until_tokens / length)
        if until is not None and until <= (phases[-1].until or 0 if phases else 0):
            raise UserError(f"{where}: until_tokens {phase.until_tokens:,} is not more than that of the phase before")
        phases.append(Phase(until, tuple(phase.weights.get(name, 0.0) for name in weights)))
    return phases
