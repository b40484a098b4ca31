"""How tensors of several models become one: linear, SLERP, task arithmetic, TIES and DARE.

All in float32, a tensor at a time. A task vector is what fine-tuning changed: τ_i = θ_i - θ_base.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Vectors so nearly parallel that the arc between them is a line: sin θ would be lost to rounding.
PARALLEL = 0.9995


def linear(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i θ_i, of any shape. A weight of 1 among zeros gives that tensor, bit for bit."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights):
        if weight:
            total = weight * tensor if total is None else total.add_(tensor, alpha=weight)
        elif total is None and not any(weights):
            total = torch.zeros_like(tensor)
    assert total is not None, "there is a tensor"
    return total


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point t of the arc from one tensor to the other, as vectors (Shoemake 1985).

        sin((1 - t) Ω) / sin Ω · θ_1 + sin(t Ω) / sin Ω · θ_2,   cos Ω = θ_1 · θ_2 / (|θ_1| |θ_2|)

    On a line where they are parallel, or one of them is zero and has no direction.
    """
    lengths = (torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)).item()
    cosine = torch.dot(first.flatten(), second.flatten()).item() / lengths if lengths else 1.0
    if abs(cosine) > PARALLEL:
        return linear((first, second), (1 - t, t))
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    shares = torch.sin(torch.tensor([1 - t, t], dtype=torch.float64) * angle) / torch.sin(angle)
    return linear((first, second), shares.tolist())


def task_arithmetic(base: Tensor, tuned: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """θ_base + Σ w_i τ_i (arXiv:2212.04089), as (1 - Σ w_i) θ_base + Σ w_i θ_i, which rounds less."""
    return linear((base, *tuned), (1 - sum(weights), *weights))


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the share `density` of a task vector that is largest in magnitude, and whatever ties with the last of it."""
    kept = round(density * delta.numel())
    if kept == delta.numel():
        return delta
    if kept == 0:
        return torch.zeros_like(delta)
    sizes = delta.abs().flatten().numpy()
    sizes.partition(sizes.size - kept)  # in place: torch's kthvalue makes an index of eight bytes for every number
    return torch.where(delta.abs() >= float(sizes[sizes.size - kept]), delta, 0.0)


def drop(delta: Tensor, density: float, seed: int) -> Tensor:
    """Keep each number of a task vector with probability `density`, and divide it by that (DARE, arXiv:2311.03099)."""
    if density == 0:
        return torch.zeros_like(delta)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept, delta / density, 0.0)


def elect(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Σ w_i τ_i over those task vectors that have, at each place, the sign of the sum of all (TIES, arXiv:2306.01708).

    `normalize`: the weighted mean of those, instead of the sum.
    """
    positive = linear(deltas, weights) >= 0
    total, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights):
        pull = weight * delta
        agrees = torch.where(positive, pull > 0, pull < 0)
        total += torch.where(agrees, pull, 0.0)
        share += agrees * weight
    return total / torch.where(share == 0, 1.0, share) if normalize else total
