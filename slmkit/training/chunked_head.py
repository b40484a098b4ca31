"""Any loss of single positions over a head, without ever holding the logits of more than a few of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.training.losses import positions_per_chunk

# Float32 logits [chunk, vocab_size] of the positions that the slice names → their loss, and figures [n] to be summed.
LossOfChunk = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def chunked_loss(hidden: Tensor, head: Tensor, cap: float | None, loss: LossOfChunk) -> tuple[Tensor, Tensor]:
    """Sums of `loss` and of its figures over hidden [positions, width] @ head.T, head [vocab_size, width].

    With `cap` the logits are cap * tanh(logits / cap). Under autocast the products are in its type, logits in float32.
    Gradients are made in the same pass: those of `loss` must not depend on what is done with it later but by a factor.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _ChunkedLoss.apply(hidden, head, cap, loss)


def in_chunks(positions: int, vocab_size: int, device: torch.device) -> list[slice]:
    """All positions, as many at once as should have logits; an empty slice where there is none.

    Half of what a plain loss takes: the gradients of this one come with a dozen tensors as large as the logits.
    """
    chunk = positions_per_chunk(vocab_size, device) // 2
    return [slice(start, start + chunk) for start in range(0, max(1, positions), chunk)]


class _ChunkedLoss(torch.autograd.Function):
    """Chunk by chunk: logits, the loss's own gradient at them, and the two products with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, cap: float | None, loss: LossOfChunk) -> tuple[Tensor, Tensor]:
        wants_gradient, head_learns = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        weight = head.to(hidden.dtype)
        # Float16 ends at 6e-8 below, where many of a softmax's gradients are.
        up = 256.0 if hidden.dtype == torch.float16 else 1.0
        hidden_grad = torch.empty_like(hidden, dtype=torch.float32) if wants_gradient else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if head_learns else None
        totals, figures = [], []
        for place in in_chunks(hidden.size(0), head.size(0), hidden.device):
            h = hidden[place]  # [chunk, width]
            with torch.set_grad_enabled(wants_gradient):
                logits = F.linear(h.detach(), weight.detach()).float().requires_grad_(wants_gradient)
                total, told = loss(logits if cap is None else cap * torch.tanh(logits / cap), place)
            totals.append(total.detach())
            figures.append(told.detach())
            if hidden_grad is not None:
                (slope,) = torch.autograd.grad(total, logits)  # [chunk, vocab_size]
                slope = (slope * up).to(hidden.dtype)
                hidden_grad[place] = (slope @ weight).float() / up
                if head_grad is not None:  # under an adapter the head is frozen
                    head_grad += (slope.T @ h).float() / up
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.dtypes = hidden.dtype, head.dtype
        told_of_all = torch.stack(figures).sum(0)
        ctx.mark_non_differentiable(told_of_all)
        return torch.stack(totals).sum(), told_of_all

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        of_hidden, of_head = ctx.dtypes
        for_head = None if head_grad is None else (head_grad * outputs[0]).to(of_head)
        return (hidden_grad * outputs[0]).to(of_hidden), for_head, None, None
