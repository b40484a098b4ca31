"""Plots of metrics.jsonl: of one run while it trains, and of several runs together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from slmkit.config import UserError, importing
from slmkit.training.logging.metrics_log import MetricsLog

if TYPE_CHECKING:
    from slmkit.training.loop import Report

Axis = Literal["tokens", "time", "steps"]
KEYS = {"tokens": "tokens", "time": "seconds", "steps": "step"}
Points = list[tuple[float, float]]


class Curves(NamedTuple):
    """A plotted quantity: its keys in metrics.jsonl for training and validation, and the axis label."""

    trained: str
    validated: str
    label: str
    best: Callable[[Iterable[float]], float] | None = min
    legend: str = "training"


CURVES = {
    "right": Curves("answers/right", "validation/right", "share of right answers", max),
    "preferred": Curves("rewards/accuracy", "validation/rewards/accuracy", "share of pairs ranked correctly", max),
    "reward": Curves("answers/reward", "validation/reward", "mean reward of an answer", max),
    "loss": Curves("loss", "validation_loss", "cross-entropy (nats per token)"),
}
# The loss of each objective. A run is recognised by a key that only its lines have.
LOSSES = {
    "answers/reward": CURVES["reward"],  # GRPO's loss is about 0 by construction, so its reward is drawn
    "desirable": Curves("loss", "validation_loss", "KTO loss (mean per answer)"),
    "rewards/accuracy": Curves("loss", "validation_loss", "preference loss (mean per pair)"),
    "cross_entropy": Curves(
        "cross_entropy", "validation_loss", "nats per token", legend="training, cross-entropy of the labels"
    ),
}


TASKS = "eval/"  # begins the keys of evaluations on tasks
ERROR = "_stderr"  # ends the keys of standard errors


def curves_of(reports: Sequence[Report], what: str | None = None) -> Curves:
    """The curves called `what`; "loss" is the main quantity of these reports' objective, `eval/…` a task's figure."""
    if what is not None and what.startswith(TASKS):
        return Curves("", what, what.removeprefix(TASKS), best=None)
    if what is not None and what != "loss":
        return CURVES[what]
    return next((curves for key, curves in LOSSES.items() if any(key in each for each in reports)), CURVES["loss"])


def plot_losses(reports: list[Report], path: Path, title: str, perfect_loss: float | None = None) -> None:
    """Plot the main quantity of a run's objective over tokens, and a perfect model's loss if the corpus knows it.

    That is the cross-entropy (in distillation with the divergence from the teacher), the preference loss, or GRPO's
    reward. Does nothing without matplotlib.
    """
    _draw_run(reports, path, title, curves_of(reports), "tokens", perfect_loss)


def plot_shares(reports: list[Report], path: Path, title: str) -> None:
    """Plot the share of right answers, or of pairs ranked correctly, over steps; nothing if a run has neither."""
    for curves in (CURVES["right"], CURVES["preferred"]):
        if _points(reports, "step", curves.trained):
            _draw_run(reports, path, title, curves, "steps")
            return


def plot_tasks(reports: list[Report], path: Path, title: str) -> None:
    """Plot the first metric of each task over tokens, with one standard error; nothing without tasks or matplotlib."""
    shown: dict[str, str] = {}  # task → key of its first metric
    for key in (key for report in reports for key in report):
        if key.startswith(TASKS) and not key.endswith(ERROR):
            shown.setdefault(key.rpartition("/")[0], key)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not shown:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key in shown.values():
        measured = [each for each in reports if each.get(key) is not None]
        tokens, values = zip(*_points(measured, "tokens", key))
        errors = [each.get(key + ERROR) or 0.0 for each in measured]
        axes.errorbar(tokens, values, errors, marker="o", markersize=4, capsize=3, label=key.removeprefix(TASKS))
    axes.set(xlabel=_unit("tokens", 0)[1], ylabel="figure ± standard error", title=title)
    _finish(figure, axes, path)


def _draw_run(
    reports: list[Report], path: Path, title: str, curves: Curves, over: Axis, perfect_loss: float | None = None
) -> None:
    try:
        from matplotlib.figure import Figure  # no global state and no window system, unlike pyplot
    except ImportError:
        return  # an optional extra: metrics.jsonl has the figures
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    trained, validated = (_points(reports, KEYS[over], key) for key in (curves.trained, curves.validated))
    if trained:
        axes.plot(*zip(*trained), color="tab:blue", alpha=0.45, linewidth=1, label=curves.legend)
    if curves.trained == "cross_entropy" and (divergence := _points(reports, KEYS[over], "divergence")):
        axes.plot(
            *zip(*divergence), color="tab:purple", alpha=0.45, linewidth=1,
            label="training, divergence from the teacher",
        )  # fmt: skip
    if validated and curves.best is not None:
        x, best = next(point for point in validated if point[1] == curves.best(value for _, value in validated))
        label = f"validation, best {best:.3f} after {x:,.0f} {over}"
        axes.plot(*zip(*validated), color="tab:orange", marker="o", markersize=4, label=label)
        axes.plot(x, best, color="tab:orange", marker="*", markersize=12)
    if perfect_loss is not None:
        axes.axhline(perfect_loss, color="tab:green", linestyle="--", label=f"a perfect model: {perfect_loss:.3f}")
    axes.set(xlabel=_unit(over, 0)[1], ylabel=curves.label, title=title)
    if curves in (CURVES["right"], CURVES["preferred"]):
        axes.set(ylim=(-0.02, 1.02))
    _finish(figure, axes, path)


def _points(reports: Sequence[Report], x: str, y: str) -> Points:
    return [(report[x], report[y]) for report in reports if report.get(y) is not None and x in report]


def plot_runs(runs: Sequence[str | Path], output: Path, over: Axis = "tokens", what: str | None = None) -> None:
    """Plot several runs together, one colour each: training as a thin line, validation as a line with points.

    `what` is one of `CURVES`, or `eval/TASK/METRIC`; None: the share of right answers where all runs have one, else the
    loss. Raises `UserError` for a run without figures or without the requested ones, for losses of different kinds, and
    without matplotlib.
    """
    with importing("drawing needs matplotlib: pip install slmkit[train]"):
        from matplotlib.figure import Figure
    reports = [_reports(Path(run)) for run in runs]
    if what is None and all(_points(each, "step", CURVES["right"].trained) for each in reports):
        what = "right"
    drawn = [curves_of(each, what) for each in reports]
    labels = [curves.label for curves in drawn]
    if other := next((number for number, label in enumerate(labels) if label != labels[0]), None):
        raise UserError(f"{runs[0]} has the {labels[0]}, {runs[other]} the {labels[other]}: draw them separately")
    both = [_curve(Path(run), each, curves, over) for run, each, curves in zip(runs, reports, drawn)]
    divisor, unit = _unit(over, max(x for curves in both for points in curves for x, _ in points))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, ((trained, validated), name) in enumerate(zip(both, _short_names(runs))):
        best = drawn[0].best
        label = f", best validation {best(value for _, value in validated):.3f}" if validated and best else ""
        for points, style in ((trained, {"alpha": 0.35, "linewidth": 1}), (validated, {"marker": "o"})):
            axes.plot([x / divisor for x, _ in points], [y for _, y in points], color=f"C{number % 10}", **style)
        axes.plot([], [], color=f"C{number % 10}", label=name + label)
    if drawn[0].trained:
        axes.plot([], [], color="gray", alpha=0.5, linewidth=1, label="thin line: training")
        axes.plot([], [], color="gray", marker="o", label="line with points: validation")
    axes.set(xlabel=unit, ylabel=labels[0])
    _finish(figure, axes, output)


def _reports(run: Path) -> list[Report]:
    reports = MetricsLog(run / "metrics.jsonl").read()
    if not reports:
        raise UserError(f"{run}: no figures here (metrics.jsonl is missing or empty); expected a run directory")
    return reports


def _curve(run: Path, reports: list[Report], drawn: Curves, over: Axis) -> tuple[Points, Points]:
    """Points of training and of validation."""
    wanted = drawn.trained or drawn.validated
    if not any(wanted in report for report in reports):
        raise UserError(f"{run}: its lines have no {wanted!r}: draw the loss")
    if KEYS[over] not in reports[0]:
        raise UserError(f"{run}: its lines have no {KEYS[over]!r}; draw it over tokens")
    return _points(reports, KEYS[over], drawn.trained), _points(reports, KEYS[over], drawn.validated)


def _unit(over: Axis, largest: float) -> tuple[float, str]:
    """Divisor and label of the horizontal axis."""
    if over != "time":
        return 1.0, "trained tokens" if over == "tokens" else "steps"
    for seconds, unit in ((3_600, "hours"), (60, "minutes")):
        if largest >= 3 * seconds:
            return float(seconds), unit
    return 1.0, "seconds"


def _short_names(runs: Sequence[str | Path]) -> list[str]:
    """The runs' paths without their common parent folders."""
    paths = [Path(run).absolute() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def _finish(figure: Any, axes: Any, path: Path) -> None:
    """Set the style, and write the image atomically."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    fresh = path.with_suffix(".tmp.png")
    figure.savefig(fresh, dpi=120)
    os.replace(fresh, path)
