"""Batches from streamed sources: rows mixed by a schedule, prefetched in the background.

Streams are sequential, so a batch is reached from a saved position or from the beginning. Every process reads the whole
stream and takes its share of each batch, which makes the order independent of the number of processes.
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

AHEAD = 2  # batches to prefetch


@dataclass(frozen=True)
class _Made:
    """A step's rows, None after the end of the data, and the position after them."""

    rows: list[Row] | None
    position: dict[str, Any]


class StreamedBatches:
    """Implements `Batches` over `StreamedRows` by source name; not thread-safe."""

    def __init__(
        self,
        sources: Mapping[str, StreamedRows],
        phases: Sequence[Phase],
        when_exhausted: WhenExhausted,
        rows_per_step: int,
        separate: bool = False,
        origins: Sequence[Source] = (),
    ) -> None:
        """`origins`: sources whose counts of skipped and cut rows are reported."""
        self.origins = origins
        self.sources, self.phases, self.when_exhausted = dict(sources), phases, when_exhausted
        self.rows_per_step, self.separate = expect_a_row(rows_per_step), separate
        self.total_rows: int | None = None
        self.rows_in_epoch: int | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: dict[int, Future[_Made]] = {}  # from the last returned step on
        self.seek(0, {})

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows [rows, length] as in `Batches`. The next steps are prefetched; any other needs reading up to it.

        Raises `UserError` for unreadable data, and `IndexError` for a step after the end of the data.
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
        """Share of each source in all rows before `step`, which is at most the next one."""
        names = list(self.sources)
        return shares_of(names, self._schedule.counts(step * self.rows_per_step)) if len(names) > 1 else {}

    def report(self) -> list[str]:
        """One line for each kind of documents left out or cut since the last `seek`, counted once per reading."""
        return [line for source in self.origins for line in source.report()]

    def position(self) -> dict[str, Any]:
        return self._position

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Continue with `step` at its saved position; if that is empty, read up to it from the beginning."""
        for future in self._coming.values():
            future.cancel()
        self._worker.submit(self._seek, position).result()  # runs after the worker's current task
        self._coming, self._position = {}, position
        self._next = step if position else 0  # the worker's next step

    def _made(self, step: int) -> _Made:
        if step not in self._coming and step < self._next:
            self.seek(0, {})
        while self._next <= step + AHEAD:
            self._coming[self._next] = self._worker.submit(self._make, self._next)
            if self._next < step - AHEAD:  # skipped
                self._coming.pop(self._next).result()
            self._next += 1
        return self._coming[step].result()

    # -- in the worker's thread ---------------------------------------------------------------------------------------

    def _seek(self, position: dict[str, Any]) -> None:
        self._sizes: dict[str, int] = dict(position.get("sizes", {}))  # rows of the sources that have ended
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
            if made is None:  # now its size is known: the schedule applies from this row on
                self._sizes[name] = int(number[0])
                self._plan()
            else:
                rows.append(made)
        positions = {name: source.position() for name, source in self.sources.items()}
        return _Made(rows, {"sources": positions, "sizes": dict(self._sizes)})
