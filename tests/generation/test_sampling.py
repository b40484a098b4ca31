"""Every rule of sampling means what it means in transformers or OpenAI's interface, for each row of a batch alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from slmkit.generation.sampling import (
    FAULTS,
    draw,
    log_probabilities,
    penalized,
    points,
    probabilities,
    prompt_log_probabilities,
    sample,
    seed_of,
    uniform,
)
from slmkit.generation.sampling_settings import SamplingSettings
from tests.long import several

process = pytest.importorskip("transformers.generation.logits_process")
scipy_stats = pytest.importorskip("scipy.stats")


@dataclass
class Row:
    """A row of a batch as `sample` sees it."""

    settings: SamplingSettings = field(default_factory=SamplingSettings)
    ids: Sequence[int] = (0, 1)
    prompt_length: int = 2
    seed: int = 0
    allowed: Tensor | None = None


def rows_of(count: int = 1, **values: Any) -> list[Row]:
    """Rows of the same settings with the seeds 0, 1, …"""
    settings = SamplingSettings(**values)
    return [Row(settings, seed=seed) for seed in range(count)]


def random_logits(seed: int = 0, rows: int = 64, vocab_size: int = 1000, spread: float = 3) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


LOGITS = {
    "flat": random_logits(spread=0.1),
    "peaked": random_logits(spread=3),
    "few tokens": random_logits(vocab_size=7),
    "with impossible ones": random_logits().masked_fill(random_logits(1) > 0, -torch.inf),
}
COARSE = random_logits().round()  # many ties, as in bfloat16
RULES = [
    ({"temperature": 0.3}, lambda: process.TemperatureLogitsWarper(0.3)),
    ({"temperature": 40.0}, lambda: process.TemperatureLogitsWarper(40.0)),
    ({"top_k": 1}, lambda: process.TopKLogitsWarper(1)),
    ({"top_k": 17}, lambda: process.TopKLogitsWarper(17)),
    ({"top_k": 300}, lambda: process.TopKLogitsWarper(300)),
    ({"top_k": 100_000}, lambda: process.TopKLogitsWarper(100_000)),
    ({"top_p": 0.05}, lambda: process.TopPLogitsWarper(0.05)),
    ({"top_p": 0.5}, lambda: process.TopPLogitsWarper(0.5)),
    ({"top_p": 0.999}, lambda: process.TopPLogitsWarper(0.999)),
    ({"min_p": 0.1}, lambda: process.MinPLogitsWarper(0.1)),
    ({"min_p": 0.9}, lambda: process.MinPLogitsWarper(0.9)),
    ({"typical_p": 0.1}, lambda: process.TypicalLogitsWarper(0.1)),
    ({"typical_p": 0.7}, lambda: process.TypicalLogitsWarper(0.7)),
    ({"typical_p": 0.99}, lambda: process.TypicalLogitsWarper(0.99)),
]


def assert_same_distribution(ours: Tensor, theirs: Tensor) -> None:
    """Our probabilities [rows, vocab_size] and their logits [rows, vocab_size] in float64."""
    expected = theirs.softmax(-1)
    differs = (ours > 0) != (expected > 1e-45)
    assert differs.sum() <= 1, "at most one token of all rows, at a border within rounding"
    rows = ~differs.any(-1)
    torch.testing.assert_close(ours[rows].double(), expected[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(("values", "theirs"), RULES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_rule_equals_the_reference(values: dict[str, Any], theirs: Any, kind: str) -> None:
    logits = LOGITS[kind]
    ours = probabilities(logits, rows_of(len(logits), **values))
    assert_same_distribution(ours, theirs()(None, logits.double()))


@pytest.mark.parametrize(("values", "theirs"), RULES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_of_what_ties_with_the_last_token_kept_all_is_kept(values: dict[str, Any], theirs: Any) -> None:
    """transformers keeps all of them too, but for top-p, where the order of its sort decides."""
    ours = probabilities(COARSE, rows_of(len(COARSE), **values)) > 0
    expected = theirs()(None, COARSE)
    if "top_p" in values:
        least = expected.masked_fill(expected == -torch.inf, torch.inf).amin(-1, keepdim=True)
        expected = COARSE.masked_fill(least > COARSE, -torch.inf)
    assert torch.equal(ours, expected.isfinite())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [5, 50, 700])
def test_all_rules_together_equal_the_reference_in_its_order(k: int, seed: int) -> None:
    logits = random_logits(seed)
    ids = torch.randint(1000, (64, 20), generator=torch.Generator().manual_seed(seed))
    settings = SamplingSettings(
        temperature=0.7, top_k=k, top_p=0.9, min_p=0.05, typical_p=0.8, repetition_penalty=1.2, logit_bias={3: 4, 5: -9}
    )
    theirs = logits.double()
    for warper in (
        process.SequenceBiasLogitsProcessor({(3,): 4.0, (5,): -9.0}),
        process.RepetitionPenaltyLogitsProcessor(1.2),
        process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(k),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(0.05),
        process.TypicalLogitsWarper(0.8),
    ):
        theirs = warper(ids, theirs)
    assert_same_distribution(probabilities(logits, [Row(settings, ids=one) for one in ids.tolist()]), theirs)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 100.0])
def test_the_repetition_penalty_equals_the_reference_for_rows_of_any_length(penalty: float) -> None:
    logits = LOGITS["with impossible ones"]
    lengths = random.Random(0).choices(range(1, 40), k=64)
    ids = [torch.randint(1000, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    ours = penalized(logits, [Row(SamplingSettings(repetition_penalty=penalty), ids=one.tolist()) for one in ids])
    reference = process.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = torch.cat([reference(one[None], logits[i : i + 1]) for i, one in enumerate(ids)])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    """As OpenAI documents: logit - count * frequency_penalty - (count > 0) * presence_penalty."""
    logits, rows = random_logits(rows=3, vocab_size=10), []
    texts = [([4, 4, 5], [6, 6, 6, 7]), ([1], []), ([0, 9], [9, 0, 9])]
    for prompt, new in texts:
        settings = SamplingSettings(presence_penalty=0.8, frequency_penalty=-0.3)
        rows.append(Row(settings, ids=[*prompt, *new], prompt_length=len(prompt)))
    expected = logits.clone()
    for i, (_, new) in enumerate(texts):
        for token, count in Counter(new).items():
            expected[i, token] -= count * -0.3 + 0.8
    torch.testing.assert_close(penalized(logits, rows), expected)
    assert torch.equal(expected[1], logits[1])


def test_the_bias_is_added_before_the_repetition_penalty_and_that_comes_before_the_counts() -> None:
    settings = SamplingSettings(logit_bias={2: 3.0}, repetition_penalty=2.0, presence_penalty=0.5)
    logits = torch.tensor([[0.0, 0.0, -1.0]])
    found = penalized(logits, [Row(settings, ids=[0, 2], prompt_length=1)])
    assert found.tolist() == [[0.0, 0.0, (-1.0 + 3.0) / 2.0 - 0.5]]


def test_bias_and_penalties_decide_a_greedy_choice_too() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    for values, token in [
        ({}, 0), ({"logit_bias": {0: -100}}, 1), ({"logit_bias": {2: 100.0}}, 2), ({"repetition_penalty": 4.0}, 2),
        ({"presence_penalty": 1.5}, 0), ({"top_k": 1, "min_p": 0.9, "typical_p": 0.1, "top_p": 0.1}, 0),
    ]:  # fmt: skip
        for cold in ({"do_sample": False}, {"temperature": 0}, {"temperature": 1e-9}):
            assert sample(logits, [Row(SamplingSettings(**values, **cold))]) == token
            assert probabilities(logits, [Row(SamplingSettings(**values, **cold))])[0, token] == 1


def test_what_is_not_allowed_is_never_chosen() -> None:
    logits = random_logits(rows=2, vocab_size=300)
    one, two = (torch.arange(300) % 3 == rest for rest in (1, 2))
    for values in ({"do_sample": False}, {}, {"top_k": 5}, {"logit_bias": dict.fromkeys(range(0, 300, 3), 100.0)}):
        for seed in range(50):
            settings = SamplingSettings(**values)
            chosen = sample(logits, [Row(settings, seed=seed, allowed=one), Row(settings, seed=seed, allowed=two)])
            assert (chosen % 3).tolist() == [1, 2]


# --- drawing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{}, {"temperature": 1.7}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"typical_p": 0.7}, {"temperature": 0.6}],
    ids=str,
)
def test_thousands_of_draws_follow_the_probabilities(values: dict[str, Any]) -> None:
    logits = random_logits(7, rows=1, vocab_size=40, spread=1.5)
    logits[0, 5:9] = -torch.inf
    total = several(20_000, 50_000)
    rows = rows_of(total, **values)
    expected = probabilities(logits, rows[:1])[0].double()
    counts = torch.bincount(sample(logits.expand(total, -1), rows), minlength=40)
    kept = expected > 0
    assert (counts[~kept] == 0).all()
    assert scipy_stats.chisquare(counts[kept], total * expected[kept] / expected.sum()).pvalue > 1e-3


def test_the_tokens_of_one_text_follow_the_probabilities() -> None:
    logits = random_logits(7, rows=1, vocab_size=40, spread=1.5)
    total = several(20_000, 50_000)
    rows = [Row(SamplingSettings(), ids=range(2 + number), seed=11) for number in range(total)]
    counts = torch.bincount(sample(logits.expand(total, -1), rows), minlength=40)
    expected = logits[0].double().softmax(-1)
    assert scipy_stats.chisquare(counts, total * expected / expected.sum()).pvalue > 0.01


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 50_257, 262_144])
def test_a_draw_is_right_to_a_millionth_in_a_vocabulary_of_any_size(n: int) -> None:
    weights = random_logits(3, rows=1, vocab_size=n)[0].softmax(-1)
    ends = weights.double().cumsum(-1)
    given = [uniform(n, number) for number in range(200)] + [0.0, 1 - 2**-52]
    found = draw(weights.expand(len(given), -1), given)
    share = torch.tensor(given, dtype=torch.float64) * ends[-1]
    assert (ends[found] > share - 1e-6).all()
    assert (ends[found] - weights[found].double() <= share + 1e-6).all()


@pytest.mark.parametrize(("point", "token"), [(0.0, 1), (0.5, 3), (1 - 2**-52, 3)])
def test_a_point_on_the_border_of_an_interval_belongs_to_what_follows(point: float, token: int) -> None:
    assert draw(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]), [point]) == token


@given(st.integers(0, 2**32), st.floats(0, 1 - 2**-52))
def test_what_has_no_probability_is_never_drawn(seed: int, point: float) -> None:
    weights = random_logits(seed, rows=8, vocab_size=1500, spread=30).softmax(-1)  # most of them 0 in float32
    found = draw(weights, [point] * 8)
    assert (weights.gather(-1, found[:, None]) > 0).all()


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    by_number = [uniform(1, number) for number in range(50_000)]
    by_seed = [uniform(seed, 1) for seed in range(50_000)]
    for numbers in (by_number, by_seed):
        assert scipy_stats.kstest(numbers, "uniform").pvalue > 0.01
        assert abs(scipy_stats.pearsonr(numbers[1:], numbers[:-1]).statistic) < 0.02
    assert abs(scipy_stats.pearsonr(by_number, by_seed).statistic) < 0.02
    assert uniform(57, 3) == 0.9845743219405245  # a text must stay the same in later versions
    assert len({uniform(2**63 - 1, number) for number in range(1000)}) == 1000


def test_continuations_have_seeds_of_their_own() -> None:
    assert seed_of(7, 0) == seed_of(7) == 7
    seeds = {seed_of(seed, number) for seed in range(100) for number in range(100)}
    assert len(seeds) == 100 * 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(None, 0) != seed_of(None, 0)


def test_a_token_is_decided_by_its_number_after_the_prompt() -> None:
    rows = [Row(ids=range(length + 3), prompt_length=length, seed=9) for length in (1, 50)]
    assert points(rows) == [uniform(9, 3)] * 2
    logits = random_logits(rows=2)
    assert torch.equal(sample(logits, rows), draw(logits.softmax(-1), [uniform(9, 3)] * 2))


@pytest.mark.parametrize("vocab_size", [50, 640, 641])
def test_of_several_greatest_logits_greedy_takes_the_first(vocab_size: int) -> None:
    logits = random_logits(vocab_size=vocab_size).round().clamp(max=2)
    assert torch.equal(sample(logits, rows_of(64, do_sample=False)), logits.argmax(-1))
    assert (logits == 2).sum(-1).min() > 1


def test_a_text_goes_on_from_any_token_as_if_it_had_not_been_interrupted() -> None:
    logits = random_logits(rows=100)

    def text(start: int, ids: list[int]) -> list[int]:
        for number in range(start, 100):
            ids = [*ids, int(sample(logits[number : number + 1], [Row(ids=ids, prompt_length=2, seed=5)]))]
        return ids

    whole = text(0, [0, 1])
    assert text(57, whole[: 2 + 57]) == whole
    assert len(set(whole)) > 50


# --- rows among others ---------------------------------------------------------------------------------------------

MIXED: list[dict[str, Any]] = [
    {}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.8}, {"logit_bias": {3: 100.0, 4: -100.0}}, {"top_k": 1},
    {"min_p": 0.1}, {"typical_p": 0.6}, {"top_p": 0.9, "temperature": 0.8}, {"do_sample": False},
    {"frequency_penalty": -1.0, "do_sample": False}, {"top_k": 200, "top_p": 0.99, "temperature": 2.5},
    {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 0.9},
]  # fmt: skip


def mixed_rows(vocab_size: int) -> list[Row]:
    rows, even = [], torch.arange(vocab_size) % 2 == 0
    for number, values in enumerate(MIXED):
        ids = torch.randint(vocab_size, (5 + number,), generator=torch.Generator().manual_seed(number)).tolist()
        rows.append(Row(SamplingSettings(**values), ids, 3, seed_of(number), even if number % 3 == 0 else None))
    return rows


@pytest.mark.parametrize("vocab_size", [512, 1003, 33_024])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_gets_the_same_whatever_else_is_in_the_batch(vocab_size: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows, logits = mixed_rows(vocab_size), random_logits(rows=12, vocab_size=vocab_size)
        alone = [probabilities(logits[i : i + 1], rows[i : i + 1]) for i in range(12)]
        tokens = [int(sample(logits[i : i + 1], rows[i : i + 1])) for i in range(12)]
        shuffled = random.Random(vocab_size)
        for _ in range(30 if vocab_size < 2000 else 6):
            order = shuffled.sample(range(12), shuffled.randint(1, 12))
            together = logits[order], [rows[i] for i in order]
            assert torch.equal(probabilities(*together), torch.cat([alone[i] for i in order]))
            assert sample(*together).tolist() == [tokens[i] for i in order]
            ids = torch.tensor([tokens[i] for i in order])
            for whole, one in zip(
                log_probabilities(together[0], ids, 5), log_probabilities(logits[order[:1]], ids[:1], 5)
            ):
                assert torch.equal(whole[:1], one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_finite_logits_is_an_error_of_that_row_alone(broken: float) -> None:
    rows, logits = mixed_rows(512), random_logits(rows=12, vocab_size=512)
    fine = sample(logits, rows)
    for number in range(12):
        damaged = logits.clone()
        damaged[number] = broken
        found = sample(damaged, rows)
        assert found[number] == -1
        assert probabilities(damaged, rows)[number].isnan().all()
        others = torch.arange(12) != number
        assert torch.equal(found[others], fine[others])
    damaged = logits.clone()
    damaged[:, 17] = torch.nan  # where most rows may not even look
    assert (sample(damaged, rows) == -1).all()


@pytest.mark.parametrize("values", MIXED, ids=str)
def test_a_row_that_may_choose_nothing_is_an_error_of_that_row_alone(values: dict[str, Any]) -> None:
    logits = random_logits(rows=2, vocab_size=50)
    settings = SamplingSettings(**values)
    fine = Row(settings, seed=4)
    nothing = Row(settings, seed=4, allowed=torch.zeros(50, dtype=torch.bool))
    found = sample(logits, [nothing, fine])
    assert found[0] == -2
    assert found[1] == sample(logits[1:], [fine])
    assert set(FAULTS) == {-1, -2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_may_have_any_precision_and_stay_as_they_are(dtype: torch.dtype) -> None:
    rows, logits = mixed_rows(512), random_logits(rows=12, vocab_size=512).to(dtype)
    before = logits.clone()
    assert torch.equal(sample(logits, rows), sample(logits.float(), rows))
    assert torch.equal(logits, before)


@given(
    st.integers(0, 2**32), st.floats(0, 1e6), st.integers(0, 2000), st.floats(1e-6, 1), st.floats(0, 0.99),
    st.floats(1e-6, 1), st.floats(0.01, 100), st.floats(-2, 2),
)  # fmt: skip
@hypothesis_settings(deadline=None)
def test_whatever_the_settings_a_token_with_probability_is_chosen(
    seed: int, t: float, k: int, p: float, least: float, typical: float, penalty: float, count: float
) -> None:
    logits = random_logits(seed, rows=4, vocab_size=300)
    settings = SamplingSettings(
        temperature=t, top_k=k, top_p=p, min_p=least, typical_p=typical, repetition_penalty=penalty,
        presence_penalty=count, frequency_penalty=-count, logit_bias={5: 100.0, 6: -100.0},
    )  # fmt: skip
    rows = [Row(settings, ids=[1, 2, 3, 3, 5], seed=number) for number in range(4)]
    chances = probabilities(logits, rows)
    torch.testing.assert_close(chances.sum(-1), torch.ones(4))
    chosen = sample(logits, rows)
    assert (chances.gather(-1, chosen[:, None]) > 0).all()
    assert torch.equal(chosen, draw(chances, points(rows)))


@pytest.mark.parametrize("k", [2**31, 2**53, 2**63 - 1, 2**63, 10**400])
def test_a_top_k_above_the_vocabulary_keeps_all(k: int) -> None:
    logits = random_logits(rows=3)
    mixed = [Row(SamplingSettings(top_k=value), ids=[1], seed=0) for value in (k, 5, 0)]
    assert ((probabilities(logits, mixed) > 0).sum(-1) == torch.tensor([logits.size(-1), 5, logits.size(-1)])).all()


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    sample(random_logits(rows=3), rows_of(3))
    assert torch.equal(torch.get_rng_state(), before)


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [7, 1000])
@pytest.mark.parametrize("top", [0, 1, 5])
def test_log_probabilities_are_those_of_the_model(top: int, vocab_size: int) -> None:
    logits = random_logits(vocab_size=vocab_size).bfloat16()
    ids = torch.arange(64) % vocab_size
    expected = logits.double().log_softmax(-1)
    found = log_probabilities(logits, ids, top)
    torch.testing.assert_close(found.chosen.double(), expected[torch.arange(64), ids], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.top.double(), expected.topk(top).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(expected.gather(-1, found.top_ids), found.top.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 64, 150])
def test_log_probabilities_of_a_prompt_are_made_in_chunks(length: int) -> None:
    hidden, head = random_logits(vocab_size=16, rows=length), random_logits(1, vocab_size=16, rows=300)
    ids, sizes = torch.arange(length), []

    def logits_of(some: Tensor) -> Tensor:
        sizes.append(len(some))
        return some @ head.T

    found = prompt_log_probabilities(logits_of, hidden, ids, 3)
    assert max(sizes) <= 64
    for ours, expected in zip(found, log_probabilities(hidden @ head.T, ids, 3)):
        torch.testing.assert_close(ours, expected)
