"""What a run leaves on disk, and how it is found again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.files.find import find_model_directory
from slmkit.training.logging.metrics_log import MetricsLog, append_samples, environment, rewind_samples
from slmkit.training.logging.plots import plot_losses
from slmkit.training.loop import Every, Goal, Report, RunStopped, State
from slmkit.training.run_directory import RunDirectory, new_run_directory
from tests.training import helpers
from tests.training.helpers import run


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(tmp_path: Path) -> None:
    losses = {4: 3.0, 8: 2.0, 12: 2.5}
    validate = Every(4, lambda state, report: report.update(validation_loss=losses[state.step]))
    final = run(tmp_path, hooks=(validate,), save_total_limit=1)
    assert final.best == {"step": 8, "validation_loss": 2.0}
    assert (tmp_path / "best").resolve().name == "step-000008"
    assert (tmp_path / "latest").resolve().name == "step-000012"
    assert find_model_directory(tmp_path).resolve().name == "step-000008"
    logged = {line["step"]: line.get("validation_loss") for line in MetricsLog(tmp_path / "metrics.jsonl").read()}
    assert {step: loss for step, loss in logged.items() if loss} == losses


def test_every_validation_is_logged_whatever_else_is(tmp_path: Path) -> None:
    validate = Every(4, lambda state, report: report.update(validation_loss=float(state.step)))
    run(tmp_path, hooks=(validate,), logging_steps=3, eval_steps=4)
    logged = [(line["step"], line.get("validation_loss")) for line in MetricsLog(tmp_path / "metrics.jsonl").read()]
    assert logged == [(3, None), (4, 4.0), (6, None), (8, 8.0), (9, None), (12, 12.0)]


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    def interrupt(state, report) -> None:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStopped, match=r"stopped after step 4 of 12; go on with: slm resume"):
        run(tmp_path, hooks=(Every(1, interrupt),))
    assert (tmp_path / "latest").resolve().name == "step-000004"
    assert signal.getsignal(signal.SIGTERM) is before
    assert run(tmp_path, resume=True).step == 12


def test_a_taken_name_gets_a_number_and_nothing_is_overwritten(tmp_path: Path) -> None:
    first = new_run_directory(tmp_path / "run")
    second, third = new_run_directory(tmp_path / "run"), new_run_directory(tmp_path / "run")
    assert [r.root.name for r in (first, second, third)] == ["run", "run-2", "run-3"]


def test_a_place_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a model directory nor a run"):
        find_model_directory(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        find_model_directory(tmp_path / "none")
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match="a run without a checkpoint yet: train on with `slm resume "):
        find_model_directory(tmp_path)


def test_metrics_survive_a_line_cut_short_and_are_rewound(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in log.read()] == [1, 2, 3]
    log.rewind(2)
    log.append({"step": 3})
    assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    reports = [{"step": i, "tokens": 100 * i, "loss": 5 / i, "validation_loss": 5 / i} for i in range(1, 9)]
    plot_losses(reports, tmp_path / "loss.png", "run", perfect_loss=0.5)
    with_line = (tmp_path / "loss.png").read_bytes()
    assert with_line.startswith(b"\x89PNG")
    plot_losses(reports, tmp_path / "loss.png", "run")
    assert (tmp_path / "loss.png").read_bytes() != with_line
    plot_losses([], tmp_path / "loss.png", "an empty run")


def test_samples_are_added_step_by_step(tmp_path: Path) -> None:
    append_samples(tmp_path / "samples.md", 10, [("Once", " upon\na time")])
    append_samples(tmp_path / "samples.md", 20, [("Once", " more")])
    assert (
        tmp_path / "samples.md"
    ).read_text() == "## Step 10\n\n> Once upon\n> a time\n\n## Step 20\n\n> Once more\n\n"


def test_samples_are_rewound_with_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "samples.md"
    append_samples(path, 1_000, [("Once", " upon\n## Step 5\n\na time"), ("There", " was")])
    whole = path.read_text()
    append_samples(path, 11_000, [("Once", " more")])
    longer = path.read_text()
    for cut in range(len(whole), len(longer) + 1):
        path.write_text(longer[:cut])
        rewind_samples(path, 1_000)
        assert path.read_text() == whole
    rewind_samples(path, 999)
    assert path.read_text() == ""


def test_the_environment_is_described_in_json(tmp_path: Path) -> None:
    described = json.loads(json.dumps(environment()))
    assert described["packages"]["torch"]
    assert RunDirectory(tmp_path).metrics.path == tmp_path / "metrics.jsonl"


def test_the_best_checkpoint_is_the_one_with_the_best_of_the_metric_that_is_named(tmp_path: Path) -> None:
    figures = {4: (3.0, 0.2), 8: (2.0, float("nan")), 12: (2.5, 0.4)}

    def evaluate(state: State, report: Report) -> None:
        report["validation_loss"], report["eval/task/acc"] = figures[state.step]

    goal = Goal("eval/task/acc", greater_is_better=True)
    final = run(tmp_path, hooks=(Every(4, evaluate),), goal=goal, save_total_limit=1)
    assert final.best == {"step": 12, "eval/task/acc": 0.4, "validation_loss": 2.5}
    assert (tmp_path / "best").resolve().name == "step-000012"
    assert final.evaluations == {"eval/task/acc": 0.4, "in_vain": 0}


def test_a_figure_that_is_not_a_number_is_never_the_best() -> None:
    nan, more, less = float("nan"), Goal("acc", greater_is_better=True), Goal()
    assert [more.is_better(2, 1), more.is_better(1, 1), more.is_better(0, 1)] == [True, False, False]
    assert [less.is_better(2, 1), less.is_better(1, 1), less.is_better(0, 1)] == [False, False, True]
    assert [goal.is_better(value, best) for goal in (more, less) for value, best in ((nan, None), (1, None))] == [
        False, True, False, True
    ]  # fmt: skip
    state = helpers.state()
    for value in (nan, 0.5, nan, 0.5, 0.6):
        more.note(state, {"acc": value})
    assert state.evaluations == {"acc": 0.6, "in_vain": 0}
    more.note(state, {"acc": nan})
    less.note(state, {"acc": 0.7})  # not its metric
    assert state.evaluations == {"acc": 0.6, "in_vain": 1}
    less.note(state, {"validation_loss": nan})
    assert state.evaluations == {"validation_loss": None, "in_vain": 1}
