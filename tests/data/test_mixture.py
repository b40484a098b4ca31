"""Turns by weight: shares that hold at every row, sources that run out, phases, and steps reached without replay."""

from __future__ import annotations

import numpy as np
import pytest

from slmkit.config import UserError
from slmkit.data.mixture import Phase, PhaseSettings, Schedule, plan_phases


def counted(schedule: Schedule, rows: int, sources: int) -> np.ndarray:
    """How often each source came in the first n rows, for n from 0 to `rows`: [rows + 1, sources]."""
    order, _ = schedule.locate(np.arange(rows))
    counts = np.zeros((rows + 1, sources), dtype=np.int64)
    counts[1:] = (order[:, None] == np.arange(sources)).cumsum(0)
    return counts


def phase(*weights: float, until: int | None = None) -> Phase:
    return Phase(until, weights)


@pytest.mark.parametrize("case", range(12))
def test_shares_are_within_a_hundredth_at_any_row_past_a_few_hundred(case: int) -> None:
    random = np.random.default_rng(case)
    sources = int(random.integers(2, 8))
    weights = random.dirichlet(np.full(sources, random.choice([0.3, 1.0, 5.0])))
    counts = counted(Schedule([phase(*weights)], [None] * sources, "repeat"), 25_000, sources)
    rows = np.arange(300, 25_001)[:, None]
    assert np.abs(counts[300:] / rows - weights).max() < 0.01
    assert np.abs(counts[20_000:] / rows[19_700:] - weights).max() < 0.0005


def test_two_equal_sources_take_turns() -> None:
    order, numbers = Schedule([phase(1, 1)], [None, None], "repeat").locate(np.arange(6))
    assert order.tolist() == [0, 1, 0, 1, 0, 1]
    assert numbers.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("rule", ["stop", "repeat", "redistribute"])
def test_numbers_count_each_sources_rows_across_phases(rule: str) -> None:
    phases = [phase(0.7, 0.3, 0, until=100), phase(0.2, 0.3, 0.5, until=333), phase(0, 0.01, 0.99)]
    schedule = Schedule(phases, [60, 500, 700], rule)
    rows = schedule.total or 3000
    order, numbers = schedule.locate(np.arange(rows))
    for source in range(3):
        mine = numbers[order == source]
        assert mine.tolist() == list(range(len(mine)))
    counts = counted(schedule, rows, 3)
    for row in (0, 1, 99, 100, 101, 250, 333, 334, rows):
        if row <= rows:
            assert schedule.counts(row).tolist() == counts[row].tolist()


def test_the_phase_decides_from_its_first_row_to_its_last() -> None:
    schedule = Schedule([phase(1, 0, until=10), phase(0, 1, until=30), phase(0.5, 0.5)], [None, None], "repeat")
    order, _ = schedule.locate(np.arange(60))
    assert order[:10].tolist() == [0] * 10
    assert order[10:30].tolist() == [1] * 20
    assert np.bincount(order[30:]).tolist() == [15, 15]


def test_stop_ends_at_the_first_row_that_nobody_can_give() -> None:
    schedule = Schedule([phase(0.5, 0.25, 0.25)], [10, 100, 100], "stop")
    order, numbers = schedule.locate(np.arange(schedule.total))
    assert (order == 0).sum() == 10
    endless, _ = Schedule([phase(0.5, 0.25, 0.25)], [None] * 3, "stop").locate(np.arange(schedule.total + 1))
    assert endless[-1] == 0  # the next row would have been the eleventh
    assert numbers.max() < 100


def test_repeat_never_ends_and_leaves_the_weights_alone() -> None:
    schedule = Schedule([phase(0.9, 0.1)], [7, 100], "repeat")
    assert schedule.total is None
    assert schedule.counts(10_000).tolist() == [9000, 1000]


def test_redistribute_gives_the_weight_to_the_others_in_proportion() -> None:
    sizes = [50, 1000, 2000]
    schedule = Schedule([phase(0.5, 0.1, 0.4)], sizes, "redistribute")
    counts = counted(schedule, schedule.total, 3)
    gone = int(np.argmax(counts[:, 0] == 50))
    assert 98 <= gone <= 102
    later = counts[gone + 1000] - counts[gone]
    assert np.abs(later / 1000 - [0, 0.2, 0.8]).max() < 0.005
    assert counts[-1].tolist() == sizes  # each is read once, to its last row
    assert schedule.total == sum(sizes)


def test_redistribute_ends_where_a_phase_has_nobody_left() -> None:
    phases = [phase(1, 0, until=100), phase(1, 0, until=200), phase(0, 1)]
    assert Schedule(phases, [150, 50], "redistribute").total == 150
    assert Schedule(phases, [250, 50], "redistribute").total == 250


def test_a_weight_however_small_is_not_lost() -> None:
    counts = Schedule([phase(1, 1e-7)], [None, None], "repeat").counts(1_000_000)
    assert 0 < counts[1] <= 100


SOURCES = {"stories": 1.0, "web": 3.0}


def plan(*phases: dict) -> list[Phase]:
    return plan_phases([PhaseSettings(**one) for one in phases], SOURCES, 100)


def test_without_phases_the_sources_own_weights_hold_all_along() -> None:
    assert plan() == [Phase(None, (1.0, 3.0))]


def test_phases_count_tokens_and_the_last_has_no_end() -> None:
    phases = plan(
        {"until_tokens": 50e6, "weights": {"stories": 0.45, "web": 0.55}},
        {"until_tokens": 90e6, "weights": {"web": 1}},
    )
    assert phases == [Phase(500_000, (0.45, 0.55)), Phase(None, (0.0, 1.0))]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"weights": {"storys": 1}}], "phase 1: no source is named 'storys'; did you mean 'stories'?"),
        ([{"weights": {"stories": 0, "web": 0}}], "phase 1: all weights are 0"),
        ([{"weights": {}}], "phase 1: all weights are 0"),
        ([{"weights": {"web": -0.5, "stories": 1}}], "expected a weight of 0 or more for 'web', found -0.5"),
        ([{"weights": {"web": 1}}, {"weights": {"web": 1}}], "phase 1: only the last phase may have no end"),
        (
            [
                {"until_tokens": 900, "weights": {"web": 1}},
                {"until_tokens": 800, "weights": {"web": 1}},
                {"weights": {"web": 1}},
            ],
            "phase 2: until_tokens 800 is not more than that of the phase before",
        ),
    ],
)
def test_phases_that_make_no_sense_are_named(phases: list[dict], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(*phases)
    assert message in str(error.value)
