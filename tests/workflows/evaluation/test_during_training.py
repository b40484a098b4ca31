"""Tasks during training: their figures, the best checkpoint and early stopping by any metric, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import slmkit.training.logging.logger
from slmkit.config import UserError, load_settings
from slmkit.evaluation import stories
from slmkit.evaluation.results import TaskResult
from slmkit.training.checkpoints.checkpoint import STATE
from slmkit.training.estimate.forecast import PlanFile
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.evaluation.evaluate import uses_chat
from slmkit.workflows.train import resume_run, train_recipe
from tests.test_life import Silent
from tests.training.every_key import changed, make_world, scenario, train_until
from tests.training.ranks import on_ranks

TASK = "hellaswag"
STEPS = 8


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlanFile, "update", lambda *arguments: None)
    for draw in ("plot_losses", "plot_shares", "plot_tasks"):
        monkeypatch.setattr(slmkit.training.logging.logger, draw, lambda *arguments: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to train on, and a task whose right endings are in that text."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    (folder / "tasks").mkdir()
    endings = ["the tree", "xq zv w", "rain fell on", "qqq zz"]
    rows = [
        {"query": f"Fox: the fox ran over a hill {n}", "choices": endings[n % 4 :] + endings[: n % 4], "gold": n % 4}
        for n in range(12)
    ]
    (folder / "tasks" / f"{TASK}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(12)]
    (folder / "tasks" / "gsm8k-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return folder


def content_of(world: Path, root: Path, **keys: Any) -> dict[str, Any]:
    tasks = {"train.max_steps": STEPS, "train.eval_tasks": [TASK], "train.eval_task_data": str(world / "tasks")}
    return changed(scenario("text", world) | {"output_dir": str(root)}, tasks | keys)


def train(world: Path, root: Path, stop_at: int | None = None, **keys: Any) -> list[str]:
    """A run of 8 steps, stopped behind a step where that is asked for; returns what it said."""
    reporter = Silent()
    train_until(content_of(world, root, **keys), stop_at, reporter)
    return list(map(str, reporter.lines))


def lines_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def without_clock(root: Path) -> list[dict[str, Any]]:
    clock = ("tokens_per_second", "seconds", "mfu", "memory_bytes")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines_of(root)]


def state_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "latest" / STATE).read_text())


@pytest.fixture(scope="module")
def evaluated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a task at every second step."""
    root = tmp_path_factory.mktemp("evaluated") / "run"
    train(world, root, **{"train.eval_tasks_steps": 2, "train.metric_for_best_model": f"eval/{TASK}/acc"})
    return root


def test_the_figures_of_a_task_are_logged_with_their_standard_errors(evaluated: Path) -> None:
    lines = lines_of(evaluated)
    assert [line["step"] for line in lines if f"eval/{TASK}/acc" in line] == [2, 4, 6, 8]
    for line in lines[1::2]:
        accuracy = line[f"eval/{TASK}/acc"]
        assert round(accuracy * 12) == pytest.approx(accuracy * 12)
        spread = (accuracy * (1 - accuracy) / 11) ** 0.5
        assert line[f"eval/{TASK}/acc_stderr"] == pytest.approx(spread)
        assert f"eval/{TASK}/acc_norm" in line


def test_evaluation_changes_no_weight(evaluated: Path, world: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "plain", **{"train.eval_tasks": []})
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        assert (tmp_path / "plain/latest" / name).read_bytes() == (evaluated / "latest" / name).read_bytes(), name
    told = [{key: value for key, value in line.items() if "eval/" not in key} for line in without_clock(evaluated)]
    assert told == without_clock(tmp_path / "plain")


def test_the_best_checkpoint_is_the_one_with_the_best_metric(evaluated: Path) -> None:
    figures = {line["step"]: line[f"eval/{TASK}/acc"] for line in lines_of(evaluated) if f"eval/{TASK}/acc" in line}
    best = max(figures, key=lambda step: (figures[step], -step))
    assert state_of(evaluated)["best"][f"eval/{TASK}/acc"] == figures[best]
    assert (evaluated / "best").resolve().name == f"step-{best:06d}"


def test_a_stopped_and_resumed_run_has_the_same_figures_and_the_same_best(
    evaluated: Path, world: Path, tmp_path: Path
) -> None:
    root = tmp_path / "broken"
    train(world, root, 3, **{"train.eval_tasks_steps": 2, "train.metric_for_best_model": f"eval/{TASK}/acc"})
    assert lines_of(root)[-1]["step"] == 3
    resume_run(root, Silent())
    assert without_clock(root) == without_clock(evaluated)
    assert state_of(root) == state_of(evaluated)
    assert (root / "best").resolve().name == (evaluated / "best").resolve().name
    assert (root / "latest/model.safetensors").read_bytes() == (evaluated / "latest/model.safetensors").read_bytes()


@pytest.fixture
def accuracies(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the task is made to find, evaluation by evaluation of whichever run."""
    found = [0.2, 0.5, 0.4, 0.45, 0.9, 0.9, 0.9, 0.9]
    from slmkit.workflows import hooks

    def run(self: hooks.RunTasks, state: Any, report: dict[str, Any]) -> None:
        report[f"eval/{TASK}/acc"] = found[state.step - 1]

    monkeypatch.setattr(hooks.RunTasks, "__call__", run)
    return found


def test_early_stopping_waits_for_a_metric_of_which_more_is_better(
    world: Path, tmp_path: Path, accuracies: list[float]
) -> None:
    keys = {
        "train.metric_for_best_model": f"eval/{TASK}/acc", "train.eval_tasks_steps": 1,
        "train.early_stopping_patience": 2, "train.save_steps": 1,
    }  # fmt: skip
    said = train(world, tmp_path / "once", **keys)
    assert lines_of(tmp_path / "once")[-1]["step"] == 4
    assert any(f"step 4 of 8: eval/{TASK}/acc has not risen in 2 evaluations" in line for line in said)
    assert (tmp_path / "once/best").resolve().name == "step-000002"
    train(world, tmp_path / "broken", stop_at=3, **keys)
    resume_run(tmp_path / "broken", Silent())
    assert lines_of(tmp_path / "broken")[-1]["step"] == 4
    assert state_of(tmp_path / "broken") == state_of(tmp_path / "once")
    # With another metric the run that had ended goes on, and nothing is left of the count.
    resume_run(tmp_path / "once", Silent(), ["train.metric_for_best_model=validation_loss", "train.eval_steps=1"])
    assert lines_of(tmp_path / "once")[-1]["step"] > 4
    assert "validation_loss" in state_of(tmp_path / "once")["evaluations"]


def test_an_evaluation_that_fails_does_not_end_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmkit.evaluation import tasks

    asked, run_tasks = iter(range(99)), tasks.run_tasks

    def fail_at_first(*arguments: Any, **options: Any) -> Any:
        if next(asked) == 1:  # the first, before step 1, is the trial
            raise RuntimeError("out of memory")
        return run_tasks(*arguments, **options)

    monkeypatch.setattr(tasks, "run_tasks", fail_at_first)
    said = train(world, tmp_path / "run", **{"train.eval_tasks_steps": 4})
    assert [line["step"] for line in lines_of(tmp_path / "run") if f"eval/{TASK}/acc" in line] == [8]
    assert any("step 4: evaluation on tasks failed: RuntimeError: out of memory" in line for line in said)


def test_answers_that_are_longer_than_the_context_are_refused_or_shortened(world: Path, tmp_path: Path) -> None:
    keys = {"train.eval_tasks": ["gsm8k"], "train.eval_limit": 3, "train.max_steps": 1}
    with pytest.raises(UserError, match="leave no room for a prompt in the model's 64 .*train.eval_max_new_tokens"):
        train(world, tmp_path / "run", **keys)
    train(world, tmp_path / "run", **keys, **{"train.eval_max_new_tokens": 4})
    (line,) = lines_of(tmp_path / "run")
    assert {value for key, value in line.items() if key.startswith("eval/gsm8k/exact_match")} == {0.0}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train.eval_task_data": "none"}, "train.eval_task_data none: no such folder"),
        ({"train.metric_for_best_model": f"eval/{TASK}/accuracy"}, f"did you mean 'eval/{TASK}/acc"),
        ({"train.eval_tasks": [], "train.metric_for_best_model": "validation/right"}, "not measured in this run"),
    ],
)
def test_what_cannot_be_evaluated_ends_the_run_before_its_first_step(
    keys: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(world, tmp_path / "run", **keys)
    assert not (tmp_path / "run").exists()


def train_on_ranks(content: dict[str, Any]) -> None:
    train_recipe(load_settings(Recipe, content), Silent(), force=True)


def test_ranks_evaluate_what_one_process_does(world: Path, tmp_path: Path) -> None:
    keys = {
        "train.metric_for_best_model": f"eval/{TASK}/acc", "train.eval_tasks_steps": 2, "train.max_steps": 4,
        "train.early_stopping_patience": 1, "train.save_steps": 1,
    }  # fmt: skip
    train(world, tmp_path / "one", **keys)
    on_ranks(2, train_on_ranks, content_of(world, tmp_path / "two", **keys, **{"train.parallel": "fsdp"}))
    one, two = (
        {line["step"]: line.get(f"eval/{TASK}/acc") for line in lines_of(tmp_path / name)} for name in ("one", "two")
    )
    assert one == two
    assert state_of(tmp_path / "one")["evaluations"] == state_of(tmp_path / "two")["evaluations"]
    shutil.rmtree(tmp_path / "two")


def test_the_story_world_is_a_task_without_files(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks reach a model of plain text as plain text, as in `slm eval`, also if its tokenizer has a chat template."""
    found, report = list[TaskResult](), stories.story_report

    def recorded(*arguments: Any, **keywords: Any) -> list[TaskResult]:
        found.extend(results := report(*arguments, **keywords))
        return results

    monkeypatch.setattr(stories, "story_report", recorded)
    keys = {
        "train.eval_tasks": ["stories"], "train.eval_task_data": None, "train.eval_limit": 2, "train.max_steps": 1,
        "train.metric_for_best_model": "eval/stories/loss/bits_per_byte",
    }  # fmt: skip
    train(world, tmp_path / "run", **keys)
    (line,) = lines_of(tmp_path / "run")
    assert line["eval/stories/loss/bits_per_byte"] > 0
    assert state_of(tmp_path / "run")["best"]["eval/stories/loss/bits_per_byte"] > 0
    assert not [key for key in line if "fault" in key or "generator" in key]
    assert {result.recipe["form"] for result in found} == {"text"}
    assert not uses_chat(tmp_path / "run", "auto")
