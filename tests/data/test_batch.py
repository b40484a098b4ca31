"""A batch and what its rows carry along."""

from __future__ import annotations

import numpy as np
import torch

from slmkit.data.batch import Batch
from slmkit.data.mixture import plan_phases
from slmkit.data.packing import IGNORED
from slmkit.data.stream import MixtureStream, Rows, Stream


class Numbered(Rows):
    """Rows that carry their number, three times over."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    @property
    def rows_in_epoch(self) -> int:
        return self.count

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full(4, self.first + index, dtype=np.int64)
        return ids, np.where(np.arange(4) < 2, ids, IGNORED)

    def documents(self, index: int) -> np.ndarray:
        return np.full(4, self.first + index)

    def extra(self, index: int) -> dict[str, np.ndarray]:
        return {"number": np.full(3, float(self.first + index))}


def is_together(batch: Batch) -> bool:
    """Whether each row still has its own number beside it."""
    return bool((batch.extra["number"] == batch.ids[:, :1]).all())


def test_what_belongs_to_a_row_stays_with_it() -> None:
    batch = Stream(Numbered(0, 10), 7, seed=3, separate=True).batch(2)
    assert batch.extra["number"].shape == (7, 3)
    assert is_together(batch)
    parts = batch.split(3)
    assert [len(part.ids) for part in parts] == [3, 3, 1]
    assert [part.weight for part in parts] == [6, 6, 2]
    assert all(is_together(part) and is_together(part.to("cpu")) for part in parts)
    again = Batch.joined(parts)
    assert torch.equal(again.ids, batch.ids)
    assert torch.equal(again.extra["number"], batch.extra["number"])
    assert again.documents is not None
    assert torch.equal(again.documents, batch.ids)
    empty = batch.untrained()
    assert (empty.weight, len(empty.ids), len(empty.extra["number"])) == (0, 1, 1)


def test_so_it_does_in_a_mixture_of_sources_and_on_each_rank() -> None:
    sources = {"a": Numbered(0, 9), "b": Numbered(100, 5)}
    stream = MixtureStream(sources, plan_phases([], {"a": 0.5, "b": 0.5}, 4), "repeat", 8, seed=1)
    whole = stream.batch(1)
    assert is_together(whole)
    assert {bool(number >= 100) for number in whole.extra["number"][:, 0]} == {False, True}
    assert torch.equal(torch.cat([stream.batch(1, rank, 2).extra["number"] for rank in (0, 1)]), whole.extra["number"])


def test_some_rows_of_a_batch_count_their_own_labels() -> None:
    batch = Stream(Numbered(0, 8), rows_per_step=8, seed=0).batch(0)
    some = batch.only(torch.arange(8) % 3 == 0)
    assert torch.equal(some.ids, batch.ids[[0, 3, 6]])
    assert some.weight == 6
    assert is_together(some)
