"""Published scaling laws: the loss to expect, the size that fits a budget, and the learning rate and batch for it.

All are extrapolated by whoever uses them on small models: they were fitted on models of some 60 M parameters and more.
"""

from __future__ import annotations

import math

# Hoffmann et al. 2022 (arXiv:2203.15556), approach 3, with the fit corrected by Besiroglu et al. 2024
# (arXiv:2404.10102): L(N, D) = E + A / N^α + B / D^β, in nats a token of web text in a vocabulary of 32,000.
E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
# Muennighoff et al. 2023 (arXiv:2305.16264): what is read again is worth less each time, until nothing is gained.
REPETITIONS = 15.39
HIGHEST_RATE = 1e-2  # AdamW's; the law goes beyond it below a million parameters, where it was never tried


def expected_loss(parameters: float, tokens: float, unique_tokens: float | None = None) -> float:
    """Nats a token of a model of so many parameters, embeddings included, after so many tokens.

    `unique_tokens`: of how much text, where it is read more than once.
    """
    if unique_tokens is not None and unique_tokens < tokens:
        repetitions = tokens / unique_tokens - 1
        tokens = unique_tokens * (1 + REPETITIONS * (1 - math.exp(-repetitions / REPETITIONS)))
    return E + A / parameters**ALPHA + B / tokens**BETA


def parameters_for(tokens: float) -> float:
    """The size for which so many tokens are just enough: one operation more is worth as much on either.

    Where 6 N D is constant, the loss is lowest at α A / N^α = β B / D^β.
    """
    return (ALPHA * A / (BETA * B) * tokens**BETA) ** (1 / ALPHA)


def learning_rate_for(parameters: float, tokens: float) -> float:
    """AdamW's peak: Li et al. 2025 (arXiv:2503.04715, "Step Law"), 1.79 N^-0.713 D^0.307, N without embeddings."""
    return min(HIGHEST_RATE, 1.79 * parameters**-0.713 * tokens**0.307)


def tokens_per_step_for(tokens: float) -> float:
    """The batch, in tokens: Li et al. 2025, 0.58 D^0.571."""
    return 0.58 * tokens**0.571
