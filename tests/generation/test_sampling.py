"""Every rule of sampling means what it means in transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmkit.config import UserError
from slmkit.generation.sampling import Sampler, min_p, repetition_penalty, rules_of, temperature, top_k, top_p
from slmkit.generation.sampling_settings import SamplingSettings

process = pytest.importorskip("transformers.generation.logits_process")
CPU = torch.device("cpu")


def logits_and_ids(seed: int = 0, vocab_size: int = 200, spread: float = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, vocab_size, generator=generator) * spread
    return logits, torch.randint(vocab_size, (64, 20), generator=generator)


def assert_same_choice(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spread", [0.1, 3], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (repetition_penalty(1.3), lambda: process.RepetitionPenaltyLogitsProcessor(1.3)),
        (repetition_penalty(0.7), lambda: process.RepetitionPenaltyLogitsProcessor(0.7)),
        (temperature(0.3), lambda: process.TemperatureLogitsWarper(0.3)),
        (top_k(1), lambda: process.TopKLogitsWarper(1)),
        (top_k(17), lambda: process.TopKLogitsWarper(17)),
        (top_k(1000), lambda: process.TopKLogitsWarper(1000)),
        (top_p(0.05), lambda: process.TopPLogitsWarper(0.05)),
        (top_p(0.5), lambda: process.TopPLogitsWarper(0.5)),
        (top_p(0.9), lambda: process.TopPLogitsWarper(0.9)),
        (top_p(0.999), lambda: process.TopPLogitsWarper(0.999)),
        (min_p(0.1), lambda: process.MinPLogitsWarper(0.1)),
        (min_p(0.9), lambda: process.MinPLogitsWarper(0.9)),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_a_rule_equals_the_reference(ours, theirs, spread: float) -> None:
    logits, ids = logits_and_ids(spread=spread)
    assert_same_choice(ours(logits, ids), theirs()(ids, logits))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [5, 50, 700])
def test_all_rules_together_equal_the_reference_in_its_order(k: int, seed: int) -> None:
    logits, ids = logits_and_ids(seed, vocab_size=1000)
    settings = SamplingSettings(temperature=0.7, top_k=k, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    ours = logits
    for rule in rules_of(settings):
        ours = rule(ours, ids)
    theirs = logits
    for warper in (
        process.RepetitionPenaltyLogitsProcessor(1.2),
        process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(k),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(0.05),
    ):
        theirs = warper(ids, theirs)
    assert_same_choice(ours, theirs)


def test_what_ties_with_the_last_of_the_likeliest_stays_as_in_the_reference() -> None:
    logits, ids = logits_and_ids()
    coarse = logits.round()  # many ties, as in bfloat16
    ours = top_k(10)(coarse, ids)
    assert (ours.isfinite().sum(-1) > 10).any()
    assert torch.equal(ours, process.TopKLogitsWarper(10)(ids, coarse))


def test_drawing_follows_the_probabilities_and_never_takes_what_has_none() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    sampler = Sampler(SamplingSettings(seed=3), CPU)
    drawn = sampler(probabilities.log().expand(40_000, 6), torch.zeros(40_000, 1, dtype=torch.long))
    shares = torch.bincount(drawn, minlength=6) / 40_000
    torch.testing.assert_close(shares, probabilities, atol=0.01, rtol=0)
    assert (shares[probabilities == 0] == 0).all()


@pytest.mark.parametrize(("point", "token"), [(0.0, 1), (0.5, 3), (1 - 2**-24, 3)])
def test_a_point_on_the_border_of_a_stretch_belongs_to_what_follows(
    point: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: torch.full(shape, point))
    logits = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
    assert Sampler(SamplingSettings(seed=3), CPU)(logits, torch.zeros(1, 1, dtype=torch.long)) == token


@given(st.integers(0, 2**32), st.floats(0.05, 3), st.integers(0, 40), st.floats(0.01, 1), st.floats(0, 0.9))
def test_whatever_the_settings_the_token_is_one_that_the_rules_keep(
    seed: int, t: float, k: int, p: float, least: float
) -> None:
    logits, ids = logits_and_ids(seed)
    settings = SamplingSettings(temperature=t, top_k=k, top_p=p, min_p=least, seed=seed)
    kept = logits
    for rule in rules_of(settings):
        kept = rule(kept, ids)
    drawn = Sampler(settings, CPU)(logits, ids)
    assert kept.gather(-1, drawn[:, None]).isfinite().all()


def test_temperature_zero_is_greedy_and_needs_no_luck() -> None:
    logits, ids = logits_and_ids()
    for settings in (SamplingSettings(temperature=0), SamplingSettings(do_sample=False, top_p=0.1)):
        assert torch.equal(Sampler(settings, CPU)(logits, ids), logits.argmax(-1))


def test_a_seed_decides_whatever_was_drawn_elsewhere() -> None:
    logits, ids = logits_and_ids()
    draws = []
    for _ in range(2):
        torch.rand(7)
        draws.append(Sampler(SamplingSettings(seed=5), CPU)(logits, ids))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], Sampler(SamplingSettings(seed=6), CPU)(logits, ids))


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    for seed in (None, 1):
        Sampler(SamplingSettings(seed=seed), CPU)(*logits_and_ids())
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_it_is_another_text_each_time() -> None:
    logits, ids = logits_and_ids()
    first, second = (Sampler(SamplingSettings(), CPU)(logits, ids) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -2},
        {"top_p": 0}, {"top_p": 1.5}, {"min_p": 1}, {"min_p": -0.1}, {"repetition_penalty": 0}, {"seed": -1},
        {"seed": 10**30},
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named_with_what_is_expected(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=rf"{name}: expected"):
        SamplingSettings(**wrong)


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {}, {"top_k": 1}, {"top_p": 0.5}, {"repetition_penalty": 2.0}]
)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_however_tokens_are_chosen(settings: dict, broken: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, broken, 2.0]])
    with pytest.raises(UserError, match="logits are not finite"):
        Sampler(SamplingSettings(**settings), CPU)(logits, torch.tensor([[0], [0]]))
