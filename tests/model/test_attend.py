"""Attention by products is the attention of the fused kernel, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.model import attend as module
from slmkit.model.attend import AttentionInputs, attend, causal_products


def heads(tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    shapes = [(2, 4, tokens, head_dim), (2, kv_heads, tokens, head_dim), (2, kv_heads, tokens, head_dim)]
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def outcome(f: object, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all three inputs, for one arbitrary loss."""
    y = f(*inputs)  # type: ignore[operator]
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y.float() * weight).sum(), inputs)]


SCALE = 0.125
CAUSAL = AttentionInputs(None, None, None, mask=None, is_causal=True)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=SCALE)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_products(q, k, v, SCALE)


@pytest.mark.parametrize("tokens", [1, 5, 130, 600])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_products_equal_the_fused_kernel(tokens: int, kv_heads: int, head_dim: int) -> None:
    exact = heads(tokens, kv_heads, head_dim, torch.float32)
    for plain, ours in zip(outcome(fused, exact), outcome(products, exact)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_products_are_as_near_the_truth_as_the_fused_kernel() -> None:
    exact = heads(200, 2, 64, torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    truth = outcome(fused, [x.float().detach().requires_grad_() for x in rounded])
    for true, plain, ours in zip(truth, outcome(fused, rounded), outcome(products, rounded)):
        error, errors_of_fused = ((x.float() - true).norm() / true.norm() for x in (ours, plain))
        assert error < 0.01
        assert error < 3 * errors_of_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_a_cpu_goes_by_products_and_generation_does_not(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(module, "causal_products", lambda *x: calls.append(x) or x[0])
    inputs = heads(9, 4, 16, dtype)
    attend(*inputs, CAUSAL, SCALE, None, dropout=0.0)
    assert len(calls) == 1
    attend(*inputs, CAUSAL, SCALE, None, dropout=0.1)
    attend(*(x.detach() for x in inputs), CAUSAL, SCALE, None, dropout=0.0)
    attend(*heads(module.LONGEST_IN_PRODUCTS + 1, 4, 16, dtype), CAUSAL, SCALE, None, dropout=0.0)
    assert len(calls) == 1


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_a_cap_so_high_that_it_never_bites_changes_nothing(kv_heads: int, masked: bool) -> None:
    inputs = heads(20, kv_heads, 16, torch.float32)
    mask = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    view = AttentionInputs(None, None, None, mask | torch.eye(20, dtype=torch.bool), False) if masked else CAUSAL
    for plain, ours in zip(
        outcome(lambda *x: attend(*x, view, SCALE, None, 0.0), inputs),
        outcome(lambda *x: attend(*x, view, SCALE, 1e4, 0.0), inputs),
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
