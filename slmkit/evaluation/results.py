"""What an evaluation found, item by item, and the figures that are computed from it.

Every figure is a ratio of sums over the items, R = Σa/Σb: an accuracy is right answers over questions, bits per byte is
bits over bytes. Its standard error is that of a ratio estimator (Cochran 1977, "Sampling Techniques", section 2.11):
SE = sqrt(n/(n−1) Σ(a − R b)²) / Σb, which for b = 1 is s/√n. `FORMS` says how the ratio becomes the figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slmkit.config import UserError


@dataclass(frozen=True)
class Form:
    """How a ratio R becomes the figure, exp(R) or R itself, and whether more is better."""

    is_exponential: bool
    higher_is_better: bool


# The values of `TaskResult.metrics`.
FORMS = {
    "mean": Form(is_exponential=False, higher_is_better=True),  # accuracy, exact match, pass@k
    "loss": Form(is_exponential=False, higher_is_better=False),  # nats per token, bits per byte
    "exp": Form(is_exponential=True, higher_is_better=False),  # perplexity = exp(nats/tokens)
}


@dataclass(frozen=True)
class Item:
    """One document, question or story: the unit in which two models are paired."""

    id: str  # of the task's document, the same for every model: a content hash or a number
    values: Mapping[str, tuple[float, float]]  # metric → (numerator, denominator)
    text: Mapping[str, Any]  # for a reader: prompt, expected, given, error


@dataclass(frozen=True)
class Score:
    """A figure. `standard_error` is None for fewer than two items; `value` is NaN without any."""

    value: float
    standard_error: float | None
    n: int  # items


@dataclass(frozen=True)
class TaskResult:
    """Result of a model on a task.

    `recipe` has everything that determines the figures: beginning token, shots, dropped shots, normalisation, stride,
    window, template, seed, versions, and the data with its sha256.
    """

    task: str
    recipe: Mapping[str, Any]
    metrics: Mapping[str, str]  # metric → a name in `FORMS`
    items: tuple[Item, ...]
    errors: tuple[str, ...] = ()  # items that could not be asked; they do not count as wrong

    def score(self, metric: str) -> Score:
        """The figure of a metric, over the items that have it. Raises `KeyError` for a metric that the task lacks."""
        pairs = [item.values[metric] for item in self.items if metric in item.values]
        value, parts = figure_of(pairs, FORMS[self.metrics[metric]])
        error = math.sqrt(math.fsum(part**2 for part in parts)) if len(parts) > 1 else None
        return Score(value, error, len(pairs))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back unchanged, after `json.dumps` and `json.loads` too."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TaskResult:
        """Raises `UserError` for what `to_json` did not write."""
        try:
            metrics = dict[str, str](stored["metrics"])
            if unknown := [form for form in metrics.values() if form not in FORMS]:
                raise ValueError(f"unknown form {unknown[0]!r}")
            items = tuple(
                Item(item["id"], {name: (float(a), float(b)) for name, (a, b) in item["values"].items()}, item["text"])
                for item in stored["items"]
            )
            return cls(stored["task"], stored["recipe"], metrics, items, tuple(stored["errors"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"no result of an evaluation: {error!r}") from None


def figure_of(pairs: Sequence[tuple[float, float]], form: Form) -> tuple[float, list[float]]:
    """The figure, and the part of each item in its error: SE = sqrt(Σ part²). NaN if the denominators add up to 0."""
    ratio, parts = residuals(pairs)
    if not form.is_exponential:
        return ratio, parts
    figure = math.exp(ratio) if not ratio > 700 else math.inf  # 700: beyond it float64 overflows
    return figure, [figure * part for part in parts]  # delta method: the derivative of exp at R is exp(R)


def residuals(pairs: Sequence[tuple[float, float]]) -> tuple[float, list[float]]:
    """R = Σa/Σb, and the part of each item in its error, r = sqrt(n/(n−1)) (a − R b) / Σb: SE = sqrt(Σr²).

    NaN and no parts if the denominators add up to 0.
    """
    n, below = len(pairs), math.fsum(b for _, b in pairs)
    if not below:
        return math.nan, []
    ratio = math.fsum(a for a, _ in pairs) / below
    scale = math.sqrt(n / max(n - 1, 1)) / below
    return ratio, [scale * (a - ratio * b) for a, b in pairs]
