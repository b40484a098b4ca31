"""Merge methods for tensors: linear, SLERP, task arithmetic, TIES and DARE.

All but SLERP's angle and TIES' threshold is elementwise, so that parts of a tensor can be merged one after the other.
A task vector is the change by fine-tuning: τ_i = θ_i - θ_base. Tensors have any shape, the same for all models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

# Cosine above which the arc is replaced by a line: sin θ would be lost to rounding.
PARALLEL = 0.9995


def linear(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i θ_i: [...] each → [...]. A weight of 1 among zeros gives that tensor, bit for bit."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights):
        if weight:
            total = weight * tensor if total is None else total.add_(tensor, alpha=weight)
        elif total is None and not any(weights):
            total = torch.zeros_like(tensor)
    assert total is not None, "there is a tensor"
    return total


def arc(product: float, lengths: float, t: float) -> tuple[float, float]:
    """Coefficients of two vectors at the point t (0 to 1) of the arc between them (SLERP, Shoemake 1985).

        sin((1 - t) Ω) / sin Ω,  sin(t Ω) / sin Ω,   cos Ω = θ_1 · θ_2 / (|θ_1| |θ_2|)

    `product` is their dot product, `lengths` the product of their norms. Linear if they are parallel, or one of them
    is zero.
    """
    cosine = product / lengths if lengths else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def task_arithmetic(base: Tensor, tuned: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """θ_base + Σ w_i τ_i (arXiv:2212.04089), as (1 - Σ w_i) θ_base + Σ w_i θ_i, which has less rounding error."""
    return linear((base, *tuned), (1 - sum(weights), *weights))


def least_kept(sizes: np.ndarray, density: float) -> float:
    """The smallest kept magnitude if the share `density` of `sizes` [elements] is kept; reorders `sizes`."""
    kept = round(density * sizes.size)
    if kept == 0:
        return math.inf
    sizes.partition(sizes.size - kept)  # in place: torch's kthvalue allocates an index of eight bytes per element
    return float(sizes[sizes.size - kept])


def trim(delta: Tensor, least: float) -> Tensor:
    """The task vector [...] with elements of a magnitude below `least` set to 0; equal ones are kept."""
    return torch.where(delta.abs() >= least, delta, 0.0)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each element of a task vector with probability `density`, divided by `density` (DARE, arXiv:2311.03099)."""
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept, delta / density, 0.0) if density else torch.zeros_like(delta)


def elect(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Σ w_i τ_i over the task vectors that have, at each element, the sign of the sum of all (TIES, arXiv:2306.01708).

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
