"""How far a figure may be from its true value: intervals, and paired differences of two models.

Every figure is a ratio of sums, R = Σa/Σb, or exp(R), where the part of an item in the error (`residuals`) is
multiplied by exp(R) (delta method). The standard error of the difference of two models on the same items is
sqrt(Σ(r₂ − r₁)²). Groups of tasks are results of their own (`task_results.group_result`). Miller 2024, "Adding error
bars to evals" (arXiv:2411.00640); Cochran 1977, "Sampling techniques".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slmkit.config import UserError
from slmkit.evaluation.results import FORMS, Form, TaskResult, figure_of

Pairs = Sequence[tuple[float, float]]  # numerator and denominator of each item
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


def estimate(result: TaskResult, metric: str) -> Estimate:
    """A figure with its interval.

    The interval of a share of items is Wilson's (1927), which is not empty at 0 and 100 %; that of a perplexity is exp
    of that of its logarithm; all others are Student's.
    """
    from scipy.stats import binomtest, t

    form, pairs = FORMS[result.metrics[metric]], [*_pairs(result, metric).values()]
    n, (value, parts) = len(pairs), _figure(pairs, form)
    if n < 2 or not math.isfinite(value):
        return Estimate(value, None, None, None, n)
    error = float(np.linalg.norm(parts))
    reach = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error
    low, high = value - reach, value + reach
    if form.is_exponential:
        low, high = value * math.exp(-reach / value), value * math.exp(reach / value)
    elif _is_share(pairs):
        low, high = map(float, binomtest(round(value * n), n).proportion_ci(LEVEL, method="wilson"))
    return Estimate(value, error, low, high, n)


def in_digits(result: TaskResult, metric: str) -> tuple[str, str]:
    """`0.3120` and `± 0.0147`: a figure and its standard error, which one item alone does not have; `0.0000` and
    `0.0000 to 0.0229`, the interval, for none or all of 164, whose standard error is 0.
    """
    score = result.score(metric)
    digits = 2 if math.isfinite(score.value) and abs(score.value) >= 100 else 4
    error = "" if score.standard_error is None else f"± {score.standard_error:,.{digits}f}"
    if score.standard_error == 0:
        found = estimate(result, metric)
        error = f"{found.low:,.{digits}f} to {found.high:,.{digits}f}"
    return f"{score.value:,.{digits}f}", error


def paired(a: TaskResult, b: TaskResult, metric: str) -> Difference:
    """Figure of `b` minus figure of `a` on their common items.

    Shares of items are compared by McNemar's exact test (1947), with the interval of Bonett and Price (2012), which is
    not empty if both models are right on the same items; all else by the paired t test. Raises `UserError` for
    recipes that differ in `MUST_AGREE`, for results without common items, and for a metric that is divided by other
    numbers of units.
    """
    from scipy.stats import t

    first, second, left_out = _common(a, b, metric)
    form, n = FORMS[a.metrics[metric]], len(first)
    (before, parts), (after, other_parts) = _figure(first, form), _figure(second, form)
    value = after - before
    if n < 2 or not math.isfinite(value):
        return Difference(value, None, None, None, n, None, left_out)
    error = float(np.linalg.norm(other_parts - parts))
    if _is_share(first) and _is_share(second):
        changes = [right - before for (before, _), (right, _) in zip(first, second)]
        return Difference(value, error, *_mcnemar(changes.count(1), changes.count(-1), n), left_out)
    reach = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(value) / error, n - 1)) if error else float(value == 0)
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


def _common(a: TaskResult, b: TaskResult, metric: str) -> tuple[Pairs, Pairs, int]:
    """The pairs of the items that both have, of each result, and the number of items that only one has."""
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
    found, others = [first[key] for key in keys], [second[key] for key in keys]
    if any(one[1] != other[1] for one, other in zip(found, others)):
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


def _figure(pairs: Pairs, form: Form) -> tuple[float, np.ndarray]:
    """The figure, and the part of each item in its error [items]; NaN for values that are not finite."""
    value, parts = figure_of(pairs, form) if np.isfinite(pairs).all() else (math.nan, [])
    return value, np.array(parts)


def _is_share(pairs: Pairs) -> bool:
    """Whether the figure is the share of items that are right."""
    return all(a in (0, 1) and b == 1 for a, b in pairs)


def _mcnemar(gained: int, lost: int, n: int) -> tuple[float, float, int, float]:
    """The interval of (gained − lost) / n, n, and p."""
    from scipy.stats import binomtest, norm

    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    reach = float(norm.ppf((1 + LEVEL) / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - reach), min(1.0, up - down + reach), n, p
