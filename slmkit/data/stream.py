"""What the model is fed: rows of token shards, and batches of rows as a pure function of (seed, step).

Rows know nothing of order and epochs, the stream nothing of tokens: whatever has `rows_in_epoch` and `row(i)` is fed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from slmkit.config import UserError
from slmkit.data.batch import Batch, stacked
from slmkit.data.mixture import Phase, Schedule, WhenExhausted
from slmkit.data.order import mixed_seed, permuted
from slmkit.data.packing import IGNORED, numbered, pack_whole, padded, row_of_labels, windows
from slmkit.data.prepare.conversations import OnLong
from slmkit.data.shards.reader import TokenShards


class Rows(Protocol):
    """Numbered rows of ids and labels, int64 [length] each: `labels[t]` follows `ids[t]`, or is -100: not learned.

    `documents` [length] numbers the documents of a row: two tokens of one have the same number.
    """

    @property
    def rows_in_epoch(self) -> int: ...

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...

    def documents(self, index: int) -> np.ndarray: ...

    def rows(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of several: int64 [rows, length] each. One by one, where nothing faster is known."""
        ids, labels = zip(*map(self.row, indices))
        return np.stack(ids), np.stack(labels)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some of them, with all that an objective wants."""
        return Batch.of(*self.rows([*indices]), extra=stacked([self.extra(index) for index in indices]))

    def report(self) -> list[str]:
        """What of the documents is left out or cut, a line each; nothing, unless a class says so."""
        return []

    def extra(self, index: int) -> dict[str, np.ndarray]:
        """What an objective wants of a row besides, such as a teacher's logits; nothing, unless a class says so."""
        return {}


class Batches(Protocol):
    """What the loop is fed: the batch of any step, and a position that goes into every checkpoint."""

    rows_per_step: int
    separate: bool  # batches say which document each token belongs to, so that none is read across a border

    @property
    def total_rows(self) -> int | None:
        """How many rows there are until the data ends; None where it never does, or where nobody knows yet."""

    @property
    def rows_in_epoch(self) -> int | None:
        """None where that is not known."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows of step `step` (from 0), or the contiguous share of them that falls to one of `world` ranks.

        Raises `UserError` when a step has fewer rows than there are ranks.
        """

    def has(self, step: int) -> bool:
        """Whether there is a batch for this step: False where the data has ended."""

    def shares(self, step: int) -> dict[str, float]:
        """Of all rows before `step`, the share of each source; empty where there is one source alone."""

    def position(self) -> dict[str, Any]:
        """Where to go on after the batch that was given last, as JSON; empty where the step says it all."""

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Go on with `step`, at a position that was saved; from the beginning where it is empty."""


def share_of_rank(rows_per_step: int, rank: int, world: int) -> slice:
    """Which of a step's rows fall to one of `world` ranks. Raises `UserError` where there are more ranks than rows."""
    if rows_per_step < world:
        raise UserError(
            f"{rows_per_step} rows a step cannot be shared by {world} processes; "
            "raise tokens_per_step or start fewer processes"
        )
    return slice(*(rows_per_step * part // world for part in (rank, rank + 1)))


def expect_a_row(rows_per_step: int) -> int:
    """Raises `UserError` for less than one row a step."""
    if rows_per_step < 1:
        raise UserError(f"expected at least one row a step, found {rows_per_step}; raise tokens_per_step")
    return rows_per_step


class Stream:
    """The endless sequence of epochs over `rows`, each shuffled by (seed, epoch). Its only position is the step."""

    def __init__(self, source: Rows, rows_per_step: int, seed: int = 0, separate: bool = False) -> None:
        self.source, self.rows_per_step, self.seed, self.separate = source, expect_a_row(rows_per_step), seed, separate
        self.rows_in_epoch: int | None = source.rows_in_epoch
        self.total_rows: int | None = None

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """As in `Batches`, and a pure function of its arguments."""
        places = np.arange(self.rows_per_step, dtype=np.int64)[share_of_rank(self.rows_per_step, rank, world)]
        chosen = self._rows_at(step * self.rows_per_step + places)
        parts = [rows.rows(indices) for rows, indices, _ in chosen]
        documents = [rows.documents(index) for rows, indices, _ in chosen for index in indices] if self.separate else []
        extras = [rows.extra(index) for rows, indices, _ in chosen for index in indices]
        if len(chosen) == 1:
            return Batch.of(*parts[0], np.stack(documents) if documents else None, stacked(extras))
        order = np.argsort(np.concatenate([place for _, _, place in chosen]))  # from source after source to their turns
        ids, labels = (np.concatenate(column)[order] for column in zip(*parts))
        extras = [extras[place] for place in order]
        return Batch.of(ids, labels, np.stack(documents)[order] if documents else None, stacked(extras))

    def has(self, step: int) -> bool:
        return self.total_rows is None or (step + 1) * self.rows_per_step <= self.total_rows

    def shares(self, step: int) -> dict[str, float]:
        return {}

    def report(self) -> list[str]:
        """What of the documents is left out or cut, a line each."""
        return self.source.report()

    def position(self) -> dict[str, Any]:
        return {}

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Nothing to do: every batch is as near as any other."""

    def _rows_at(self, positions: np.ndarray) -> list[tuple[Rows, list[int], np.ndarray]]:
        """What stands at `positions` of the endless sequence: by source, which of its rows, and at which of them."""
        return [(self.source, shuffled(positions, self.source.rows_in_epoch, self.seed), np.arange(len(positions)))]


class MixtureStream(Stream):
    """Rows of several sources in the turns of a schedule, each source an endless sequence of shuffled epochs."""

    def __init__(
        self,
        sources: Mapping[str, Rows],
        phases: Sequence[Phase],
        when_exhausted: WhenExhausted,
        rows_per_step: int,
        seed: int = 0,
        separate: bool = False,
    ) -> None:
        self.names, self.sources = list(sources), list(sources.values())
        sizes = [source.rows_in_epoch for source in self.sources]
        self.schedule = Schedule(phases, sizes, when_exhausted)
        self.seeds = [mixed_seed(seed, name) for name in self.names]  # sources of one size differ in their order too
        self.rows_per_step, self.separate = expect_a_row(rows_per_step), separate
        self.total_rows = self.schedule.total
        self.rows_in_epoch = sum(sizes) if self.total_rows is None else self.total_rows

    def shares(self, step: int) -> dict[str, float]:
        return shares_of(self.names, self.schedule.counts(step * self.rows_per_step))

    def report(self) -> list[str]:
        return [f"{name}: {line}" for name, rows in zip(self.names, self.sources) for line in rows.report()]

    def _rows_at(self, positions: np.ndarray) -> list[tuple[Rows, list[int], np.ndarray]]:
        which, numbers = self.schedule.locate(positions)
        chosen = []
        for number in np.unique(which).tolist():
            here, source = np.flatnonzero(which == number), self.sources[number]
            indices = shuffled(numbers[here], source.rows_in_epoch, self.seeds[number])
            chosen.append((source, indices, here))
        return chosen


def shares_of(names: Sequence[str], counts: np.ndarray) -> dict[str, float]:
    """Counts of rows as shares of their sum, rounded to what a log should show."""
    return {name: round(float(count) / max(1, int(counts.sum())), 5) for name, count in zip(names, counts)}


def shuffled(positions: np.ndarray, size: int, seed: int) -> list[int]:
    """Which of `size` rows stand at `positions` of their endless sequence of epochs."""
    epochs, places = positions // size, positions % size
    indices = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = permuted(places[here], size, seed, epoch)
    return indices.tolist()


class PretrainRows(Rows):
    """Windows that fill `length` from end to end, over document borders; every label is learned."""

    def __init__(self, shards: TokenShards, length: int) -> None:
        """Raises `UserError` when there are not tokens enough for one row."""
        if length < 1:
            raise UserError(f"expected a sequence_length of at least 1, found {length}")
        self.shards, self.length = shards, length
        self.starts = windows(len(shards), length)
        if not self.starts:
            raise UserError(
                f"{len(shards):,} tokens are too few for one sequence, which needs {length + 1:,}; "
                "lower sequence_length or add text"
            )

    @property
    def rows_in_epoch(self) -> int:
        return len(self.starts)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = self.starts[index]
        tokens = self.shards.tokens_in(start, start + self.length + 1).astype(np.int64)
        return tokens[:-1], tokens[1:]

    def rows(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """As `row`, but read into one place and made int64 in one go: several times as fast."""
        tokens = self.shards.runs([self.starts[index] for index in indices], self.length + 1)
        both = np.empty((2, len(indices), self.length), dtype=np.int64)  # one block: memory that the allocator keeps
        both[0], both[1] = tokens[:, :-1], tokens[:, 1:]
        return both[0], both[1]

    def documents(self, index: int) -> np.ndarray:
        positions = self.starts[index] + np.arange(self.length)
        return np.searchsorted(self.shards.document_ends, positions, side="right")


class ChatRows(Rows):
    """Whole conversations packed side by side, padded behind; only what their masks say is learned.

    `truncated` conversations are longer than a row, and are cut at its end unless `on_long` says otherwise;
    `untrained` ones have nothing to learn in what is left of them, and are skipped.
    """

    def __init__(self, shards: TokenShards, length: int, on_long: OnLong = "cut") -> None:
        """Raises `UserError` when not one conversation has anything to learn, or the shards have no masks.

        And for the first conversation that is too long, where that is to be refused.
        """
        if not shards.header.masked or shards.header.judged:
            found = "answers labelled good or bad, for objective kto" if shards.header.judged else "plain text"
            raise UserError(f"{shards.directory}: expected shards of conversations, found {found}")
        self.shards, self.length, self.pad_id = shards, length, shards.header.pad_token_id or 0
        self.on_long = on_long
        self.starts, ends = _documents(shards)
        self.stops = np.minimum(ends, self.starts + length)
        too_long = ends - 1 - self.starts > length  # without the end-of-text token, which is not learned
        if on_long == "refuse" and too_long.any():
            raise UserError(
                f"{shards.directory}: conversation {int(too_long.argmax()) + 1:,} is longer than {length:,} tokens: "
                "raise train.sequence_length, or set data.on_long_conversation to cut or skip"
            )
        # The first token of a conversation follows nothing, so that it is never a label.
        learned = np.flatnonzero(shards.trained_in(0, len(shards)))
        counts = np.searchsorted(learned, self.stops) - np.searchsorted(learned, self.starts + 1)
        self.truncated = int(too_long.sum())
        self.untrained = int((counts <= 0).sum())
        kept = np.flatnonzero((counts > 0) & ~(too_long & (on_long == "skip")))
        if not len(kept):
            raise UserError(
                f"{shards.directory}: nothing to learn within {length:,} tokens in any of {len(ends):,} conversations; "
                "raise sequence_length, or check that they have assistant turns"
            )
        lengths = (self.stops - self.starts)[kept]
        self.tokens = int(lengths.sum())
        packed = pack_whole(lengths, length).rows
        self.packed = [kept[row] for row in packed]

    @property
    def rows_in_epoch(self) -> int:
        return len(self.packed)

    def report(self) -> list[str]:
        what = "left out" if self.on_long == "skip" else "cut"
        lines = {
            f"are longer than {self.length:,} tokens and {what}": self.truncated,
            f"have nothing to learn within {self.length:,} tokens": self.untrained,
        }
        return [f"{count:,} of {len(self.starts):,} conversations {said}" for said, count in lines.items() if count]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = [], []
        for document in self.packed[index].tolist():
            start, stop = int(self.starts[document]), int(self.stops[document])
            ids.append(self.shards.tokens_in(start, stop).astype(np.int64))
            labels.append(row_of_labels(ids[-1], self.shards.trained_in(start, stop)))
        return padded(ids, self.length, self.pad_id), padded(labels, self.length, IGNORED)

    def documents(self, index: int) -> np.ndarray:
        lengths = (self.stops - self.starts)[self.packed[index]]
        return numbered(lengths, self.length)


class DocumentRows(Rows):
    """For validation: whole documents side by side behind an end-of-text token, so that all of each is predicted.

    Every token of every document is a label exactly once. A document longer than a row is cut: its further rows begin
    with the token before the cut.
    """

    def __init__(self, shards: TokenShards, length: int) -> None:
        if length < 1:
            raise UserError(f"expected a sequence_length of at least 1, found {length}")
        self.shards, self.length, self.pad_id = shards, length, shards.header.pad_token_id or 0
        eos_id = shards.header.eos_token_id
        starts, ends = _documents(shards)
        packing = pack_whole(ends - starts, length)
        self._rows = [[(int(starts[i]), int(ends[i])) for i in row] for row in packing.rows]
        self._contexts = [eos_id] * len(self._rows)
        for i in packing.too_long:
            for start in range(int(starts[i]), int(ends[i]), length):
                self._rows.append([(start, min(start + length, int(ends[i])))])
                is_first = start == int(starts[i])
                self._contexts.append(eos_id if is_first else int(shards.tokens_in(start - 1, start)[0]))

    @property
    def rows_in_epoch(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        content = np.concatenate([self.shards.tokens_in(start, stop) for start, stop in self._rows[index]])
        context = np.array([self._contexts[index]])
        return (
            padded([context, content[:-1]], self.length, self.pad_id),
            padded([content], self.length, IGNORED),
        )

    def documents(self, index: int) -> np.ndarray:
        """The token in front belongs to the first; the last token of each predicts the next one's first, as ever."""
        lengths = np.array([stop - start for start, stop in self._rows[index]])
        lengths[0] += 1
        lengths[-1] -= 1
        return numbered(lengths, self.length)


def _documents(shards: TokenShards) -> tuple[np.ndarray, np.ndarray]:
    """First token of each document and one past its last: int64 [documents] each."""
    ends = shards.document_ends
    return np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]), ends
