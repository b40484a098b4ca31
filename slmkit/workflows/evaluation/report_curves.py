"""The curves of a report: SVG by matplotlib in the page's own colours, and in words for those who cannot see them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slmkit.config import UserError
from slmkit.training.logging.plots import CURVES, curves_of

Points = list[tuple[float, float]]
POINTS = 600  # of a line at most; of more, the extremes of each stretch are drawn
SIZE = (5.4, 3.0)  # inches; the page scales it
# Drawn in these colours, which then become the style sheet's.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}
# Title, key in metrics.jsonl, unit.
MEASURED = (
    ("Learning rate", "learning_rate", ""),
    ("Gradient norm", "grad_norm", "before clipping"),
    ("Speed", "tokens_per_second", "trained tokens per second"),
)
TASKS, ERROR = "eval/", "_stderr"  # begins the keys of figures on tasks; ends those of their standard errors
AXES = ("step", "tokens", "seconds")


@dataclass(frozen=True)
class Line:
    label: str
    points: Points
    is_marked: bool = False  # few points, each an evaluation
    is_level: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    svg: str
    words: str  # what the curves show


def charts_of(reports: Sequence[dict[str, Any]], perfect_loss: float | None) -> tuple[list[Chart], list[Chart]]:
    """The curves of a run's metrics, and those of the remaining figures. Raises `UserError` without matplotlib."""
    main = curves_of(list(reports))
    title = "Reward" if main is CURVES["reward"] else "Loss"
    found = [_of_curves(title, main, reports, perfect_loss)]
    shares = (("Right answers", CURVES["right"]), ("Pairs ranked correctly", CURVES["preferred"]))
    found += [_of_curves(name, curves, reports) for name, curves in shares]
    keys = [*dict.fromkeys(key for report in reports for key in report)]
    tasks = [key for key in keys if key.startswith(TASKS) and not key.endswith(ERROR)]
    found += [
        drawn("Tasks", "", [Line(key.removeprefix(TASKS), _points(reports, key), True) for key in tasks[:6]]),
        *(drawn(name, unit, [Line("", _points(reports, key))]) for name, key, unit in MEASURED),
    ]
    known = {*AXES, main.trained, main.validated, *tasks[:6], *(key for _, key, _ in MEASURED), "divergence"}
    known |= {key for _, curves in shares for key in (curves.trained, curves.validated)}
    rest = [drawn(key, "", [Line("", _points(reports, key))]) for key in keys if key not in known]
    return [chart for chart in found if chart], [chart for chart in rest if chart]


def _of_curves(
    title: str, curves: Any, reports: Sequence[dict[str, Any]], perfect: float | None = None
) -> Chart | None:
    trained, validated = (_points(reports, key) for key in (curves.trained, curves.validated))
    lines = [Line(curves.legend, trained), Line("validation", validated, True)]
    if curves.trained == "cross_entropy":
        lines.append(Line("divergence from the teacher", _points(reports, "divergence")))
    if perfect is not None and (ends := trained or validated):
        level = [(ends[0][0], perfect), (ends[-1][0], perfect)]
        lines.append(Line(f"a perfect model: {perfect:.3f}", level, is_level=True))
    return drawn(title, curves.label, lines)


def _points(reports: Sequence[dict[str, Any]], key: str) -> Points:
    """(tokens, value) of each line that has the figure; NaN where it was not finite."""
    axis = "tokens" if any(report.get("tokens") for report in reports) else "step"
    values = [(report.get(axis), report[key]) for report in reports if key in report]
    return [
        (float(x), math.nan if y is None else float(y))
        for x, y in values
        if isinstance(x, int | float) and isinstance(y, int | float | None)
    ]


def drawn(title: str, unit: str, lines: Sequence[Line]) -> Chart | None:
    """A chart of the lines that have a finite point; None if none has."""
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return None
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install slmkit[train]") from None
    name = re.sub(r"\W", "-", title)
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.parse_math": False, "text.color": INK,
        "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "xtick.color": LINE, "ytick.color": LINE,
        "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "grid.color": LINE, "figure.facecolor": "none",
        "axes.facecolor": "none",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for line, colour in zip(lines, SERIES):
            x, y = zip(*thinned(line.points))
            marker = "o" if line.is_marked or len(x) == 1 else None
            width, dashes = (1.0 if len(x) > 60 else 1.6), ("--" if line.is_level else "-")
            axes.plot(x, y, color=colour, label=line.label, marker=marker, markersize=3.5, linewidth=width, ls=dashes)
        axes.set(xlabel="trained tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.5)
        if any(line.label for line in lines):
            axes.legend(frameon=False, fontsize=9, handlelength=1.4)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Chart(title, unit, inline(file.getvalue().decode(), name), words_of(lines))


def thinned(points: Points) -> Points:
    """At most about `POINTS` points: the lowest and highest of each stretch. NaN breaks the line, and is kept."""
    size = math.ceil(2 * len(points) / POINTS)
    if size <= 2:
        return points
    kept: Points = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        ends = [min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])] if finite else []
        broken = [point for point in stretch if not math.isfinite(point[1])][:1]
        kept += sorted({*ends, *broken}, key=lambda point: point[0])
    return kept


def inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: no prolog, its own names, the page's colours and fonts."""
    svg = svg[svg.index("<svg") :]
    for pattern, replacement in (
        (r"(?s)<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", ""),
        (r'(id="|url\(#|href="#)', rf"\g<1>{name}-"),
        (r'(<svg[^>]*?) (width|height)="[^"]*"', r"\1"),
        (r'(<svg[^>]*?) (width|height)="[^"]*"', r'\1 aria-hidden="true"'),
        (r"font-family: [^;\"]*;? ?|font-weight: 400; ?", ""),
    ):
        svg = re.sub(pattern, replacement, svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def words_of(lines: Sequence[Line]) -> str:
    """The course of each line in a sentence."""
    said = []
    for line in lines:
        finite = [point for point in line.points if math.isfinite(point[1])]
        (x, first), (end, last) = finite[0], finite[-1]
        low, high = (pick(finite, key=lambda point: point[1]) for pick in (min, max))
        what = f"{line.label}: " if line.label else ""
        if line.is_level or len(finite) == 1:
            said.append(f"{what}{last:.4g}" if not line.is_level else line.label)
            continue
        said.append(
            f"{what}{first:.4g} after {x:,.0f} tokens, {last:.4g} after {end:,.0f}; "
            f"lowest {low[1]:.4g} after {low[0]:,.0f}, highest {high[1]:.4g} after {high[0]:,.0f}"
        )
    return ". ".join(said) + "."
