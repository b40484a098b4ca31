"""A student's log-probabilities of a few tokens and of whichever other, with their gradient in one pass each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def outcome_log_probabilities(logits: Tensor, ids: Tensor, tokens: int, temperature: float = 1.0) -> Tensor:
    """log softmax(logits[:, :tokens] / temperature) of `ids` [positions, k], and of all other tokens taken together.

    float32 logits [positions, vocab_size], k < tokens → [positions, k + 1].
    """
    return _OutcomeLogProbabilities.apply(logits, ids, tokens, temperature)


class _OutcomeLogProbabilities(torch.autograd.Function):
    """The other tokens share their outcome's gradient as they share its probability.

    So one exponential of each logit is all that the way back needs: autograd would take those of every step apart.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, tokens: int, temperature: float) -> Tensor:
        others = logits[:, :tokens].scatter(-1, ids, -torch.inf)  # [positions, tokens]
        largest = others.amax(-1, keepdim=True)  # [positions, 1]
        others.sub_(largest).mul_(1 / temperature).exp_()
        sums = others.sum(-1, keepdim=True)  # [positions, 1]
        asked = logits.gather(-1, ids) / temperature  # [positions, k]
        log_q = F.log_softmax(torch.cat([asked, sums.log() + largest / temperature], dim=-1), dim=-1)
        ctx.save_for_backward(others, sums, log_q, ids)
        ctx.temperature, ctx.vocab_size = temperature, logits.size(-1)
        return log_q

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        others, sums, log_q, ids = ctx.saved_tensors
        (given,) = outputs  # [positions, k + 1]
        slopes = (given - log_q.exp() * given.sum(-1, keepdim=True)) / ctx.temperature  # at the outcomes' scores
        of_logits = (others * (slopes[:, -1:] / sums)).scatter_(-1, ids, slopes[:, :-1])  # [positions, tokens]
        return F.pad(of_logits, (0, ctx.vocab_size - of_logits.size(-1))), None, None, None
