"""Comparing models: paired differences on the same items, each with a verdict in words, and a picture of them."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.evaluation.intervals import LEVEL, Difference, Estimate, differing, estimate, holm, paired
from slmkit.evaluation.results import FORMS, TaskResult

# The metric of a task that is compared: the first of these that it has, else its own first one. Losses per token are
# not compared where there are bits per byte, since tokens of two tokenizers are different units.
PREFERRED = ("bits_per_byte", "acc_norm", "acc")
MOST_ITEMS = 10_000_000  # of the items needed, above which there is no number
SCALES = {"mean": 100.0}  # forms that are shown in percent
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Row:
    """A model compared with the first one on a task."""

    task: str
    metric: str
    form: str  # a name in `FORMS`
    model: int  # its place in `Comparison.models`
    first: Estimate  # on all items of the first model
    second: Estimate  # on all items of this one
    difference: Difference  # this model minus the first one, on their common items
    recipe: Mapping[str, Any]  # of the first model; the others' parts that differ are in `Comparison.notes`
    p: float | None = None  # of the difference, corrected for the number of rows (Holm)
    verdict: str = ""

    @property
    def is_shown(self) -> bool:
        """Whether there is a difference, at `LEVEL`."""
        return self.p is not None and self.p < 1 - LEVEL

    @property
    def is_better(self) -> bool:
        """Whether this model is the better one of the two, shown or not."""
        return (self.difference.value > 0) == FORMS[self.form].higher_is_better


@dataclass(frozen=True)
class Comparison:
    """`notes`: what else a reader has to know, such as items that only one of the models has."""

    models: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"level": LEVEL, **asdict(self)}


def compare(
    models: Sequence[str], *, progress: Callable[[str, str, float | None], None], **settings: Any
) -> Comparison:
    """Evaluate all models with the same `settings`, keywords of `evaluate`, and compare the others with the first.

    With the template `auto`, tasks are asked as conversations if that suits all models, else none of them is: what has
    other prompts is not compared. `progress` gets the model, what is done and the share done. Raises `UserError` as
    `evaluate` and `compare_results`.
    """
    from slmkit.workflows.evaluation import evaluate as of_model  # loads torch, which stored results do not need

    evaluate = of_model.evaluate
    if settings.get("tasks") and settings.get("chat_template", "auto") == "auto":
        real = [model for model in models if not of_model.is_stored(model)]
        is_chat = all(of_model.uses_chat(model, "auto") for model in real)
        settings["chat_template"] = "chat" if real and is_chat else "none"
    return compare_results(
        models, [evaluate(model, progress=functools.partial(progress, model), **settings) for model in models]
    )


def read_results(paths: Sequence[str | Path]) -> tuple[list[str], list[list[TaskResult]]]:
    """Names of the models and their results in files that `slm eval --output` wrote. Raises `UserError` for others."""
    found = list[tuple[str, str, list[TaskResult]]]()
    for path in paths:
        models = dict[str, list[TaskResult]]()
        try:
            for one in json.loads(Path(path).read_text(encoding="utf-8"))["results"]:
                models.setdefault(one["model"], []).append(TaskResult.from_json(one))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, UserError):  # JSON's and Unicode's errors are ValueErrors
            raise UserError(f"{path}: expected a file that `slm eval --output` wrote") from None
        found += [(str(path), model, results) for model, results in models.items()]
    names = [model for _, model, _ in found]
    labels = [model if names.count(model) == 1 else f"{path}: {model}" for path, model, _ in found]
    return labels, [results for *_, results in found]


def compare_results(models: Sequence[str], results: Sequence[Sequence[TaskResult]]) -> Comparison:
    """The results of every other model compared with the first one's, for the tasks that both have.

    Raises `UserError` for fewer than two models, for recipes that cannot be compared, and if there is nothing to
    compare.
    """
    if not 2 <= len(models) <= len(LETTERS):
        raise UserError(f"compare: expected 2 to {len(LETTERS)} models, not {len(models)}")
    rows, notes = list[Row](), list[str]()
    first, *others = [{result.task: result for result in found} for found in results]
    for number, found in enumerate(others, 1):
        both = f"A and {LETTERS[number]}"
        notes += [f"{both}: only one of them has {task}" for task in sorted(first.keys() ^ found.keys())]
        for task in [task for task in first if task in found]:
            a, b = first[task], found[task]
            metrics = [name for name in (*PREFERRED, *a.metrics) if name in a.metrics and name in b.metrics]
            if not metrics:
                notes.append(f"{both}: {task} is not compared, since one of them answered none of its items")
                continue
            difference = paired(a, b, metrics[0])
            notes += [f"{both}: {key} {one} and {other}" for key, one, other in differing(a, b)]
            for letter, result in (("A", a), (LETTERS[number], b)):
                if result.errors:
                    notes.append(f"{letter}: {task}: {len(result.errors):,} not asked, such as {result.errors[0]}")
            if difference.left_out:
                notes.append(f"{both}: {task}: left out {difference.left_out:,} items that only one of them has")
            before, after = (estimate(result, metrics[0]) for result in (a, b))
            rows.append(Row(task, metrics[0], a.metrics[metrics[0]], number, before, after, difference, a.recipe))
    if not rows:
        raise UserError("; ".join(["compare: there is nothing to compare", *notes]))
    corrected = holm([row.difference.p for row in rows])
    rows = [replace(row, p=p, verdict=_verdict(replace(row, p=p), len(rows))) for row, p in zip(rows, corrected)]
    return Comparison(tuple(models), tuple(rows), tuple(dict.fromkeys(notes)))


def _verdict(row: Row, tests: int) -> str:
    if row.p is None:
        return "not tested: fewer than two items"
    if row.is_shown:
        return f"{LETTERS[row.model] if row.is_better else 'A'} is better"
    if not row.difference.standard_error:
        return "no difference shown: the same on every item"
    needed = row.difference.items_needed(tests)
    if needed is None:
        return "no difference shown"
    count = f"about {float(f'{needed:.2g}'):,.0f}" if needed <= MOST_ITEMS else f"more than {MOST_ITEMS:,}"
    return f"no difference shown; would take {count} items"


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of text. Shares are in percent, with the letter of the model where there are more than two."""
    other = "B" if len(comparison.models) == 2 else "other"
    rows = []
    for row in comparison.rows:
        letter = "" if other == "B" else f"{LETTERS[row.model]}: "
        found, scale = row.difference, SCALES.get(row.form, 1.0)
        digits = _digits(found, scale)
        value, low, high = (
            "" if each is None else f"{each * scale:+.{digits}f}" for each in (found.value, found.low, found.high)
        )
        p = "" if row.p is None else "< 0.001" if row.p < 0.001 else f"{row.p:.3f}"
        figures = figure(row.first, row.form), letter + figure(row.second, row.form)
        rows.append([row.task, row.metric, f"{found.n:,}", *figures, value, low and f"{low} to {high}", p, row.verdict])
    columns = ["task", "metric", "items", "A", other, f"{other} − A", f"{LEVEL:.0%} interval", "p", "verdict"]
    return columns, rows


def figure(found: Estimate, form: str) -> str:
    """`31.2 % ± 0.5`: a figure with its standard error; `0.0 % (0.0 to 2.3)`: with its interval, if the error is 0."""
    scale, unit = SCALES.get(form, 1.0), " %" if form in SCALES else ""
    error, low, high = found.standard_error, found.low, found.high
    digits = _digits(found, scale)
    value = f"{found.value * scale:,.{digits}f}{unit}"
    if error:
        return f"{value} ± {error * scale:.{digits}f}"
    if low is None or high is None or low == high:
        return value
    return f"{value} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"


def _digits(found: Estimate, scale: float) -> int:
    """Digits behind the point with which the error, or the interval, has two that count."""
    error = found.standard_error or (found.high or 0.0) - (found.low or 0.0)
    return min(8, max(0, 1 - math.floor(math.log10(error * scale)))) if error else 1 if scale > 1 else 4


def draw(comparison: Comparison, path: Path) -> None:
    """Write a picture of all differences with their intervals: a panel for each unit, with a line at zero.

    Raises `UserError` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install slmkit[train]") from None
    panels = dict[str, list[Row]]()
    for row in comparison.rows:
        better = "higher" if FORMS[row.form].higher_is_better else "lower"
        unit = "percentage points" if row.form in SCALES else row.metric.replace("_", " ")
        panels.setdefault(f"difference to A in {unit} ({better} is better)", []).append(row)
    tasks, others = [[*dict.fromkeys(row.task for row in rows)] for rows in panels.values()], len(comparison.models) - 1
    heights = [max(0.8, len(names) * (0.12 + 0.2 * others)) for names in tasks]  # inches
    size = 9, sum(heights) + 0.8 * len(panels) + 0.25 * (others + 3)
    image = Figure(size, layout="constrained")
    axes = image.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (label, rows), names in zip(axes, panels.items(), tasks):
        axis.axvline(0, color="black", linewidth=0.8)
        axis.plot(0, 0, alpha=0)  # the range of the axis has zero in it
        for row in rows:
            found, scale, color = row.difference, SCALES.get(row.form, 1.0), f"C{(row.model - 1) % 10}"
            y = names.index(row.task) + (row.model - (others + 1) / 2) * 0.7 / others
            if found.low is not None and found.high is not None:
                axis.plot([found.low * scale, found.high * scale], [y, y], color=color, linewidth=2)
            axis.plot(found.value * scale, y, "o", color=color, markerfacecolor=color if row.is_shown else "white")
        axis.set(xlabel=label, ylim=(len(names) - 0.4, -0.6))
        axis.set_yticks(range(len(names)), [_short(name, 56) for name in names])
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
    for number, model in enumerate(comparison.models):
        color = f"C{(number - 1) % 10}" if number else "black"
        axes[0].plot([], [], color=color, label=f"{LETTERS[number]}: {_short(model, 90)}")
    meaning = f"filled: a difference is shown; hollow: none is shown; lines: {LEVEL:.0%} intervals"
    axes[0].plot([], [], "o", color="gray", label=meaning)
    image.legend(loc="outside upper left", frameon=False)
    fresh = path.with_name(f"{path.stem}.tmp{path.suffix}")
    image.savefig(fresh, dpi=120)
    os.replace(fresh, path)


def _short(name: str, most: int) -> str:
    """A long name without its middle."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[len(name) + 1 - most + most // 3 :]}"
