"""What must not reach the weights does not; what does not stop is taken back or ended; and all of it is repeatable."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.training import loop
from slmkit.training.guards import Diverged, Guard, GuardSettings
from slmkit.training.logging.metrics_log import MetricsLog
from slmkit.training.loop import Every, State, train, train_step
from slmkit.training.objective import Objective, next_token
from tests.training.checkpoints.test_checkpoint import assert_same_run
from tests.training.helpers import Changed, plan, run, snapshot_of, state, stream

pytestmark = pytest.mark.usefixtures("without_plan_and_pictures")


def poisoned(factor: float, steps: set[int], learner: State) -> Objective:
    """The objective, with the loss of some steps times a factor."""

    return Changed(lambda loss: loss * factor if learner.step + 1 in steps else loss)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_the_run_goes_on(factor: float) -> None:
    learner, reports = state(), []
    objective = poisoned(factor, {3}, learner)
    train(learner, objective, stream(), plan(2))
    before, tokens = snapshot_of(learner), learner.tokens
    report = train_step(learner, objective, stream().batch(2), plan(9))
    assert report["skipped"].startswith("the loss is ")
    assert snapshot_of(learner) == before
    assert (learner.step, learner.tokens, learner.guard.skipped, learner.guard.in_a_row) == (3, tokens, 1, 1)
    train(learner, objective, stream(), plan(5), [Every(1, lambda s, r: reports.append(r))])
    assert snapshot_of(learner) != before
    assert all(math.isfinite(r["loss"]) and "skipped" not in r for r in reports)
    assert (learner.guard.skipped, learner.guard.in_a_row) == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(value: float) -> None:
    learner = state()
    train(learner, next_token, stream(), plan(1))
    before = snapshot_of(learner)
    handle = learner.model.blocks[0].mlp.up.weight.register_hook(lambda gradient: gradient * value)
    report = train_step(learner, next_token, stream().batch(1), plan(9))
    handle.remove()
    assert math.isfinite(report["loss"])
    assert report["skipped"].startswith("the gradient norm is ")
    assert snapshot_of(learner) == before


def test_a_spike_is_refused_where_that_is_asked_for() -> None:
    asked = dataclasses.replace(plan(30), guard=GuardSettings(max_spike=20))
    for settings, expected in ((asked, [25]), (plan(30), [])):
        learner, skipped = state(), []
        note = Every(1, lambda s, report, skipped=skipped: skipped.append(s.step) if "skipped" in report else None)
        train(learner, poisoned(1e4, {25}, learner), stream(), settings, [note])
        assert skipped == expected
        assert len(learner.guard.norms) == 30 - len(expected)


def test_the_median_is_of_the_last_steps_that_were_taken() -> None:
    guard, settings = Guard(), GuardSettings(max_spike=3, window=16)
    for norm in [100.0] * 10 + [1.0] * 16:
        assert guard.judge(settings, 1.0, norm) is None
    assert guard.judge(settings, 1.0, 2.9) is None
    assert guard.judge(settings, 1.0, 3.1) == "the gradient norm 3.1 is 3.1 times the recent median"
    assert 3.1 not in guard.norms
    assert len(guard.norms) == 16


def test_too_many_in_a_row_are_a_divergence() -> None:
    learner = state()
    settings = dataclasses.replace(plan(30), guard=GuardSettings(max_skipped=3))
    with pytest.raises(Diverged, match="3 steps in a row"):
        train(learner, poisoned(math.nan, {4, 5, 7, 8, 9}, learner), stream(), settings)
    assert learner.step == 9


@pytest.fixture
def dies_at(monkeypatch: pytest.MonkeyPatch):
    """Have the loss of some steps be NaN, whether they are reached at once or after resuming."""
    step_as_it_is = loop.train_step

    def plant(steps: set[int], most_rollbacks: int = 99) -> None:
        def step(learner, objective, batch, settings):
            dies = learner.step + 1 in steps and learner.guard.rollbacks <= most_rollbacks
            return step_as_it_is(learner, poisoned(math.nan, steps, learner) if dies else objective, batch, settings)

        monkeypatch.setattr(loop, "train_step", step)

    return plant


class PowerCut(BaseException):
    pass


def power_cut(at: int, rollbacks: int) -> Every:
    def hook(learner: State, report: dict) -> None:
        if (learner.step, learner.guard.rollbacks) == (at, rollbacks):
            raise PowerCut

    return Every(1, hook)


SHORT = {"max_steps": 12, "eval_steps": 4, "logging_steps": 1, "save_total_limit": 2, "warmup_steps": 0,
         "min_learning_rate_ratio": 1.0, "learning_rate": 0.01}  # fmt: skip


def test_a_divergence_stops_the_run_with_a_report(dies_at, tmp_path: Path) -> None:
    dies_at({6, 7})
    with pytest.raises(UserError, match=r"2 steps in a row were refused, steps 6 to 7; .* slm replay .* --step 6"):
        run(tmp_path, guard={"max_skipped": 2}, **SHORT)
    lines = MetricsLog(tmp_path / "metrics.jsonl").read()
    assert [line["step"] for line in lines if "skipped" in line] == [6, 7]
    assert lines[-1]["skipped"] == "the loss is nan"
    assert lines[-1]["loss"] is None  # there is no NaN in JSON


@pytest.mark.parametrize(("save_steps", "back"), [(4, 4), (3, 3)])  # 3: one is saved in the midst of the refused steps
def test_a_divergence_rolls_back_with_a_lower_rate(dies_at, save_steps: int, back: int, tmp_path: Path) -> None:
    """And the run ends the same wherever it is killed before and after that."""
    dies_at({5, 6, 7}, most_rollbacks=0)
    changes = SHORT | {"save_steps": save_steps, "guard": {"max_skipped": 3, "on_divergence": "rollback"}}
    warnings: list[str] = []
    whole = run(tmp_path / "whole", warn=warnings.append, **changes)
    assert warnings[-1] == f"3 steps in a row were refused, steps 5 to 7; back to step {back}, learning rate × 0.5"
    assert (whole.guard.rollbacks, whole.guard.skipped) == (1, 3)
    lines = MetricsLog(tmp_path / "whole" / "metrics.jsonl").read()
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["learning_rate"] for line in lines] == [0.01] * back + [0.005] * (12 - back)
    for place in ((5, 0), (6, 0), (7, 0), (5, 1), (9, 1)):
        root = tmp_path / f"killed-{place}"
        with pytest.raises(PowerCut):
            run(root, hooks=(power_cut(*place),), **changes)
        run(root, resume=True, **changes)
        assert_same_run(root, tmp_path / "whole")


def test_rollbacks_in_vain_end_the_run(dies_at, tmp_path: Path) -> None:
    dies_at({6, 7})
    guard = {"max_skipped": 2, "on_divergence": "rollback", "max_rollbacks": 2}
    with pytest.raises(UserError, match=r"rolled back 2 times"):
        run(tmp_path, guard=guard, **SHORT)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(dies_at, tmp_path: Path) -> None:
    dies_at({2, 3})
    with pytest.raises(UserError, match="no checkpoint yet to go back to"):
        run(tmp_path, guard={"max_skipped": 2, "on_divergence": "rollback"}, **SHORT)
