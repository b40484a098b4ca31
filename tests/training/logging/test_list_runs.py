"""Runs, listed and drawn from what they leave on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slmkit.config import UserError, to_yaml
from slmkit.training.logging.list_runs import list_runs, read_run
from slmkit.training.logging.metrics_log import is_running, mark_running
from slmkit.training.logging.plots import plot_runs
from slmkit.training.loop import Every
from slmkit.training.recipe.recipe import Recipe
from tests.training.helpers import config, run, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of which was stopped half way."""
    folder = tmp_path_factory.mktemp("runs")
    losses = {4: 3.0, 8: 2.0, 12: 2.5}
    validate = Every(4, lambda state, report: report.update(validation_loss=losses[state.step]))
    for name, steps in (("whole", 12), ("group/half", 4)):
        root = folder / name
        run(root, hooks=(validate,), max_steps=steps)
        (root / "recipe.yaml").write_text(to_yaml(Recipe(output_dir=str(root), train=settings(max_steps=12))))
    return folder


def test_every_run_is_listed_with_how_it_stands(folder: Path) -> None:
    found = {run.root.name: run for run in list_runs(folder)}
    assert found.keys() == {"whole", "half"}
    whole, half = found["whole"], found["half"]
    assert (whole.step, whole.steps, whole.state, whole.validation_loss) == (12, 12, "finished", 2.0)
    assert (half.step, half.steps, half.state, half.validation_loss) == (4, 12, "stopped", 3.0)
    assert whole.tokens > half.tokens > 0
    shape = config()
    assert whole.parameters == shape.vocab_size * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32


def test_a_checkpoint_of_a_step_that_was_not_logged_counts(tmp_path: Path) -> None:
    run(tmp_path, max_steps=5, logging_steps=4)
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] < 5))
    (tmp_path / "recipe.yaml").write_text(to_yaml(Recipe(train=settings(max_steps=8))))
    overview = read_run(tmp_path)
    assert (overview.step, overview.steps, overview.state) == (5, 8, "stopped")


def test_a_run_is_running_as_long_as_its_process_lives(folder: Path) -> None:
    root = folder / "group" / "half"
    code = (
        "import sys; from pathlib import Path; from slmkit.training.logging.metrics_log import mark_running\n"
        "with mark_running(Path(sys.argv[1])): print('on', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        assert read_run(root).state == "running"
        process.kill()  # no chance to tidy up
        process.wait()
        assert read_run(root).state == "stopped"
    with mark_running(root):
        assert is_running(root)
    assert not is_running(root)


def test_reading_runs_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys; from slmkit.training.logging import plots\n"
        "from slmkit.training.logging.list_runs import list_runs\n"
        "list_runs(sys.argv[1]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("over", ["tokens", "time", "steps"])
def test_runs_are_drawn_over_each_other(folder: Path, tmp_path: Path, over: str) -> None:
    both, one = tmp_path / "both.png", tmp_path / "one.png"
    plot_runs([folder / "whole", folder / "group" / "half"], both, over)
    plot_runs([folder / "whole"], one, over)
    assert both.read_bytes().startswith(b"\x89PNG")
    assert both.read_bytes() != one.read_bytes()


def test_what_cannot_be_drawn_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing: no figures here"):
        plot_runs([tmp_path / "nothing"], tmp_path / "x.png")
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 8, "loss": 2.0}) + "\n")
    with pytest.raises(UserError, match="no 'seconds'"):
        plot_runs([old], tmp_path / "x.png", "time")
    with pytest.raises(UserError, match="no such folder"):
        list_runs(tmp_path / "none")
