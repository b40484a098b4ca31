"""The shuffle that is never stored."""

from __future__ import annotations

import numpy as np
import pytest

from slmkit.data.order import permuted


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4097, 100_003])
def test_every_size_is_shuffled_without_loss_or_repetition(size: int):
    for seed, epoch in ((0, 0), (0, 1), (7, 3)):
        assert np.array_equal(np.sort(permuted(np.arange(size), size, seed, epoch)), np.arange(size))


def test_a_position_is_found_without_the_others():
    everything = permuted(np.arange(10_000), 10_000, seed=3, epoch=5)
    some = np.array([[9_999, 17], [0, 5_000]])
    assert np.array_equal(permuted(some, 10_000, seed=3, epoch=5), everything[some])


def test_sizes_beyond_any_memory_are_shuffled_at_once():
    positions = np.arange(1 << 60, (1 << 60) + 1000)
    found = permuted(positions, (1 << 61) + 3, seed=0, epoch=0)
    assert len(np.unique(found)) == 1000
    assert found.max() < (1 << 61) + 3


def test_seeds_and_epochs_give_orders_of_their_own():
    orders = {tuple(permuted(np.arange(50), 50, seed, epoch)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_the_order_looks_random():
    size = 20_000
    order = permuted(np.arange(size), size, seed=1, epoch=0)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    places = np.array([permuted(np.array([0]), 5, seed=1, epoch=epoch)[0] for epoch in range(2000)])
    assert np.bincount(places, minlength=5).min() > 300  # 400 expected


def test_a_position_outside_is_a_mistake():
    with pytest.raises(ValueError, match=r"range\(3\)"):
        permuted(np.array([3]), 3, 0, 0)
