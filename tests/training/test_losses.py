"""The chunked loss is the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from slmkit.training import losses
from slmkit.training.losses import linear_cross_entropy


def problem(positions: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 24, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(101, 24, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(101, (positions,), generator=generator)


@pytest.mark.parametrize("positions", [1, 7, 64, 65, 200])
def test_value_and_gradients_equal_the_plain_form(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 64 * 101)  # several chunks, the last one partial
    hidden, head, labels = problem(positions)
    plain = F.cross_entropy(hidden @ head.T, labels, reduction="sum")
    expected = torch.autograd.grad(plain * 0.3, (hidden, head))
    chunked = linear_cross_entropy(hidden, head, labels)
    found = torch.autograd.grad(chunked * 0.3, (hidden, head))
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(found, expected)


def test_gradients_pass_a_numerical_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, independent of any other implementation."""
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 3 * 101)
    hidden, head, labels = problem(5)
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
