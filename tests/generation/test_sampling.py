"""Every rule of sampling means what it means in transformers."""

from __future__ import annotations

import pytest
import torch

from slmkit.config import UserError
from slmkit.generation import SamplingSettings
from slmkit.generation.sampling import Sampler, min_p, repetition_penalty, top_k, top_p

process = pytest.importorskip("transformers.generation.logits_process")


def logits_and_ids() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 200, generator=generator) * 3, torch.randint(200, (64, 20), generator=generator)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (repetition_penalty(1.3), lambda: process.RepetitionPenaltyLogitsProcessor(1.3)),
        (repetition_penalty(0.7), lambda: process.RepetitionPenaltyLogitsProcessor(0.7)),
        (top_k(1), lambda: process.TopKLogitsWarper(1)),
        (top_k(17), lambda: process.TopKLogitsWarper(17)),
        (top_k(1000), lambda: process.TopKLogitsWarper(1000)),
        (top_p(0.9), lambda: process.TopPLogitsWarper(0.9)),
        (top_p(0.05), lambda: process.TopPLogitsWarper(0.05)),
        (min_p(0.1), lambda: process.MinPLogitsWarper(0.1)),
        (min_p(0.9), lambda: process.MinPLogitsWarper(0.9)),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_a_rule_equals_the_reference(ours, theirs) -> None:
    logits, ids = logits_and_ids()
    torch.testing.assert_close(ours(logits, ids), theirs()(ids, logits))


def test_all_rules_together_equal_the_reference_in_its_order() -> None:
    logits, ids = logits_and_ids()
    settings = SamplingSettings(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    ours = logits
    for rule in settings.rules():
        ours = rule(ours, ids)
    theirs = logits
    for warper in (
        process.RepetitionPenaltyLogitsProcessor(1.2),
        process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(50),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(0.05),
    ):
        theirs = warper(ids, theirs)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


def test_drawing_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    sampler = Sampler(SamplingSettings(seed=3), torch.device("cpu"))
    drawn = sampler(probabilities.log().expand(20_000, 3), torch.zeros(20_000, 1, dtype=torch.long))
    shares = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


def test_temperature_zero_is_greedy_and_needs_no_luck() -> None:
    logits, ids = logits_and_ids()
    for settings in (SamplingSettings(temperature=0), SamplingSettings(do_sample=False, top_p=0.1)):
        assert torch.equal(Sampler(settings, torch.device("cpu"))(logits, ids), logits.argmax(-1))


def test_a_seed_decides_whatever_was_drawn_elsewhere() -> None:
    logits, ids = logits_and_ids()
    draws = []
    for _ in range(2):
        torch.rand(7)
        draws.append(Sampler(SamplingSettings(seed=5), torch.device("cpu"))(logits, ids))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], Sampler(SamplingSettings(seed=6), torch.device("cpu"))(logits, ids))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_k": -2}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 1}, {"repetition_penalty": 0}],
)
def test_a_value_out_of_range_is_named_with_what_is_expected(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=rf"{name} .*expected"):
        SamplingSettings(**wrong)
