"""The learning rate rises, falls, and lands where it was told to."""

from __future__ import annotations

import itertools

import pytest

from slmkit.training.schedules import warmup_cosine


def test_it_rises_linearly_to_the_peak_and_falls_to_the_floor() -> None:
    rates = [warmup_cosine(step, steps=100, warmup_steps=10, floor=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_halfway_down_it_is_the_mean_of_peak_and_floor() -> None:
    assert warmup_cosine(50, steps=101, warmup_steps=0, floor=0.2) == pytest.approx(0.6)


def test_a_run_of_one_step_has_a_rate() -> None:
    assert warmup_cosine(0, steps=1, warmup_steps=0, floor=0.1) > 0
