"""The methods of merging in numpy and double precision, written from their papers, tensor by tensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def slerp(a: Array, b: Array, t: float) -> Array:
    """Shoemake (1985): along the great circle through both, each at its own length."""
    u, v = a.ravel() / np.sqrt((a**2).sum()), b.ravel() / np.sqrt((b**2).sum())
    omega = np.arccos(np.clip(u @ v, -1, 1))
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def task_arithmetic(base: Array, tuned: list[Array], weights: list[float], scale: float) -> Array:
    """Ilharco et al. (arXiv:2212.04089): θ = θ_base + λ Σ w τ."""
    return base + scale * sum(w * (x - base) for x, w in zip(tuned, weights))


def trimmed(tau: Array, density: float) -> Array:
    """TIES, step 1: all but the largest magnitudes become zero."""
    kept = np.argsort(-np.abs(tau), axis=None, kind="stable")[: round(density * tau.size)]
    result = np.zeros(tau.size)
    result[kept] = tau.ravel()[kept]
    return result.reshape(tau.shape)


def elected(taus: list[Array], weights: list[float], mean: bool) -> Array:
    """TIES, steps 2 and 3 (arXiv:2306.01708): the sign with the greater mass, then only what has it.

    A loop over the places, as the paper says it of one parameter p: γ_p = sgn(Σ τ), A_p = {i: sgn(τ_i) = γ_p}.
    """
    result = np.zeros(taus[0].size)
    flat = [tau.ravel() for tau in taus]
    for p in range(result.size):
        gamma = 1 if sum(w * tau[p] for tau, w in zip(flat, weights)) >= 0 else -1
        agreeing = [(w * tau[p], w) for tau, w in zip(flat, weights) if w * tau[p] * gamma > 0]
        if agreeing:
            total, share = np.sum(agreeing, axis=0)
            result[p] = total / share if mean else total
    return result.reshape(taus[0].shape)


def ties(base: Array, tuned: list[Array], weights: list[float], density: float, scale: float, mean: bool) -> Array:
    return base + scale * elected([trimmed(x - base, density) for x in tuned], weights, mean)
