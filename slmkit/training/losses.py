"""Losses over hidden states, as sums: the loop divides once by the trained tokens of the whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits of one chunk should fit a core's cache: 512 positions over 2,048 tokens are 4 MiB. On two cores this takes
# 24 ms for 4,096 positions of width 192, against 64 ms unchunked. Accelerators need larger products.
LOGITS_PER_CHUNK = {"cpu": 2**20}
LOGITS_PER_CHUNK_ELSEWHERE = 2**26
# Smaller chunks spend more time on reading and writing the head and its gradient than on products: with 50,257
# tokens of width 384, chunks of 20 positions take four times as long as chunks of 256.
SMALLEST_CHUNK = 256


def linear_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, cap: float | None = None) -> Tensor:
    """Sum of -log softmax(logits)[label] in nats for logits = hidden @ head.T, computed in chunks.

    hidden [positions, width], head [vocab_size, width], labels [positions] without ignored ones. With `cap` the logits
    are cap * tanh(logits / cap) (Gemma 2, arXiv:2408.00118). Under autocast the products are in its type; the softmax
    is always in float32.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _LinearCrossEntropy.apply(hidden, head, labels, cap)


def token_log_probabilities(
    hidden: Tensor, head: Tensor, labels: Tensor, cap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """log softmax(logits / temperature)[label] of each position, in nats and float32: [positions].

    Arguments as for `linear_cross_entropy`. The gradient of each value is not known in the forward pass: the logits of
    each chunk are computed again in the backward pass.
    """
    chunk = positions_per_chunk(head.size(0), hidden.device)
    if len(hidden) <= chunk:
        return _log_probabilities(hidden, head, labels, cap, temperature)
    parts = zip(hidden.split(chunk), labels.split(chunk))
    return torch.cat(
        [
            checkpoint(_log_probabilities, h, head, y, cap, temperature, use_reentrant=False, preserve_rng_state=False)
            for h, y in parts
        ]
    )


def _log_probabilities(hidden: Tensor, head: Tensor, labels: Tensor, cap: float | None, temperature: float) -> Tensor:
    """Unchunked form of `token_log_probabilities`: [positions]."""
    logits = F.linear(hidden, head.to(hidden.dtype)).float()  # [positions, vocab_size]
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / temperature
    return logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)


def positions_per_chunk(vocab_size: int, device: torch.device) -> int:
    """Positions whose logits are computed at once."""
    return max(SMALLEST_CHUNK, LOGITS_PER_CHUNK.get(device.type, LOGITS_PER_CHUNK_ELSEWHERE) // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass: d loss / d logits = softmax(logits) - onehot(label), chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, cap: float | None) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad)
        weight = head.to(hidden.dtype)
        # Float16 underflows below 6e-8, where many of a softmax's gradients are: they are scaled up.
        up = 256.0 if hidden.dtype == torch.float16 else 1.0
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wants_gradient else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if wants_gradient else None
        chunk = positions_per_chunk(head.size(0), hidden.device)
        for start in range(0, hidden.size(0), chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk, None]  # [chunk, width], [chunk, 1]
            logits, slopes = F.linear(h, weight).float(), None  # [chunk, vocab_size]
            if cap is not None:
                logits.div_(cap).tanh_()
                slopes = 1 - logits.square()  # d capped / d logit
                logits.mul_(cap)
            largest, picked = logits.amax(-1), logits.gather(-1, y)  # [chunk], [chunk, 1]
            shares = torch.softmax(logits, -1, out=logits)
            # The largest share is 1 / sum(exp(logits - largest)); a label's share may be too small for float32.
            total += (largest - shares.amax(-1).log()).sum() - picked.sum()
            if hidden_grad is None or head_grad is None:
                continue
            shares.scatter_add_(-1, y, torch.full_like(picked, -1))
            if slopes is not None:
                shares.mul_(slopes)
            if hidden.dtype == torch.float32:
                torch.mm(shares, weight, out=hidden_grad[start : start + chunk])
                head_grad.addmm_(shares.T, h)
            else:
                shares = (shares if up == 1 else shares.mul_(up)).to(hidden.dtype)
                hidden_grad[start : start + chunk] = (shares @ weight).div_(up)
                head_grad += shares.T @ (h / up)
        if wants_gradient:
            ctx.save_for_backward(hidden_grad, head_grad)
            ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        (scale,) = outputs  # in float32: rounding it to 16 bits would bias all gradients alike
        scaled = (hidden_grad.float() * scale).to(hidden_grad.dtype), head_grad.mul_(scale).to(ctx.head_dtype)
        return *scaled, None, None


# Float32 logits [chunk, vocab_size] and the slice of their positions → loss [], and figures [n] to be summed.
LossOfChunk = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def chunked_loss(hidden: Tensor, head: Tensor, cap: float | None, loss: LossOfChunk) -> tuple[Tensor, Tensor]:
    """Sums of `loss` and of its figures over hidden [positions, width] @ head.T, head [vocab_size, width].

    With `cap` the logits are cap * tanh(logits / cap). Under autocast the products are in its type, logits in float32.
    Gradients are computed in the same pass: the result may only be scaled afterwards.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _ChunkedLoss.apply(hidden, head, cap, loss)


def in_chunks(positions: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Slices of all positions, as many at once as should have logits; one empty slice if there are none.

    Half of `positions_per_chunk`: the gradients need a dozen tensors as large as the logits.
    """
    chunk = positions_per_chunk(vocab_size, device) // 2
    return [slice(start, start + chunk) for start in range(0, max(1, positions), chunk)]


class _ChunkedLoss(torch.autograd.Function):
    """For each chunk: logits, the loss's gradient at them, and its products with head and hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, cap: float | None, loss: LossOfChunk) -> tuple[Tensor, Tensor]:
        wants_gradient, head_learns = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        weight = head.to(hidden.dtype)
        # Float16 underflows below 6e-8, where many of a softmax's gradients are: they are scaled up.
        up = 256.0 if hidden.dtype == torch.float16 else 1.0
        hidden_grad = torch.empty_like(hidden, dtype=torch.float32) if wants_gradient else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if head_learns else None
        totals, figures = [], []
        for place in in_chunks(hidden.size(0), head.size(0), hidden.device):
            h = hidden[place]  # [chunk, width]
            with torch.set_grad_enabled(wants_gradient):
                logits = F.linear(h.detach(), weight.detach()).float().requires_grad_(wants_gradient)
                total, of_chunk = loss(logits if cap is None else cap * torch.tanh(logits / cap), place)
            totals.append(total.detach())
            figures.append(of_chunk.detach())
            if hidden_grad is not None:
                (slope,) = torch.autograd.grad(total, logits)  # [chunk, vocab_size]
                slope = (slope * up).to(hidden.dtype)
                hidden_grad[place] = (slope @ weight).float() / up
                if head_grad is not None:  # under an adapter the head is frozen
                    head_grad += (slope.T @ h).float() / up
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.dtypes = hidden.dtype, head.dtype
        summed_figures = torch.stack(figures).sum(0)
        ctx.mark_non_differentiable(summed_figures)
        return torch.stack(totals).sum(), summed_figures

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        of_hidden, of_head = ctx.dtypes
        for_head = None if head_grad is None else (head_grad * outputs[0]).to(of_head)
        return (hidden_grad * outputs[0]).to(of_hidden), for_head, None, None
