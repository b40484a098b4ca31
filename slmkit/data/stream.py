"""What the model is fed: rows of token shards, and batches of rows as a pure function of (seed, step).

Rows know nothing of order and epochs, the stream nothing of tokens: whatever has `rows_in_epoch` and `row(i)` is fed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from slmkit.config import UserError
from slmkit.data.order import permuted
from slmkit.data.packing import IGNORED, pack_whole, padded, row_of_labels, windows
from slmkit.data.shards import TokenShards


class Rows(Protocol):
    """Numbered rows of ids and labels, int64 [length] each: `labels[t]` follows `ids[t]`, or is -100: not learned.

    `documents` [length] numbers the documents of a row: two tokens of one have the same number.
    """

    @property
    def rows_in_epoch(self) -> int: ...

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...

    def documents(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Batch:
    """Rows for one update. `weight` is the number of labels that are learned: what the summed loss is divided by.

    With `documents`, attention and positions are kept inside each.
    """

    ids: Tensor  # int64 [rows, length]
    labels: Tensor  # int64 [rows, length]
    weight: int
    documents: Tensor | None = None  # int64 [rows, length]

    def to(self, device: torch.device | str) -> Batch:
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.ids.to(device), self.labels.to(device), self.weight, documents)

    def untrained(self) -> Batch:
        """One row of it, of which nothing is learned."""
        first = slice(0, 1)
        documents = None if self.documents is None else self.documents[first]
        return Batch(self.ids[first], torch.full_like(self.labels[first], IGNORED), 0, documents)

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most `rows` rows, in order."""
        if len(self.ids) <= rows:
            return [self]
        ids, labels = self.ids.split(rows), self.labels.split(rows)
        documents = [None] * len(ids) if self.documents is None else self.documents.split(rows)
        weights = [int((part != IGNORED).sum()) for part in labels]
        return [Batch(*parts) for parts in zip(ids, labels, weights, documents)]


class Stream:
    """The endless sequence of epochs over `rows`, each shuffled by (seed, epoch). Its only position is the step.

    `separate`: batches say which document each token belongs to, so that none is read across a border.
    """

    def __init__(self, rows: Rows, rows_per_step: int, seed: int = 0, separate: bool = False) -> None:
        if rows_per_step < 1:
            raise UserError(f"expected at least one row a step, found {rows_per_step}; raise tokens_per_step")
        self.rows, self.rows_per_step, self.seed, self.separate = rows, rows_per_step, seed, separate

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows of step `step` (from 0), or the contiguous share of them that falls to one of `world` ranks.

        Raises `UserError` when a step has fewer rows than there are ranks.
        """
        if self.rows_per_step < world:
            raise UserError(
                f"{self.rows_per_step} rows a step cannot be shared by {world} processes; "
                "raise tokens_per_step or start fewer processes"
            )
        begin, end = (self.rows_per_step * part // world for part in (rank, rank + 1))
        positions = step * self.rows_per_step + np.arange(begin, end)
        indices = self._indices(positions)
        ids, labels = (np.stack(column) for column in zip(*map(self.rows.row, indices)))  # int64 [rows, length] each
        documents = torch.from_numpy(np.stack([*map(self.rows.documents, indices)])) if self.separate else None
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels), int((labels != IGNORED).sum()), documents)

    def _indices(self, positions: np.ndarray) -> list[int]:
        """Which rows stand at `positions` of the endless sequence."""
        size = self.rows.rows_in_epoch
        epochs, places = positions // size, positions % size
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = permuted(places[here], size, self.seed, epoch)
        return indices.tolist()


class PretrainRows:
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

    def documents(self, index: int) -> np.ndarray:
        positions = self.starts[index] + np.arange(self.length)
        return np.searchsorted(self.shards.document_ends, positions, side="right")


class ChatRows:
    """Whole conversations packed side by side, padded behind; only what their masks say is learned.

    `truncated` conversations are longer than a row and are cut at its end; `untrained` ones have nothing to learn in
    what is left of them, and are skipped.
    """

    def __init__(self, shards: TokenShards, length: int) -> None:
        """Raises `UserError` when not one conversation has anything to learn, or the shards have no masks."""
        if not shards.header.masked:
            raise UserError(
                f"{shards.directory}: these shards are of plain text, without the loss masks of conversations"
            )
        self.shards, self.length, self.pad_id = shards, length, shards.header.pad_token_id or 0
        self.starts, ends = _documents(shards)
        self.stops = np.minimum(ends, self.starts + length)
        # The first token of a conversation follows nothing, so that it is never a label.
        learned = np.flatnonzero(shards.trained_in(0, len(shards)))
        counts = np.searchsorted(learned, self.stops) - np.searchsorted(learned, self.starts + 1)
        self.truncated = int((ends > self.stops).sum())
        self.untrained = int((counts <= 0).sum())
        kept = np.flatnonzero(counts > 0)
        if not len(kept):
            raise UserError(
                f"{shards.directory}: nothing to learn within {length:,} tokens in any of {len(ends):,} conversations; "
                "raise sequence_length, or check that they have assistant turns"
            )
        packed = pack_whole((self.stops - self.starts)[kept], length).rows
        self.packed = [kept[row] for row in packed]

    @property
    def rows_in_epoch(self) -> int:
        return len(self.packed)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = [], []
        for document in self.packed[index].tolist():
            start, stop = int(self.starts[document]), int(self.stops[document])
            ids.append(self.shards.tokens_in(start, stop).astype(np.int64))
            labels.append(row_of_labels(ids[-1], self.shards.trained_in(start, stop)))
        return padded(ids, self.length, self.pad_id), padded(labels, self.length, IGNORED)

    def documents(self, index: int) -> np.ndarray:
        lengths = (self.stops - self.starts)[self.packed[index]]
        return _numbered(lengths, self.length)


class DocumentRows:
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
        return _numbered(lengths, self.length)


def _documents(shards: TokenShards) -> tuple[np.ndarray, np.ndarray]:
    """First token of each document and one past its last: int64 [documents] each."""
    ends = shards.document_ends
    return np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]), ends


def _numbered(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """0 for each token of the first document, 1 for the second, …, and a number of its own for padding."""
    return padded([np.repeat(np.arange(len(lengths)), lengths)], row_length, len(lengths))
