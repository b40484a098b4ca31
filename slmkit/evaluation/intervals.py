"""How far a figure may be from its true value: intervals, and paired differences of two models.

Every figure is a ratio of sums, R = Σa/Σb. The linearised residual of an item is its part in the error of the figure,
r = sqrt(n/(n−1)) (a − R b) / Σb, times exp(R) where the figure is exp(R) (delta method). The standard error is
sqrt(Σr²); that of the difference of two models on the same items is sqrt(Σ(r₂ − r₁)²); that of a weighted mean of tasks
is sqrt(Σ w² SE²). Miller 2024, "Adding error bars to evals" (arXiv:2411.00640); Cochran 1977, "Sampling techniques".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slmkit.config import UserError
from slmkit.evaluation.results import FORMS, Form, TaskResult

LEVEL = 0.95  # of all intervals; differences are shown where p < 1 − LEVEL
POWER = 0.8  # probability of showing a difference with `Difference.items_needed`
# Results whose recipes differ in one of these are not compared. Other settings may differ, such as the window, which
# follows from the model's context.
MUST_AGREE = {"data", "documents", "version", "template", "shots", "samples", "temperature", "normalisation"}


@dataclass(frozen=True)
class Estimate:
    """A figure. Its standard error and interval are None if a task has fewer than two items."""

    value: float
    standard_error: float | None
    low: float | None
    high: float | None
    n: int  # items


@dataclass(frozen=True)
class Difference(Estimate):
    """Figure of the second model minus that of the first, on the items that both have."""

    p: float | None  # two-sided
    left_out: int  # items that only one of the two has

    def items_needed(self, tests: int = 1) -> int | None:
        """Items with which a difference of this size would be shown with probability `POWER`, as one of `tests`
        (Bonferroni), from the normal approximation; None if there is no difference or no standard error.
        """
        from scipy.stats import norm

        if not (self.value and self.standard_error):
            return None
        errors = norm.ppf(1 - (1 - LEVEL) / 2 / tests) + norm.ppf(POWER)
        return math.ceil(self.n * (errors * self.standard_error / self.value) ** 2)


def estimate(results: Sequence[TaskResult], metric: str, by_size: bool = False) -> Estimate:
    """The figure of one task, or the mean of those of several: all the same weight, or `by_size`, by their items.

    The interval of a share of items is Wilson's (1927), which is not empty at 0 and 100 %; that of a perplexity is exp
    of that of its logarithm; all others are Student's.
    """
    from scipy.stats import binomtest, t

    form, tasks = FORMS[results[0].metrics[metric]], [np.array([*_pairs(one, metric).values()]) for one in results]
    if not all(len(pairs) and pairs[:, 1].sum() and np.isfinite(pairs).all() for pairs in tasks):
        return Estimate(math.nan, None, None, None, sum(map(len, tasks)))
    value, parts, free = _mean(tasks, form, by_size)
    if free is None or not math.isfinite(value):
        return Estimate(value, None, None, None, len(parts))
    error = float(np.linalg.norm(parts))
    reach = t.ppf((1 + LEVEL) / 2, free) * error
    low, high = value - reach, value + reach
    if len(tasks) == 1 and form.is_exponential:
        low, high = value * math.exp(-reach / value), value * math.exp(reach / value)
    elif _are_shares(tasks):
        low, high = binomtest(round(value * len(parts)), len(parts)).proportion_ci(LEVEL, method="wilson")
    return Estimate(value, error, float(low), float(high), len(parts))


def paired(a: TaskResult, b: TaskResult, metric: str) -> Difference:
    """Figure of `b` minus figure of `a` on their common items. Raises as `paired_mean`."""
    return paired_mean([a], [b], metric)


def paired_mean(a: Sequence[TaskResult], b: Sequence[TaskResult], metric: str, by_size: bool = False) -> Difference:
    """`estimate` of the second model's results minus that of the first's, for the same tasks, on their common items.

    Shares of items are compared by McNemar's exact test (1947), with the interval of Bonett and Price (2012), which is
    not empty if both models are right on the same items; all else by the paired t test. Raises `UserError` for
    recipes that differ in `MUST_AGREE`, for results without common items, and for a metric that is divided by other
    numbers of units.
    """
    from scipy.stats import t

    common = [_common(one, other, metric) for one, other in zip(a, b, strict=True)]
    first, second, left_out = [one for one, *_ in common], [other for _, other, _ in common], sum(n for *_, n in common)
    form = FORMS[a[0].metrics[metric]]
    (before, parts, free), (after, other_parts, _) = (_mean(side, form, by_size) for side in (first, second))
    value, n = after - before, len(parts)
    if free is None:
        return Difference(value, None, None, None, n, None, left_out)
    error = float(np.linalg.norm(other_parts - parts))
    if _are_shares(first) and _are_shares(second):
        changes = second[0][:, 0] - first[0][:, 0]
        return Difference(value, error, *_mcnemar(int((changes > 0).sum()), int((changes < 0).sum()), n), left_out)
    reach = float(t.ppf((1 + LEVEL) / 2, free)) * error
    p = 2 * float(t.sf(abs(value) / error, free)) if error else float(value == 0)
    return Difference(value, error, value - reach, value + reach, n, p, left_out)


def differing(a: TaskResult, b: TaskResult) -> list[tuple[str, Any, Any]]:
    """(setting, in `a`, in `b`) of all settings of the recipes that differ, but for the names of files."""
    pairs = [(key, a.recipe.get(key), b.recipe.get(key)) for key in dict.fromkeys((*a.recipe, *b.recipe))]
    return [(key, one, other) for key, one, other in pairs if _nameless(one) != _nameless(other)]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values as those of one family of tests, so that any false alarm at all has the probability α (Holm 1979)."""
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted, largest = list[float | None]([None] * len(p_values)), 0.0
    for rank, (p, place) in enumerate(tested):
        adjusted[place] = largest = max(largest, min(1.0, p * (len(tested) - rank)))
    return adjusted


def _common(a: TaskResult, b: TaskResult, metric: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Pairs [items, 2] of the items that both have, of each result, and the number of items that only one has."""
    changed = {key: (one, other) for key, one, other in differing(a, b)}
    if "limit" in changed:  # then the hash of a text is that of fewer documents; equal ids are equal documents
        changed.pop("data", None)
    for key in changed.keys() & MUST_AGREE:
        raise UserError(
            f"{a.task}: not comparable: {key} {' and '.join(map(str, changed[key]))}; evaluate both with the same {key}"
        )
    first, second = _pairs(a, metric), _pairs(b, metric)
    keys = [key for key in first if key in second]
    if not keys:
        raise UserError(f"{a.task}: not comparable: the results have no item in common; evaluate both on the same data")
    found, others = np.array([first[key] for key in keys]), np.array([second[key] for key in keys])  # [items, 2]
    if (found[:, 1] != others[:, 1]).any():
        raise UserError(
            f"{a.task}: not comparable: the {metric} is over other numbers of units, as of tokens of other tokenizers; "
            "compare the bits per byte"
        )
    return found, others, len(first.keys() ^ second.keys())


def _nameless(value: Any) -> Any:
    """A part of a recipe without the names of files: their content is what counts."""
    if not isinstance(value, Mapping):
        return list(value) if isinstance(value, tuple) else value
    return {key: _nameless(inner) for key, inner in value.items() if key != "name"}


def _pairs(result: TaskResult, metric: str) -> dict[tuple[str, int], tuple[float, float]]:
    """(id of an item, how many before had the same) → (numerator, denominator)."""
    found = dict[tuple[str, int], tuple[float, float]]()
    before = Counter[str]()
    for item in result.items:
        if metric in item.values:
            found[item.id, before[item.id]] = item.values[metric]
            before[item.id] += 1
    return dict(sorted(found.items()))  # sums do not depend on the order of the items


def _mean(tasks: Sequence[np.ndarray], form: Form, by_size: bool) -> tuple[float, np.ndarray, int | None]:
    """Pairs [items, 2] of each task → the weighted mean of their figures, the residuals of all items [all items], and
    the degrees of freedom; None if a task has fewer than two items.
    """
    weights = [len(pairs) if by_size else 1 for pairs in tasks]
    value, residuals = 0.0, list[np.ndarray]()
    for pairs, weight in zip(tasks, weights):
        a, b = pairs.T
        n, ratio = len(pairs), a.sum() / b.sum()
        figure, slope = (np.exp(ratio), np.exp(ratio)) if form.is_exponential else (ratio, 1.0)
        value += weight / sum(weights) * figure
        bessel = math.sqrt(n / max(n - 1, 1))
        residuals.append(weight / sum(weights) * slope * bessel * (a - ratio * b) / b.sum())
    free = sum(map(len, tasks)) - len(tasks) if min(map(len, tasks)) > 1 else None
    return float(value), np.concatenate(residuals), free


def _are_shares(tasks: Sequence[np.ndarray]) -> bool:
    """Whether this is one task whose figure is the share of its items that are right."""
    return len(tasks) == 1 and bool(np.isin(tasks[0][:, 0], (0, 1)).all() and (tasks[0][:, 1] == 1).all())


def _mcnemar(gained: int, lost: int, n: int) -> tuple[float, float, int, float]:
    """The interval of (gained − lost) / n, n, and p."""
    from scipy.stats import binomtest, norm

    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    reach = float(norm.ppf((1 + LEVEL) / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - reach), min(1.0, up - down + reach), n, p
