"""Rows of token shards, and batches of rows as a pure function of (seed, step).

Rows have no order and no epochs; `Stream` orders anything with `rows_in_epoch` and `row(i)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from slmkit.config import UserError
from slmkit.data.batch import Batch, stacked
from slmkit.data.mixture import Phase, Schedule, WhenExhausted
from slmkit.data.order import mixed_seed, permuted
from slmkit.data.packing import IGNORED, numbered, pack_whole, padded, row_of_labels, windows
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Source
from slmkit.data.sources.settings import OnLong


class Rows(Protocol):
    """Numbered rows of ids and labels, int64 [length] each: `labels[t]` is the token after `ids[t]`, or -100.

    `documents` [length]: the document number of each token of a row.
    """

    left_out: Mapping[str, int] = {}  # kinds of documents that are left out or cut, in words, and how many

    @property
    def rows_in_epoch(self) -> int: ...

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...  # int64 [length] each

    def documents(self, index: int) -> np.ndarray:  # int64 [length]
        """By default all zero: a row is one document."""
        return np.zeros_like(self.row(index)[0])

    def rows(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of several rows: int64 [rows, length] each. By default one `row` at a time."""
        ids, labels = zip(*map(self.row, indices))
        return np.stack(ids), np.stack(labels)

    def batch(self, indices: Sequence[int], separate: bool = False) -> Batch:
        """Batch of these rows [rows, length], with `extra`, and with the number of each token's document."""
        documents = np.stack([*map(self.documents, indices)]) if separate else None
        return Batch.of(*self.rows([*indices]), documents, stacked([self.extra(index) for index in indices]))

    def report(self) -> list[str]:
        """One line for each kind of documents that are left out or cut."""
        return [f"{count:,} {what}" for what, count in self.left_out.items() if count]

    def extra(self, index: int) -> dict[str, np.ndarray]:
        """Further arrays […] of a row for the objective, such as a teacher's logits; by default none."""
        return {}


class Batches:
    """The batches of the training loop: one for each step, and a position for checkpoints.

    By default the data never ends, and the step is the whole position.
    """

    rows_per_step: int
    separate = False  # batches have document numbers, and attention stays inside a document
    total_rows: int | None = None  # rows until the data ends; None if it never does or the number is not known yet
    rows_in_epoch: int | None = None  # None if not known
    origins: Sequence[Source] = ()  # the sources of streamed batches

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows [rows, length] of step `step` (from 0), or one rank's contiguous share of them.

        Raises `UserError` if a step has fewer rows than there are ranks.
        """
        raise NotImplementedError

    def has(self, step: int) -> bool:
        """Whether there is a batch for this step; False after the end of the data."""
        return self.total_rows is None or (step + 1) * self.rows_per_step <= self.total_rows

    def shares(self, step: int) -> dict[str, float]:
        """Share of each source in all rows before `step`; empty if there is only one source."""
        return {}

    def report(self) -> list[str]:
        """One line for each kind of documents that are left out or cut; by default none."""
        return []

    def position(self) -> dict[str, Any]:
        """The position after the last batch, as JSON; empty if the step is enough."""
        return {}

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Continue with `step` at a saved position; from the beginning if that is empty."""


def share_of_rank(rows_per_step: int, rank: int, world: int) -> slice:
    """The slice of a step's rows for one of `world` ranks. Raises `UserError` if there are more ranks than rows."""
    if rows_per_step < world:
        raise UserError(
            f"{rows_per_step} rows a step cannot be shared by {world} processes; "
            "raise tokens_per_step or start fewer processes"
        )
    return slice(*(rows_per_step * part // world for part in (rank, rank + 1)))


class Stream(Batches):
    """An endless sequence of epochs over `rows`, each shuffled by (seed, epoch). Its position is the step."""

    def __init__(self, source: Rows, rows_per_step: int, seed: int = 0, separate: bool = False) -> None:
        self.source, self.rows_per_step, self.seed, self.separate = source, rows_per_step, seed, separate
        self.rows_in_epoch = source.rows_in_epoch

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows [rows, length] as in `Batches`; a pure function of its arguments."""
        places = np.arange(self.rows_per_step, dtype=np.int64)[share_of_rank(self.rows_per_step, rank, world)]
        chosen = self._rows_at(step * self.rows_per_step + places)
        parts = [rows.batch(indices, self.separate) for rows, indices, _ in chosen]
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate([place for _, _, place in chosen]))  # the order of the rows
        return Batch.joined(parts).only(torch.from_numpy(order))

    def report(self) -> list[str]:
        return self.source.report()

    def _rows_at(self, positions: np.ndarray) -> list[tuple[Rows, list[int], np.ndarray]]:
        """Rows at `positions`, int64 [n], of the endless sequence: by source, row indices and their places in [n]."""
        return [(self.source, shuffled(positions, self.source.rows_in_epoch, self.seed), np.arange(len(positions)))]


class MixtureStream(Stream):
    """Mixed rows of several sources by a schedule; each source is an endless sequence of shuffled epochs."""

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
        self.seeds = [mixed_seed(seed, name) for name in self.names]  # so that equally long sources differ
        self.rows_per_step, self.separate = rows_per_step, separate
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
    """Counts of rows [sources] as shares of their sum, by name, rounded for logs."""
    return {name: round(float(count) / max(1, int(counts.sum())), 5) for name, count in zip(names, counts)}


def shuffled(positions: np.ndarray, size: int, seed: int) -> list[int]:
    """The row indices at `positions` int64 [n] of a source's endless sequence of epochs; list of n."""
    epochs, places = positions // size, positions % size
    indices = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = permuted(places[here], size, seed, epoch)
    return indices.tolist()


class ShardRows(Rows):
    """Rows of `length` tokens of shards."""

    def __init__(self, shards: TokenShards, length: int) -> None:
        self.shards, self.length, self.pad_id = shards, length, shards.header.pad_token_id or 0

    def _padded(self, ids: list[np.ndarray], labels: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Parts of a row, concatenated, cut and right-padded: int64 [length] each."""
        return padded(ids, self.length, self.pad_id), padded(labels, self.length, IGNORED)


class PretrainRows(ShardRows):
    """Full windows of `length` tokens across document borders; every label is learned."""

    def __init__(self, shards: TokenShards, length: int) -> None:
        """Raises `UserError` if there are not enough tokens for one row."""
        super().__init__(shards, length)
        self.starts = windows(len(shards), length)
        if not self.starts:
            raise UserError(
                f"{len(shards):,} tokens are too few for one sequence, which needs {length + 1:,}; "
                "lower sequence_length or add text"
            )

    @property
    def rows_in_epoch(self) -> int:
        return len(self.starts)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # int64 [length] each
        start = self.starts[index]
        tokens = self.shards.tokens_in(start, start + self.length + 1).astype(np.int64)
        return tokens[:-1], tokens[1:]

    def rows(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """`row` of several, int64 [rows, length] each, in one read and one conversion: several times as fast."""
        tokens = self.shards.runs([self.starts[index] for index in indices], self.length + 1)
        both = np.empty((2, len(indices), self.length), dtype=np.int64)  # one block, which the allocator reuses
        both[0], both[1] = tokens[:, :-1], tokens[:, 1:]
        return both[0], both[1]

    def documents(self, index: int) -> np.ndarray:  # int64 [length]
        positions = self.starts[index] + np.arange(self.length)
        return np.searchsorted(self.shards.document_ends, positions, side="right")


class ChatRows(ShardRows):
    """Whole conversations, packed and right-padded; the labels are the tokens in their loss masks.

    `truncated` conversations are longer than a row, and are cut at its end unless `on_long` says otherwise;
    `untrained` ones have nothing to learn within a row, and are left out.
    """

    def __init__(self, shards: TokenShards, length: int, on_long: OnLong = "cut") -> None:
        """Raises `UserError` if no conversation has anything to learn, or the shards have no masks.

        With `on_long="refuse"`, also for a conversation longer than a row.
        """
        if not shards.header.masked or shards.header.judged:
            found = "answers labelled good or bad, for objective kto" if shards.header.judged else "plain text"
            raise UserError(f"{shards.directory}: expected shards of conversations, found {found}")
        super().__init__(shards, length)
        self.starts, ends = document_spans(shards)
        self.stops = np.minimum(ends, self.starts + length)
        too_long = ends - 1 - self.starts > length  # without the end-of-text token, which is not learned
        if on_long == "refuse" and too_long.any():
            raise UserError(
                f"{shards.directory}: conversation {int(too_long.argmax()) + 1:,} is longer than {length:,} tokens: "
                "raise train.sequence_length, or set data.on_long_conversation to cut or skip"
            )
        # The first token of a conversation has no token before it, so it is never a label.
        learned = np.flatnonzero(shards.trained_in(0, len(shards)))
        counts = np.searchsorted(learned, self.stops) - np.searchsorted(learned, self.starts + 1)
        self.truncated = int(too_long.sum())
        self.untrained = int((counts <= 0).sum())
        of, what = f"of {len(ends):,} conversations", "left out" if on_long == "skip" else "cut"
        self.left_out = {
            f"{of} are longer than {length:,} tokens and {what}": self.truncated,
            f"{of} have nothing to learn within {length:,} tokens": self.untrained,
        }
        kept = np.flatnonzero((counts > 0) & ~(too_long & (on_long == "skip")))
        if not len(kept):
            read = [str(source["path"]) for source in shards.header.sources if "path" in source]
            text = f"{read[0]}{f' and {len(read) - 1} more' * (len(read) > 1)}" if read else shards.directory
            part = " held out for validation" if shards.directory.name == "validation" else ""
            raise UserError(
                f"{text}: nothing to learn within {length:,} tokens in any of {len(ends):,} conversations{part}; "
                "raise sequence_length, or check that they have assistant turns"
            )
        lengths = (self.stops - self.starts)[kept]
        self.tokens = int(lengths.sum())
        packed = pack_whole(lengths, length).rows
        self.packed = [kept[row] for row in packed]

    @property
    def rows_in_epoch(self) -> int:
        return len(self.packed)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # int64 [length] each
        ids, labels = [], []
        for document in self.packed[index].tolist():
            start, stop = int(self.starts[document]), int(self.stops[document])
            ids.append(self.shards.tokens_in(start, stop).astype(np.int64))
            labels.append(row_of_labels(ids[-1], self.shards.trained_in(start, stop)))
        return self._padded(ids, labels)

    def documents(self, index: int) -> np.ndarray:  # int64 [length]
        lengths = (self.stops - self.starts)[self.packed[index]]
        return numbered(lengths, self.length)


class DocumentRows(ShardRows):
    """Validation rows: whole documents after an end-of-text token, packed, so that all of each is predicted.

    Every token of every document is a label exactly once. A document longer than a row is cut: its further rows begin
    with the token before the cut.
    """

    def __init__(self, shards: TokenShards, length: int) -> None:
        super().__init__(shards, length)
        eos_id = shards.header.eos_token_id
        starts, ends = document_spans(shards)
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

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # int64 [length] each
        content = np.concatenate([self.shards.tokens_in(start, stop) for start, stop in self._rows[index]])
        context = np.array([self._contexts[index]])
        return self._padded([context, content[:-1]], [content])

    def documents(self, index: int) -> np.ndarray:
        """int64 [length]. The end-of-text token at the start belongs to the first document."""
        lengths = np.array([stop - start for start, stop in self._rows[index]])
        lengths[0] += 1
        lengths[-1] -= 1
        return numbered(lengths, self.length)


def document_spans(shards: TokenShards) -> tuple[np.ndarray, np.ndarray]:
    """First token of each document, and one past its last: int64 [documents] each."""
    ends = shards.document_ends
    return np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]), ends
