"""Figures from items, and results that come back from JSON as they were."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from slmkit.config import UserError
from slmkit.evaluation.results import FORMS, Item, TaskResult


def result(*pairs: tuple[float, float], form: str = "mean") -> TaskResult:
    items = tuple(Item(str(n), {"m": pair}, {"given": "a"}) for n, pair in enumerate(pairs))
    return TaskResult("task", {"shots": 0, "data": {"name": "x"}}, {"m": form}, items, ("document 9: no room",))


def test_a_mean_has_the_error_s_over_root_n() -> None:
    score = result((1, 1), (0, 1), (0, 1), (1, 1), (1, 1)).score("m")
    assert score.value == pytest.approx(0.6)
    deviation = math.sqrt((3 * 0.4**2 + 2 * 0.6**2) / 4)
    assert score.standard_error == pytest.approx(deviation / math.sqrt(5))
    assert score.n == 5


def test_a_perplexity_is_the_exponential_of_the_ratio_and_its_error_by_the_delta_method() -> None:
    pairs = (10.0, 4.0), (3.0, 2.0), (9.0, 3.0)
    loss, perplexity = result(*pairs, form="loss").score("m"), result(*pairs, form="exp").score("m")
    assert loss.value == pytest.approx(22 / 9)
    assert perplexity.value == pytest.approx(math.exp(22 / 9))
    assert loss.standard_error is not None
    assert perplexity.standard_error == pytest.approx(loss.standard_error * math.exp(22 / 9))
    assert FORMS["mean"].higher_is_better
    assert not FORMS["exp"].higher_is_better


def test_what_has_no_figure_or_no_error() -> None:
    assert math.isnan(result().score("m").value)
    assert math.isnan(result((0, 0)).score("m").value)
    assert result((1, 1)).score("m").standard_error is None
    assert result((5_000.0, 1.0), (6_000.0, 1.0), form="exp").score("m").value == math.inf
    with pytest.raises(KeyError):
        result((1, 1)).score("other")


def test_items_without_the_metric_do_not_count() -> None:
    found = result((1, 1), (0, 1))
    more = TaskResult("task", {}, found.metrics, (*found.items, Item("2", {}, {})))
    assert more.score("m") == found.score("m")


def test_json_gives_the_same_back_and_other_json_is_refused() -> None:
    found = result((1, 1), (0, 1))
    stored: dict[str, Any] = json.loads(json.dumps(found.to_json()))
    assert TaskResult.from_json(stored) == found
    wrong: list[Any] = [
        [], {}, None, stored | {"metrics": {"m": "median"}}, stored | {"items": [{"id": "0"}]},
        stored | {"items": [{"id": "0", "values": {"m": [1]}, "text": {}}]},
    ]  # fmt: skip
    for one in wrong:
        with pytest.raises(UserError, match="no result of an evaluation"):
            TaskResult.from_json(one)
