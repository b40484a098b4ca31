"""Published scaling laws: the loss to expect, the size that fits a budget, and the learning rate and batch for it.

They were fitted on models of about 60 M parameters and more: for smaller models they are extrapolations.
"""

from __future__ import annotations

import math

# Hoffmann et al. 2022 (arXiv:2203.15556), approach 3, with the fit corrected by Besiroglu et al. 2024
# (arXiv:2404.10102): L(N, D) = E + A / N^α + B / D^β, in nats a token of web text in a vocabulary of 32,000.
E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
# Muennighoff et al. 2023 (arXiv:2305.16264): repeated tokens are worth less in each epoch.
REPETITIONS = 15.39
HIGHEST_RATE = 1e-2  # AdamW's; the law exceeds it below a million parameters, where it was not tested


def expected_loss(parameters: float, tokens: float, unique_tokens: float | None = None) -> float:
    """Expected loss in nats per token, of `parameters` with embeddings after `tokens` trained tokens.

    `unique_tokens`: size of the training text, if it is read more than once.
    """
    if unique_tokens is not None and unique_tokens < tokens:
        repetitions = tokens / unique_tokens - 1
        tokens = unique_tokens * (1 + REPETITIONS * (1 - math.exp(-repetitions / REPETITIONS)))
    return E + A / parameters**ALPHA + B / tokens**BETA


def parameters_for(tokens: float) -> float:
    """Compute-optimal number of parameters for `tokens` tokens.

    At constant 6 N D, the loss is lowest at α A / N^α = β B / D^β.
    """
    return (ALPHA * A / (BETA * B) * tokens**BETA) ** (1 / ALPHA)


def learning_rate_for(parameters: float, tokens: float) -> float:
    """AdamW's peak rate: Li et al. 2025 (arXiv:2503.04715, "Step Law"), 1.79 N^-0.713 D^0.307, N without embeddings."""
    return min(HIGHEST_RATE, 1.79 * parameters**-0.713 * tokens**0.307)


def tokens_per_step_for(tokens: float) -> float:
    """Tokens per step: Li et al. 2025, 0.58 D^0.571."""
    return 0.58 * tokens**0.571
