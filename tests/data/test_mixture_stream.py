"""A mixture over shards: any step without replay, whatever the number of processes; every epoch all of a source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slmkit.data.mixture import Phase
from slmkit.data.stream import MixtureStream, PretrainRows
from tests.data.byte_tokenizer import ByteTokenizer
from tests.data.written_shards import written

SIZES = {"a": 24, "b": 11, "c": 11}  # rows
LENGTH = 4
PHASES = [Phase(33, (0.6, 0.3, 0.1)), Phase(80, (0.2, 0.4, 0.4)), Phase(None, (0.1, 0.5, 0.4))]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, PretrainRows]:
    """Shards in which a token says which source it is of, by thousands, and where it stands."""
    found = {}
    for number, (name, rows) in enumerate(SIZES.items()):
        tokens = rows * LENGTH + 1
        ids = 1000 * number + np.arange(tokens)
        shards = written(tmp_path / name, ByteTokenizer(size=4000), ids, np.array([tokens]))
        found[name] = PretrainRows(shards, LENGTH)
    return found


def stream(sources: dict[str, PretrainRows], rule: str = "repeat", seed: int = 5) -> MixtureStream:
    return MixtureStream(sources, PHASES, rule, rows_per_step=7, seed=seed, separate=True)


def rows_of(batches: list, source: int) -> list[int]:
    """Numbers of a source's rows, in the order in which they came."""
    firsts = torch.cat([batch.ids[:, 0] for batch in batches]).tolist()
    return [(first - 1000 * source) // LENGTH for first in firsts if first // 1000 == source]


def test_every_epoch_of_every_source_is_all_of_it_in_an_order_of_its_own(sources: dict[str, PretrainRows]) -> None:
    mixture = stream(sources)
    batches = [mixture.batch(step) for step in range(60)]
    orders = []
    for number, size in enumerate(SIZES.values()):
        rows = rows_of(batches, number)
        epochs = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        orders += epochs
    assert len({tuple(order) for order in orders}) == len(orders)  # b and c are as large, and differ too


def test_batches_follow_from_seed_and_step_alone(sources: dict[str, PretrainRows]) -> None:
    straight = stream(sources)
    batches = [straight.batch(step) for step in range(60)]
    for step in (59, 0, 4, 5, 11, 12, 33):
        resumed = stream(sources)
        resumed.seek(step, straight.position())
        assert torch.equal(resumed.batch(step).ids, batches[step].ids)
        assert torch.equal(resumed.batch(step).labels, batches[step].labels)
    assert straight.position() == {}
    assert not torch.equal(stream(sources, seed=6).batch(0).ids, batches[0].ids)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_have_the_batch_of_one(sources: dict[str, PretrainRows], world: int) -> None:
    mixture = stream(sources)
    for step in range(20):
        parts, whole = [mixture.batch(step, rank, world) for rank in range(world)], mixture.batch(step)
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.documents for part in parts]), whole.documents)
        assert sum(part.weight for part in parts) == whole.weight


@pytest.mark.parametrize("rule", ["stop", "redistribute"])
def test_sources_that_run_out_end_the_rows_where_the_schedule_says(sources: dict[str, PretrainRows], rule: str) -> None:
    mixture = stream(sources, rule)
    assert mixture.total_rows is not None
    steps = mixture.total_rows // 7
    assert mixture.has(steps - 1)
    assert not mixture.has(steps)
    batches = [mixture.batch(step) for step in range(steps)]
    for number, size in enumerate(SIZES.values()):
        rows = rows_of(batches, number)
        assert len(rows) == len(set(rows)) <= size
    assert mixture.total_rows == sum(SIZES.values()) if rule == "redistribute" else mixture.total_rows < 46
    counts = np.array([len(rows_of(batches, number)) for number in range(3)])
    assert list(mixture.shares(steps).values()) == pytest.approx((counts / counts.sum()).tolist(), abs=1e-5)
