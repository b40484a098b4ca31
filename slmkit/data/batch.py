"""The batch of one update."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from slmkit.data.packing import IGNORED


@dataclass(frozen=True)
class Batch:
    """Rows for one update. `weight` is the number of labels that are learned.

    With `documents`, attention and positions stay inside each document. Pairs have rows of [2, length]. `extra` has the
    further tensors that the objective needs, by name, [rows, …] each.
    """

    ids: Tensor  # int64 [rows, length]
    labels: Tensor  # int64 [rows, length]
    weight: int
    documents: Tensor | None = None  # int64 [rows, length]
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # [rows, …] each

    @classmethod
    def of(
        cls,
        ids: np.ndarray,
        labels: np.ndarray,
        documents: np.ndarray | None = None,
        extra: Mapping[str, np.ndarray] | None = None,
    ) -> Batch:
        """Batch of int64 arrays [rows, length] each; `extra` [rows, …] each."""
        weight = int(np.count_nonzero(labels != IGNORED))
        kept_apart = None if documents is None else torch.from_numpy(documents)
        besides = {name: torch.from_numpy(array) for name, array in (extra or {}).items()}
        return cls(torch.from_numpy(ids), torch.from_numpy(labels), weight, kept_apart, besides)

    def to(self, device: torch.device | str) -> Batch:  # [rows, …] as here
        return self._each(lambda tensor: tensor.to(device), self.weight)

    @staticmethod
    def joined(parts: list[Batch]) -> Batch:
        """Concatenate the rows [rows, …] of several batches, in order."""
        ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "labels"))
        documents = [part.documents for part in parts if part.documents is not None]
        extra = {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra}
        weight = sum(part.weight for part in parts)
        return Batch(ids, labels, weight, torch.cat(documents) if documents else None, extra)

    def untrained(self) -> Batch:
        """Its first row, [1, length], with no label learned."""
        first = self._each(lambda tensor: tensor[:1], 0)
        return Batch(first.ids, torch.full_like(first.labels, IGNORED), 0, first.documents, first.extra)

    def with_extra(self, **extra: Tensor) -> Batch:
        """Add extra tensors for the objective, [rows, …] each."""
        return replace(self, extra={**self.extra, **extra})

    def only(self, rows: Tensor) -> Batch:
        """The rows selected by `rows`: bool [rows], or their numbers in any order, int64 [chosen]."""
        return self._each(lambda tensor: tensor[rows], int((self.labels[rows] != IGNORED).sum()))

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most `rows` rows [rows, length], in order."""
        if len(self.ids) <= rows:
            return [self]
        parts = [slice(start, start + rows) for start in range(0, len(self.ids), rows)]
        weights = [int((self.labels[part] != IGNORED).sum()) for part in parts]
        return [self._each(operator.itemgetter(part), weight) for part, weight in zip(parts, weights)]

    def _each(self, change: Callable[[Tensor], Tensor], weight: int) -> Batch:
        documents = None if self.documents is None else change(self.documents)
        extra = {name: change(tensor) for name, tensor in self.extra.items()}
        return Batch(change(self.ids), change(self.labels), weight, documents, extra)


def stacked(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays […] of each row, by name → arrays [rows, …]."""
    return {name: np.stack([row[name] for row in rows]) for name in (rows[0] if rows else {})}
