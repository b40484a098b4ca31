"""The outcomes of cached targets: equal to the form in float64, in value and in gradient, also where little is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slmkit.training.objectives.distillation import TeacherTargets


def outcome_log_probabilities(logits: Tensor, ids: Tensor, tokens: int, temperature: float = 1.0) -> Tensor:
    return TeacherTargets(torch.empty(0), tokens, ids).log_probabilities(logits, temperature)


def by_hand(logits: Tensor, ids: Tensor, tokens: int, temperature: float) -> Tensor:
    """From the probabilities of the tokens themselves, in float64."""
    p = (logits[:, :tokens].double() / temperature).softmax(dim=-1)
    others = p.masked_fill(torch.zeros_like(p).scatter(-1, ids, 1).bool(), 0).sum(-1, keepdim=True)
    return torch.cat([p.gather(-1, ids), others], dim=-1).log()


def both(scale: float, tokens: int, k: int, temperature: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Values and gradients of either form, at logits of a vocabulary of 50."""
    random = torch.Generator().manual_seed(tokens + k)
    logits = scale * torch.randn(6, 50, generator=random)
    ids = logits[:, :tokens].topk(k, dim=-1).indices
    given = torch.randn(6, k + 1, generator=random)
    found = []
    for form in (outcome_log_probabilities, by_hand):
        leaf = logits.clone().requires_grad_()
        log_q = form(leaf, ids, tokens, temperature)
        (log_q * given).sum().backward()
        found.append((log_q.detach().float(), leaf.grad))
    return found[0], found[1]


@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.5])
@pytest.mark.parametrize(("tokens", "k"), [(50, 4), (50, 49), (43, 4), (43, 1)])
def test_values_and_gradients_are_those_of_summed_probabilities(tokens: int, k: int, temperature: float) -> None:
    (value, gradient), (expected, slope) = both(2.0, tokens, k, temperature)
    assert (value - expected).abs().max() <= 1e-5
    assert (gradient - slope).abs().max() <= 1e-5
    assert not gradient[:, tokens:].any()
    assert gradient[:, :tokens].abs().max() > 0.1


def test_what_the_likeliest_tokens_leave_to_the_others_may_be_next_to_nothing() -> None:
    (value, gradient), (expected, slope) = both(40.0, 50, 12, 1.0)
    assert value[:, -1].min() < -20
    assert torch.allclose(value, expected, rtol=1e-5, atol=1e-4)
    assert torch.allclose(gradient, slope, rtol=1e-4, atol=1e-6)


def test_gradients_may_be_taken_twice() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    total = outcome_log_probabilities(logits, torch.tensor([[1], [2], [3]]), 20).sum()
    first, second = (torch.autograd.grad(total, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
