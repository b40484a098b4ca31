"""Batches from streamed sources: rows in the turns of a schedule, made a little ahead in the background.

All of it is sequential, so that a batch is a function of (seed, step) by being reached from a position: the one saved
in a checkpoint, or the beginning. Every process walks the whole stream and takes its share of each batch, which makes
the order independent of their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from slmkit.data.batch import Batch
from slmkit.data.mixture import Phase, Schedule, WhenExhausted
from slmkit.data.sources import Source
from slmkit.data.stream import expect_a_row, share_of_rank, shares_of
from slmkit.data.streaming.rows import Row, StreamedRows

AHEAD = 2  # batches made before they are asked for


@dataclass(frozen=True)
class _Made:
    """A step's rows, None where the data ended before; `position` and `counts` are those behind them."""

    rows: list[Row] | None
    position: dict[str, Any]


class StreamedBatches:
    """Implements `Batches` over `StreamedRows` by source name; not to be shared between threads."""

    def __init__(
        self,
        sources: Mapping[str, StreamedRows],
        phases: Sequence[Phase],
        when_exhausted: WhenExhausted,
        rows_per_step: int,
        separate: bool = False,
        origins: Sequence[Source] = (),
    ) -> None:
        """`origins` count what of the rows in them is left out or cut."""
        self.origins = origins
        self.sources, self.phases, self.when_exhausted = dict(sources), phases, when_exhausted
        self.rows_per_step, self.separate = expect_a_row(rows_per_step), separate
        self.total_rows: int | None = None
        self.rows_in_epoch: int | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: dict[int, Future[_Made]] = {}  # from the step that was given last
        self.seek(0, {})

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """As in `Batches`. The step behind the last one is at hand; any other is walked to.

        Raises `UserError` for what cannot be read, and `IndexError` for a step that the data does not reach.
        """
        mine = share_of_rank(self.rows_per_step, rank, world)
        made = self._made(step)
        if made.rows is None:
            raise IndexError(f"the data ends before step {step}")
        self._position = made.position
        for behind in [known for known in self._coming if known < step]:
            del self._coming[behind]
        ids, labels, documents = (np.stack(column) for column in zip(*made.rows[mine]))  # int64 [rows, length] each
        return Batch.of(ids, labels, documents if self.separate else None)

    def has(self, step: int) -> bool:
        return self._made(step).rows is not None

    def shares(self, step: int) -> dict[str, float]:
        """Of all rows before `step`, which must not be beyond the next one."""
        names = list(self.sources)
        return shares_of(names, self._schedule.counts(step * self.rows_per_step)) if len(names) > 1 else {}

    def report(self) -> list[str]:
        """What was left out or cut, a line each: all that was read since the last `seek`, as often as it was read."""
        return [line for source in self.origins for line in source.report()]

    def position(self) -> dict[str, Any]:
        return self._position

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Go on with `step` at a position that was saved for it; with an empty one, walk there from the beginning."""
        for future in self._coming.values():
            future.cancel()
        self._worker.submit(self._seek, position).result()  # behind what the worker may still be at
        self._coming, self._position = {}, position
        self._next = step if position else 0  # the step that the worker makes next

    def _made(self, step: int) -> _Made:
        if step not in self._coming and step < self._next:
            self.seek(0, {})
        while self._next <= step + AHEAD:
            self._coming[self._next] = self._worker.submit(self._make, self._next)
            if self._next < step - AHEAD:  # only walked over
                self._coming.pop(self._next).result()
            self._next += 1
        return self._coming[step].result()

    # -- in the worker's thread ---------------------------------------------------------------------------------------

    def _seek(self, position: dict[str, Any]) -> None:
        self._sizes: dict[str, int] = dict(position.get("sizes", {}))  # rows of the sources that have run out
        self._plan()
        for origin in self.origins:
            origin.count_anew()
        for name, source in self.sources.items():
            source.seek(position.get("sources", {}).get(name, {}))

    def _plan(self) -> None:
        sizes = [self._sizes.get(name) for name in self.sources]
        self._schedule = Schedule(self.phases, sizes, self.when_exhausted)

    def _make(self, step: int) -> _Made:
        rows: list[Row] = []
        names = list(self.sources)
        while len(rows) < self.rows_per_step:
            row = step * self.rows_per_step + len(rows)
            if self._schedule.total is not None and row >= self._schedule.total:
                return _Made(None, {})
            which, number = self._schedule.locate(np.array([row]))
            name = names[int(which[0])]
            made = self.sources[name].next_row()
            if made is None:  # its size is known now: from this very row on the rule has it
                self._sizes[name] = int(number[0])
                self._plan()
            else:
                rows.append(made)
        positions = {name: source.position() for name, source in self.sources.items()}
        return _Made(rows, {"sources": positions, "sizes": dict(self._sizes)})
