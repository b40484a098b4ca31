"""Intervals: against closed forms, scipy and lm-eval, and by how often they hold the true value."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from slmkit.config import UserError
from slmkit.evaluation.intervals import Difference, differing, estimate, holm, paired
from slmkit.evaluation.results import Item, TaskResult
from slmkit.evaluation.task_results import Group, group_result

DRAWS = 2_000
FORMS = {"acc": "mean", "bits_per_byte": "loss", "perplexity": "exp"}


def result(pairs: Sequence[tuple[float, float]], metric: str = "acc", ids: Any = None, **recipe: Any) -> TaskResult:
    items = tuple(
        Item(str(name), {metric: (float(a), float(b))}, {}) for name, (a, b) in zip(ids or range(len(pairs)), pairs)
    )
    return TaskResult("task", recipe, {metric: FORMS[metric]}, items)


def right(answers: Sequence[float], **rest: Any) -> TaskResult:
    return result([(answer, 1) for answer in answers], **rest)


def share(right_ones: int, n: int) -> TaskResult:
    return right([1] * right_ones + [0] * (n - right_ones))


def test_the_error_of_a_mean_is_s_over_root_n() -> None:
    values = np.random.default_rng(1).normal(size=37)
    found = estimate(right(values), "acc")
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(stats.sem(values))
    reach = stats.t.ppf(0.975, 36) * stats.sem(values)
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach))


def test_the_error_of_a_ratio_and_of_its_exponential_is_that_of_the_score() -> None:
    """Also against the leave-one-out jackknife, which knows nothing of the formula."""
    generator = np.random.default_rng(2)
    tokens = generator.integers(50, 400, size=300)
    nats = tokens * generator.normal(3, 0.3, size=300)
    for metric in ("bits_per_byte", "perplexity"):
        one = result([*zip(nats, tokens)], metric)
        found, score = estimate(one, metric), one.score(metric)
        assert (found.value, found.standard_error, found.n) == pytest.approx(
            (score.value, score.standard_error, score.n)
        )
        without = (nats.sum() - nats) / (tokens.sum() - tokens)
        without = np.exp(without) if metric == "perplexity" else without
        jackknife = math.sqrt(299 / 300 * ((without - without.mean()) ** 2).sum())
        assert found.standard_error == pytest.approx(jackknife, rel=0.02)
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value < found.high


def test_perplexity_s_interval_is_exp_of_that_of_the_loss() -> None:
    pairs = [(30.0, 10.0), (10.0, 4.0), (90.0, 20.0)]
    loss, perplexity = (estimate(result(pairs, name), name) for name in ("bits_per_byte", "perplexity"))
    assert loss.low is not None
    assert loss.high is not None
    assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(loss.low), math.exp(loss.high)))


@pytest.mark.parametrize(("k", "n"), [(0, 164), (164, 164), (1, 20), (3, 5), (90, 200)])
def test_the_interval_of_a_share_is_wilson_s(k: int, n: int) -> None:
    z = stats.norm.ppf(0.975)
    centre = (k + z**2 / 2) / (n + z**2)
    reach = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    found = estimate(share(k, n), "acc")
    assert (found.low, found.high) == pytest.approx((centre - reach, centre + reach), abs=1e-12)


def test_none_of_164_is_not_zero_plus_minus_zero() -> None:
    found = estimate(share(0, 164), "acc")
    assert found.value == found.low == 0
    assert found.high == pytest.approx(0.0229, abs=1e-4)
    both_none = paired(share(0, 164), share(0, 164), "acc")
    assert (both_none.value, both_none.p) == (0, 1)
    assert both_none.high == -both_none.low == pytest.approx(0.0167, abs=1e-4)  # type: ignore[operator]


def group(tasks: Sequence[TaskResult], mean: str = "equal") -> TaskResult:
    """The group of some tasks, as `run_tasks` makes it."""
    common = {"data": {}, "shots": 0, "shots from": None, "dropped shots": 0, "cut on the left": 0}
    parts = [TaskResult(str(n), {**common, **one.recipe}, one.metrics, one.items) for n, one in enumerate(tasks)]
    return group_result("group", Group(tuple(part.task for part in parts), mean), parts)


def test_a_single_item_has_no_interval() -> None:
    one = result([(3.0, 2.0)], "bits_per_byte")
    found = estimate(one, "bits_per_byte")
    assert (found.value, found.standard_error, found.low, found.high, found.n) == (1.5, None, None, None, 1)
    both = paired(one, result([(2.0, 2.0)], "bits_per_byte"), "bits_per_byte")
    assert (both.value, both.standard_error, both.p) == (-0.5, None, None)
    assert both.items_needed() is None


def test_the_error_of_a_group_is_lm_eval_s() -> None:
    from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr, unweighted_mean_stderr

    generator = np.random.default_rng(3)
    answers = [generator.random(n) < p for n, p in ((200, 0.3), (320, 0.6), (900, 0.8))]
    tasks, errors = [right(each) for each in answers], [mean_stderr([*map(int, each)]) for each in answers]
    for task, error in zip(tasks, errors):
        assert estimate(task, "acc").standard_error == pytest.approx(error)
    equal, by_size = (estimate(group(tasks, mean), "acc") for mean in ("equal", "documents"))
    assert equal.value == pytest.approx(np.mean([each.mean() for each in answers]))
    assert equal.standard_error == pytest.approx(unweighted_mean_stderr(errors))
    assert by_size.value == pytest.approx(np.concatenate(answers).mean())
    # lm-eval weighs the tasks' variances by n - 1 and divides by the sum of these, we by n: 1 % at these sizes.
    pooled = pooled_sample_stderr(errors, [200, 320, 900])
    assert by_size.standard_error == pytest.approx(pooled, rel=0.01)
    halves = [right(answers[2][:450]), right(answers[2][450:])]
    same = pooled_sample_stderr([estimate(half, "acc").standard_error for half in halves], [450, 450])
    assert estimate(group(halves, "documents"), "acc").standard_error == pytest.approx(same)


def test_the_paired_test_is_scipy_s() -> None:
    generator = np.random.default_rng(4)
    first = generator.normal(size=50)
    second = first + generator.normal(0.1, 0.2, size=50)
    expected = stats.ttest_rel(second, first)
    found = paired(right(first), right(second), "acc")
    assert found.value == pytest.approx((second - first).mean())
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(expected.confidence_interval(0.95))


def test_shares_are_compared_by_mcnemar_s_test() -> None:
    """Of 100 items 12 became right and 3 wrong: closed forms of the test and of Bonett and Price's interval."""
    first, second = [1] * 30 + [0] * 12 + [1] * 3 + [0] * 55, [1] * 30 + [1] * 12 + [0] * 3 + [0] * 55
    found = paired(right(first), right(second), "acc")
    assert found.value == pytest.approx(0.09)
    assert found.p == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)
    up, down = 13 / 102, 4 / 102
    reach = stats.norm.ppf(0.975) * math.sqrt((up + down - (up - down) ** 2) / 102)
    assert (found.low, found.high) == pytest.approx((up - down - reach, up - down + reach))
    assert found.standard_error == pytest.approx(stats.sem(np.subtract(second, first)))


def test_equal_models_differ_by_nothing_and_others_by_something() -> None:
    generator = np.random.default_rng(5)
    nats = generator.normal(300, 40, size=60)
    one, other = (result([(each, 100) for each in nats * factor], "perplexity") for factor in (1, 1.03))
    same, changed = paired(one, one, "perplexity"), paired(one, other, "perplexity")
    assert (same.value, same.standard_error, same.low, same.high, same.p) == (0, 0, 0, 0, 1)
    assert changed.value == pytest.approx(other.score("perplexity").value - one.score("perplexity").value)
    assert changed.p is not None
    assert changed.p < 1e-9
    # The two standard errors alone would not show it: pairing removes what the items have in common.
    alone = math.hypot(one.score("perplexity").standard_error, other.score("perplexity").standard_error)  # type: ignore[arg-type]
    assert changed.value < 2 * alone


def test_the_order_of_the_items_changes_nothing() -> None:
    generator = np.random.default_rng(6)
    pairs = [(float(a), float(b)) for a, b in zip(generator.normal(20, 3, 40), generator.integers(5, 30, 40))]
    later = [(a * 1.1, b) for a, b in pairs]
    order = random.Random(0).sample(range(40), 40)
    one, two = (result(each, "perplexity") for each in (pairs, later))
    mixed = result([later[place] for place in order], "perplexity", ids=order)
    assert paired(one, two, "perplexity") == paired(one, mixed, "perplexity")
    assert estimate(two, "perplexity") == estimate(mixed, "perplexity")


def test_only_common_items_are_compared() -> None:
    first, second = right([1, 0, 1, 1, 0, 1]), right([1, 1, 0, 1], ids=[0, 1, 2, 9])
    found = paired(first, second, "acc")
    assert (found.n, found.left_out) == (3, 4)
    assert found.value == 0
    with pytest.raises(UserError, match="no item in common"):
        paired(first, right([1, 0], ids=["a", "b"]), "acc")


def test_items_that_occur_twice_are_both_counted() -> None:
    first, second = right([1, 1, 0, 0], ids=["a", "a", "b", "c"]), right([0, 0, 0, 0], ids=["a", "a", "b", "c"])
    found = paired(first, second, "acc")
    assert (found.value, found.n, found.left_out) == (-0.5, 4, 0)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("shots", (5, 0)),
        ("data", ({"name": "a.jsonl", "sha256": "1"}, {"name": "a.jsonl", "sha256": "2"})),
        ("template", ("chat", "none")),
    ],
)
def test_other_recipes_are_refused_by_name(key: str, values: tuple[Any, Any]) -> None:
    one, other = (right([1, 0, 1], **{key: value}) for value in values)
    with pytest.raises(UserError, match=f"task: not comparable: {key} .*; evaluate both with the same {key}"):
        paired(one, other, "acc")
    assert paired(one, one, "acc").value == 0


def test_other_names_of_the_same_file_and_other_windows_are_compared() -> None:
    one, other = (
        right([1, 0], data={"name": name, "sha256": "1"}, window=window) for name, window in (("a", 1), ("b", 2))
    )
    assert paired(one, other, "acc").value == 0
    assert differing(one, other) == [("window", 1, 2)]
    fewer = right([1], data={"name": "a", "sha256": "of one document"}, limit=1, window=1)
    assert paired(one, fewer, "acc").left_out == 1


def test_losses_per_token_of_two_tokenizers_are_refused() -> None:
    one, other = result([(30, 10), (40, 20)], "perplexity"), result([(30, 12), (40, 21)], "perplexity")
    with pytest.raises(UserError, match="bits per byte"):
        paired(one, other, "perplexity")


def test_holm() -> None:
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def coverage(draw: Callable[[np.random.Generator], tuple[float | None, float | None]], true: float) -> float:
    """The share of draws whose interval holds the true value."""
    generator = np.random.default_rng(11)
    held = 0
    for _ in range(DRAWS):
        low, high = draw(generator)
        assert low is not None
        assert high is not None
        held += low <= true <= high
    return held / DRAWS


# The standard deviation of a share of 2,000 draws at 95 % is 0.5 points.
@pytest.mark.parametrize("p", [0.4, 0.05])
def test_a_share_s_interval_holds_the_true_share(p: float) -> None:
    possible = [estimate(share(k, 40), "acc") for k in range(41)]

    def draw(generator: np.random.Generator) -> tuple[float | None, float | None]:
        found = possible[generator.binomial(40, p)]
        return found.low, found.high

    assert 0.93 < coverage(draw, p) < 0.985  # shares come in steps of 1/40


def test_a_ratio_s_interval_holds_the_true_ratio() -> None:
    """Documents of very different lengths, the long ones easier: the ratio is not the mean of the ratios."""

    def draw(generator: np.random.Generator) -> tuple[float | None, float | None]:
        tokens = generator.integers(20, 200, size=40)
        nats = tokens * generator.normal(3, 0.5, size=40) + (109.5 - tokens) / 2  # the mean length is 109.5
        found = estimate(result([*zip(nats, tokens)], "perplexity"), "perplexity")
        return found.low, found.high

    assert 0.93 < coverage(draw, math.exp(3.0)) < 0.97


@cache
def pair_of(gained: int, lost: int, both: int, neither: int) -> tuple[TaskResult, TaskResult]:
    """Results of two models: `gained` of the items only the second answers, `lost` of them only the first."""
    first = right([0] * gained + [1] * lost + [1] * both + [0] * neither)
    return first, right([1] * gained + [0] * lost + [1] * both + [0] * neither)


@cache
def difference(gained: int, lost: int, both: int, neither: int) -> Difference:
    return paired(*pair_of(gained, lost, both, neither), "acc")


def drawn(generator: np.random.Generator, n: int, gain: float, loss: float) -> Difference:
    gained, lost, neither = map(int, generator.multinomial(n, [gain, loss, 1 - gain - loss]))
    return difference(gained, lost, 0, neither)


@pytest.mark.parametrize(("n", "gain", "loss", "most"), [(60, 0.15, 0.03, 0.97), (200, 0.01, 0.01, 1.0)])
def test_a_paired_interval_of_shares_holds_the_true_difference(n: int, gain: float, loss: float, most: float) -> None:
    """With few changes, 4 of 200, the interval is wider than it has to be."""

    def draw(generator: np.random.Generator) -> tuple[float | None, float | None]:
        found = drawn(generator, n, gain, loss)
        return found.low, found.high

    assert 0.93 < coverage(draw, gain - loss) <= most


def test_a_paired_interval_of_losses_holds_the_true_difference() -> None:
    def draw(generator: np.random.Generator) -> tuple[float | None, float | None]:
        size = generator.integers(20, 200, size=30)
        hard = generator.normal(3, 0.5, size=30)
        first, second = (size * (hard + generator.normal(mean, 0.1, size=30)) for mean in (0, -0.05))
        pairs = (result([*zip(bits, size)], "bits_per_byte") for bits in (first, second))
        found = paired(*pairs, "bits_per_byte")
        return found.low, found.high

    assert 0.93 < coverage(draw, -0.05) < 0.97


def test_a_group_s_paired_interval_holds_the_true_difference() -> None:
    sizes, gains = (20, 60), (0.3, 0.1)

    def draw(generator: np.random.Generator) -> tuple[float | None, float | None]:
        counts = [generator.multinomial(n, [gain, 0.1, 0.9 - gain]) for n, gain in zip(sizes, gains)]
        pairs = [pair_of(int(gained), int(lost), 0, int(rest)) for gained, lost, rest in counts]
        found = paired(*map(group, zip(*pairs)), metric="acc")
        return found.low, found.high

    assert 0.93 < coverage(draw, 0.1) < 0.97


def test_a_group_s_difference_is_the_weighted_mean_of_its_tasks() -> None:
    firsts, seconds = zip(pair_of(6, 1, 10, 3), pair_of(9, 12, 20, 39))
    each = [paired(one, other, "acc") for one, other in zip(firsts, seconds)]
    for mean, weights in (("equal", (0.5, 0.5)), ("documents", (0.2, 0.8))):
        found = paired(group(firsts, mean), group(seconds, mean), "acc")
        assert found.value == pytest.approx(sum(w * one.value for w, one in zip(weights, each)))
        error = math.hypot(*(w * one.standard_error for w, one in zip(weights, each)))  # type: ignore[operator]
        assert found.standard_error == pytest.approx(error)
        assert found.n == 100


def test_equal_models_are_told_apart_in_no_more_than_5_percent() -> None:
    generator = np.random.default_rng(12)
    alarms = sum(drawn(generator, 80, 0.15, 0.15).p < 0.05 for _ in range(DRAWS))  # type: ignore[operator]
    assert 0.01 < alarms / DRAWS < 0.055  # McNemar's exact test is on the safe side


def test_the_items_needed_show_the_difference_with_the_promised_power() -> None:
    generator = np.random.default_rng(13)
    needed = difference(600, 200, 0, 1_200).items_needed()
    assert needed == pytest.approx((1.96 + 0.8416) ** 2 * (0.4 - 0.2**2) / 0.2**2, abs=1.1)
    shown = sum(drawn(generator, needed, 0.3, 0.1).p < 0.05 for _ in range(DRAWS))  # type: ignore[operator,arg-type]
    assert 0.7 < shown / DRAWS < 0.85
    more = difference(600, 200, 0, 1_200).items_needed(tests=10)
    assert more == pytest.approx((2.807 + 0.8416) ** 2 * 0.36 / 0.2**2, abs=1.1)
    assert difference(0, 0, 3, 9).items_needed() is None


@pytest.mark.parametrize("pairs", [[], [(0.0, 0.0), (0.0, 0.0)], [(math.nan, 1.0), (1.0, 1.0)], [(math.inf, 1.0)] * 2])
def test_what_has_no_figure_has_no_interval(pairs: list[tuple[float, float]]) -> None:
    items = tuple(Item(str(place), {"loss": pair}, {}) for place, pair in enumerate(pairs))
    found = estimate(TaskResult("task", {}, {"loss": "loss"}, items), "loss")
    assert not math.isfinite(found.value)
    assert (found.standard_error, found.low, found.high, found.n) == (None, None, None, len(pairs))
