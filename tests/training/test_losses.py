"""The chunked loss is the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from slmkit.training import losses
from slmkit.training.losses import linear_cross_entropy, token_log_probabilities


def problem(positions: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 24, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(101, 24, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(101, (positions,), generator=generator)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of 64 positions, the last one partial."""
    monkeypatch.setattr(losses, "SMALLEST_CHUNK", 64)
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", {})
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK_ELSEWHERE", 0)


def plain_loss(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, cap: float | None = None
) -> torch.Tensor:
    logits = hidden @ head.T
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), labels, reduction="sum")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("cap", [None, 3.0, 30.0])
@pytest.mark.parametrize("positions", [1, 7, 64, 65, 200])
def test_value_and_gradients_equal_the_plain_form(positions: int, cap: float | None) -> None:
    hidden, head, labels = problem(positions)
    plain = plain_loss(hidden, head, labels, cap)
    expected = torch.autograd.grad(plain * 0.3, (hidden, head))
    chunked = linear_cross_entropy(hidden, head, labels, cap)
    found = torch.autograd.grad(chunked * 0.3, (hidden, head))
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("small_chunks")
def test_gradients_pass_a_numerical_check() -> None:
    """Against finite differences, independent of any other implementation."""
    hidden, head, labels = problem(70)
    step = 1e-2
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, head, labels), hidden)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        up = linear_cross_entropy(hidden + step * direction, head, labels)
        down = linear_cross_entropy(hidden - step * direction, head, labels)
    assert ((up - down) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-2)


def test_nothing_is_kept_for_a_backward_that_will_not_come() -> None:
    hidden, head, labels = problem(9)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, labels).requires_grad


def test_no_position_at_all_costs_nothing_and_makes_no_nan() -> None:
    hidden, head, labels = problem(4)
    total = linear_cross_entropy(hidden[:0], head, labels[:0])
    total.backward()
    assert total.item() == 0
    assert head.grad is not None
    assert not head.grad.any()


def test_under_autocast_products_are_in_bfloat16_and_stay_close() -> None:
    hidden, head, labels = problem(300)
    plain = F.cross_entropy(hidden @ head.T, labels, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        chunked = linear_cross_entropy(hidden, head, labels)
    assert chunked.dtype == torch.float32
    assert chunked.item() == pytest.approx(plain.item(), rel=5e-3)
    assert chunked.item() != plain.item()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_gradients_in_16_bits_are_those_of_float32_but_for_rounding(
    dtype: torch.dtype, tolerance: float, cap: float | None
) -> None:
    """With a common part in the rows of the head that adds up past float16's range over the vocabulary."""
    hidden, _, _ = problem(100)
    head = (torch.randn(5_000, 24, generator=torch.Generator().manual_seed(0)) * 0.01 + 40).requires_grad_()
    labels = torch.randint(5_000, (100,), generator=torch.Generator().manual_seed(1))
    hidden = (hidden.detach() * 1e-2).requires_grad_()
    expected = torch.autograd.grad(plain_loss(hidden, head, labels, cap), (hidden, head))
    with torch.autocast("cpu", dtype):
        found = torch.autograd.grad(linear_cross_entropy(hidden, head, labels, cap), (hidden, head))
    assert all(torch.isfinite(gradient).all() for gradient in found)
    assert (found[1] - expected[1]).norm() < tolerance * expected[1].norm()


def test_the_loss_of_training_is_capped_as_the_logits_are() -> None:
    """As Gemma 2 has it: what is trained is the likelihood that generation and evaluation use."""
    from slmkit.data.batch import Batch
    from slmkit.model.initialization import build_decoder
    from slmkit.training.objective import next_token
    from tests.training.helpers import config

    model = build_decoder(config(model_type="gemma2", final_logit_softcapping=1.5, initializer_range=0.8), 0)
    ids = torch.randint(260, (2, 12), generator=torch.Generator().manual_seed(3))
    found = next_token(model, Batch(ids, ids, ids.numel())).total
    expected = F.cross_entropy(model.logits(model(ids)).flatten(0, 1), ids.flatten(), reduction="sum")
    torch.testing.assert_close(found, expected)
    uncapped = F.cross_entropy(F.linear(model(ids), model.head_weight).flatten(0, 1), ids.flatten(), reduction="sum")
    assert (found - uncapped).abs() > 1


def plain_log_probabilities(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, cap: float | None, temperature: float
) -> torch.Tensor:
    logits = hidden @ head.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return -F.cross_entropy(logits / temperature, labels, reduction="none")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("cap", "temperature"), [(None, 1.0), (None, 0.7), (3.0, 1.0), (30.0, 1.5)])
@pytest.mark.parametrize("positions", [0, 1, 64, 65, 200])
def test_each_tokens_log_probability_and_its_gradient_equal_the_plain_form(
    positions: int, cap: float | None, temperature: float
) -> None:
    hidden, head, labels = problem(positions)
    weights = torch.randn(positions, generator=torch.Generator().manual_seed(1))
    plain = plain_log_probabilities(hidden, head, labels, cap, temperature)
    expected = torch.autograd.grad((plain * weights).sum(), (hidden, head))
    found = token_log_probabilities(hidden, head, labels, cap, temperature)
    assert torch.allclose(found, plain, atol=1e-5)
    for gradient, right in zip(torch.autograd.grad((found * weights).sum(), (hidden, head)), expected):
        assert torch.allclose(gradient, right, atol=1e-4)
