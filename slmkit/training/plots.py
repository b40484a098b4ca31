"""Curves as pictures, of losses and of shares: of one run as it goes, and of several over each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from slmkit.config import UserError
from slmkit.training.run_log import MetricsLog

if TYPE_CHECKING:
    from slmkit.training.loop import Report

Axis = Literal["tokens", "time", "steps"]
KEYS = {"tokens": "tokens", "time": "seconds", "steps": "step"}


class Curves(NamedTuple):
    """What is drawn: a figure of training and the one of validation, as lines of metrics.jsonl call them."""

    trained: str
    validated: str
    label: str
    best: Callable[[Iterable[float]], float]


CURVES = {
    "right": Curves("answers/right", "validation/right", "share of right answers", max),
    "loss": Curves("loss", "validation_loss", "loss (nats per token)", min),
    "preferred": Curves("rewards/accuracy", "validation/rewards/accuracy", "share of pairs told apart", max),
}


def plot_losses(reports: list[Report], path: Path, title: str, perfect_loss: float | None = None) -> None:
    """Draw training and validation loss over tokens, and the loss of a perfect model where the corpus knows it."""
    try:
        from matplotlib.figure import Figure  # no global state and no window system, unlike pyplot
    except ImportError:
        return  # an optional extra: the figures are in metrics.jsonl all the same
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    trained = [(r["tokens"], r["loss"]) for r in reports]
    validated = [(r["tokens"], r["validation_loss"]) for r in reports if "validation_loss" in r]
    if trained:
        axes.plot(*zip(*trained), color="tab:blue", alpha=0.45, linewidth=1, label="training")
    if validated:
        axes.plot(*zip(*validated), color="tab:orange", marker="o", markersize=4, label="validation")
        tokens, loss = validated[-1]
        axes.annotate(f"{loss:.3f}", (tokens, loss), xytext=(0, 9), textcoords="offset points", ha="right")
    if perfect_loss is not None:
        axes.axhline(perfect_loss, color="tab:green", linestyle="--", label=f"a perfect model: {perfect_loss:.3f}")
    axes.set(xlabel="trained tokens", ylabel="loss (nats per token)", title=title)
    _finish(figure, axes, path)


def plot_shares(reports: list[Report], path: Path, title: str) -> None:
    """Draw the share of right answers, or of pairs told apart, over steps; nothing where a run has neither."""
    curves = next((each for name, each in CURVES.items() if name != "loss" and _has(reports, each)), None)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if curves is None:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    trained, validated = (
        [(r["step"], r[key]) for r in reports if key in r] for key in (curves.trained, curves.validated)
    )
    axes.plot(*zip(*trained), color="tab:blue", alpha=0.45, linewidth=1, label="training")
    if validated:
        axes.plot(*zip(*validated), color="tab:orange", marker="o", markersize=4, label="validation")
        axes.annotate(f"{validated[-1][1]:.3f}", validated[-1], xytext=(0, 9), textcoords="offset points", ha="right")
    axes.set(xlabel="steps", ylabel=curves.label, title=title, ylim=(-0.02, 1.02))
    _finish(figure, axes, path)


def _has(reports: Sequence[Report], curves: Curves) -> bool:
    return any(curves.trained in report for report in reports)


def plot_runs(runs: Sequence[str | Path], output: Path, over: Axis = "tokens", what: str | None = None) -> None:
    """Draw a figure of several runs over each other: training thin, validation with its marks, one colour a run.

    `what` is one of `CURVES`; None: the share of right answers where all runs have one, else the loss. Raises
    `UserError` for a run without figures, for one without those or the times that are asked for, and without
    matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install slmkit[train]") from None
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    reports = [_reports(Path(run)) for run in runs]
    drawn = CURVES[what or ("right" if all(_has(each, CURVES["right"]) for each in reports) else "loss")]
    curves = [_curve(Path(run), each, drawn, over) for run, each in zip(runs, reports)]
    divisor, unit = _unit(over, max(x for curve in curves for x, _ in curve[drawn.trained]))
    for number, (curve, name) in enumerate(zip(curves, _short_names(runs))):
        colour = f"C{number % 10}"
        validated = [(x / divisor, loss) for x, loss in curve[drawn.validated]]
        label = f"{name}: {drawn.best(loss for _, loss in validated):.3f}" if validated else name
        trained = [(x / divisor, loss) for x, loss in curve[drawn.trained]]
        axes.plot(*zip(*trained), color=colour, alpha=0.35, linewidth=1, label=None if validated else label)
        if validated:
            axes.plot(*zip(*validated), color=colour, marker="o", markersize=4, label=label)
    axes.set(xlabel=unit, ylabel=drawn.label, title="training thin, validation marked; its best in figures")
    _finish(figure, axes, output)


def _reports(run: Path) -> list[Report]:
    reports = MetricsLog(run / "metrics.jsonl").read()
    if not reports:
        raise UserError(f"{run}: no figures here (metrics.jsonl is missing or empty); expected a run directory")
    return reports


def _curve(run: Path, reports: list[Report], drawn: Curves, over: Axis) -> dict[str, list[tuple[float, float]]]:
    """Points (x, figure) of a run, of training and of validation."""
    if not _has(reports, drawn):
        raise UserError(f"{run}: its lines have no {drawn.trained!r}: draw the loss")
    key = KEYS[over]
    if key not in reports[0]:
        raise UserError(f"{run}: its lines have no {key!r}; draw it over tokens")
    return {
        name: [(report[key], report[name]) for report in reports if name in report]
        for name in (drawn.trained, drawn.validated)
    }


def _unit(over: Axis, largest: float) -> tuple[float, str]:
    """What the horizontal axis is divided by, and its label."""
    if over == "tokens":
        return 1.0, "trained tokens"
    if over == "steps":
        return 1.0, "steps"
    for seconds, unit in ((3_600, "hours"), (60, "minutes")):
        if largest >= 3 * seconds:
            return float(seconds), unit
    return 1.0, "seconds"


def _short_names(runs: Sequence[str | Path]) -> list[str]:
    """The runs' paths without the folders that all of them share."""
    paths = [Path(run).absolute() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def _finish(figure: Any, axes: Any, path: Path) -> None:
    """Axes as ours look, and the picture written in one step."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    fresh = path.with_suffix(".tmp.png")
    figure.savefig(fresh, dpi=120)
    os.replace(fresh, path)
