"""What is drawn of each kind of run, and what the axes and legends say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from slmkit.config import UserError
from slmkit.training.logging import plots
from slmkit.training.logging.plots import plot_losses, plot_runs, plot_shares, plot_tasks

# What the lines of each objective hold besides, and the label of the axis they are drawn on.
KINDS: dict[str, tuple[dict[str, float], str]] = {
    "pretrain": ({}, "cross-entropy (nats per token)"),
    "distill": ({"cross_entropy": 2.0, "divergence": 1.0}, "nats per token"),
    "dpo": ({"rewards/accuracy": 0.5}, "preference loss (mean per pair)"),
    "kto": ({"desirable": 0.5, "divergence": 0.1}, "KTO loss (mean per answer)"),
    "grpo": ({"answers/reward": 0.4, "answers/right": 0.4, "validation/reward": 0.3}, "mean reward of an answer"),
}


def reports(kind: str) -> list[dict[str, Any]]:
    losses = [3.0, 2.0, 2.5]
    return [
        {"step": step, "tokens": 1000 * step, "seconds": 1.0 * step, "loss": loss, "validation_loss": loss / 2}
        | {name: value / step for name, value in KINDS[kind][0].items()}
        for step, loss in enumerate(losses, start=1)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes that are drawn, as they are when the picture is written."""
    seen: list[Axes] = []
    finish = plots._finish

    def keep(figure: Any, axes: Axes, path: Path) -> None:
        seen.append(axes)
        finish(figure, axes, path)

    monkeypatch.setattr(plots, "_finish", keep)
    return seen


def legend(axes: Axes) -> list[str]:
    return [str(label) for label in axes.get_legend_handles_labels()[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_axis_says_what_is_drawn(kind: str, drawn: list[Axes], tmp_path: Path) -> None:
    plot_losses(reports(kind), tmp_path / "loss.png", kind)
    assert drawn[0].get_ylabel() == KINDS[kind][1]
    run = tmp_path / kind
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reports(kind)))
    plot_runs([run], tmp_path / "runs.png", "steps", "loss")
    assert drawn[1].get_ylabel() == KINDS[kind][1]


def test_the_best_validation_is_given_in_figures(drawn: list[Axes], tmp_path: Path) -> None:
    plot_losses(reports("pretrain"), tmp_path / "loss.png", "run", perfect_loss=0.5)
    assert legend(drawn[0]) == ["training", "validation, best 1.000 after 2,000 tokens", "a perfect model: 0.500"]
    plot_losses(reports("grpo"), tmp_path / "loss.png", "run")
    assert "validation, best 0.300 after 1,000 tokens" in legend(drawn[1])  # of rewards the highest is the best
    plot_shares(reports("grpo"), tmp_path / "shares.png", "run")
    assert drawn[2].get_ylabel() == "share of right answers"


def test_a_distillation_draws_the_parts_that_validation_can_be_compared_with(drawn: list[Axes], tmp_path: Path) -> None:
    plot_losses(reports("distill"), tmp_path / "loss.png", "run")
    lines = {str(line.get_label()): [float(y) for y in line.get_ydata()] for line in drawn[0].get_lines()}
    assert lines["training, cross-entropy of the labels"] == [2.0, 1.0, 2.0 / 3]
    assert lines["training, divergence from the teacher"] == [1.0, 0.5, 1.0 / 3]


def test_losses_of_different_kinds_are_not_drawn_on_one_axis(tmp_path: Path) -> None:
    for kind in ("pretrain", "dpo"):
        (tmp_path / kind).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in reports(kind))
        (tmp_path / kind / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="preference loss .*draw them separately"):
        plot_runs([tmp_path / "pretrain", tmp_path / "dpo"], tmp_path / "x.png")


def test_tasks_are_drawn_with_their_standard_errors(drawn: list[Axes], tmp_path: Path) -> None:
    lines = reports("pretrain")
    for line, accuracy in zip(lines[::2], (0.25, 0.5)):
        line |= {"eval/arc/acc": accuracy, "eval/arc/acc_stderr": 0.1, "eval/arc/acc_norm": 0.9, "eval/wiki/bits": 2.0}
    lines[-1]["eval/wiki/bits"] = None  # a figure that was not finite
    plot_tasks(lines, tmp_path / "tasks.png", "run")
    assert legend(drawn[0]) == ["arc/acc", "wiki/bits"]
    (line, (low, high), _), _ = drawn[0].containers
    assert [float(y) for y in line.get_ydata()] == [0.25, 0.5]
    assert [float(y) for y in low.get_ydata()] == pytest.approx([0.15, 0.4])
    assert [float(y) for y in high.get_ydata()] == pytest.approx([0.35, 0.6])
    plot_tasks(reports("pretrain"), tmp_path / "none.png", "run")
    assert not (tmp_path / "none.png").exists()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_runs([tmp_path], tmp_path / "runs.png", "steps", "eval/arc/acc")
    assert drawn[1].get_ylabel() == "arc/acc"
    assert legend(drawn[1]) == [tmp_path.name]
    with pytest.raises(UserError, match="no 'eval/arc/f1'"):
        plot_runs([tmp_path], tmp_path / "x.png", "steps", "eval/arc/f1")
