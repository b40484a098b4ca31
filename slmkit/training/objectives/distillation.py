"""Distillation: a student learns a teacher's distribution in addition to the labels.

    loss = alpha * CE(student, label) + (1 - alpha) * T² * D(p, q)
    p = softmax(teacher's logits / T),  q = softmax(student's logits / T)

Hinton et al. 2015, arXiv:1503.02531: T > 1 gives the teacher's unlikely tokens more weight, and T² keeps the gradient
as large as at T = 1. `alpha` is the weight of the labels. D is the forward KL(p || q), which covers all modes of the
teacher; the reverse KL(q || p), which is mode-seeking (MiniLLM, arXiv:2306.08543); or the Jensen-Shannon divergence
(GKD, arXiv:2306.13649).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.config import UserError, arguments_checked, did_you_mean
from slmkit.training.losses import IGNORED

Divergence = Callable[[Tensor, Tensor], Tensor]  # log p and log q [positions, outcomes] → nats [positions]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each position: [positions, outcomes] twice → nats [positions]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2: [positions, outcomes] twice → nats [positions]."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "js": jensen_shannon,
}


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's distribution at some positions, at a temperature.

    The outcomes are all `tokens`; or, with `ids`, the teacher's top k plus one outcome for all other tokens (absent if
    k is all tokens).
    """

    log_p: Tensor  # float32 [positions, outcomes]
    tokens: int  # shared by teacher and student: the first of both vocabularies
    ids: Tensor | None = None  # int64 [positions, k]

    def asked_of(self, logits: Tensor, temperature: float) -> Tensor:
        """log q of the same outcomes: a student's float32 logits [positions, vocab_size] → [positions, outcomes]."""
        if self.ids is None:
            return F.log_softmax(logits[:, : self.tokens] / temperature, dim=-1)
        if self.ids.size(-1) == self.tokens:
            return F.log_softmax(logits.gather(-1, self.ids) / temperature, dim=-1)
        return outcome_log_probabilities(logits, self.ids, self.tokens, temperature)


class DistillationLoss(nn.Module):
    """The loss above. A subclass may override `forward`, and is given to `SLMTrainer(distillation_loss=…)`."""

    @arguments_checked
    def __init__(self, alpha: float = 0.5, temperature: float = 3.0, divergence: str = "forward_kl") -> None:
        """`alpha` (0 to 1) is the weight of the labels' cross-entropy. Raises `UserError` for values out of range."""
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"expected an alpha from 0 to 1, found {alpha}: it is the share of the labels")
        if temperature <= 0:
            raise UserError(f"expected a temperature above 0, found {temperature}")
        if divergence not in DIVERGENCES:
            raise UserError(f"unknown divergence {divergence!r}; {did_you_mean(divergence, DIVERGENCES)}")
        self.alpha, self.temperature, self.divergence = alpha, temperature, divergence

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [..., vocab_size] each, labels [...] of the same positions → sum [] over learned ones, in nats.

        `labels[t]` is the token after position t, or -100: not learned. A sum: the loop divides once by the labels
        of the whole step. If the vocabularies differ in size, the divergence is over the first tokens of both.
        """
        learned = labels != IGNORED
        student, teacher = student_logits[learned].float(), teacher_logits[learned].float()  # [positions, vocab_size]
        lesson = self.lesson(teacher, min(student.size(-1), teacher.size(-1)))
        return self.mixed(*self.parts(student, lesson, labels[learned]))

    def lesson(self, teacher_logits: Tensor, tokens: int) -> TeacherTargets:
        """Targets from float32 logits [positions, vocab_size], of which the first `tokens` columns count."""
        return TeacherTargets(F.log_softmax(teacher_logits[:, :tokens] / self.temperature, dim=-1), tokens)

    def parts(self, student_logits: Tensor, lesson: TeacherTargets, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of cross-entropy and divergence, in nats: float32 logits [positions, vocab_size], labels [positions]."""
        divergence = DIVERGENCES[self.divergence](lesson.log_p, lesson.asked_of(student_logits, self.temperature))
        return F.cross_entropy(student_logits, labels, reduction="sum"), divergence.sum()

    def mixed(self, cross_entropy: Tensor, divergence: Tensor) -> Tensor:  # [] each
        return self.alpha * cross_entropy + (1 - self.alpha) * self.temperature**2 * divergence


def outcome_log_probabilities(logits: Tensor, ids: Tensor, tokens: int, temperature: float = 1.0) -> Tensor:
    """log softmax(logits[:, :tokens] / temperature) of `ids` [positions, k], and of all other tokens together.

    float32 logits [positions, vocab_size], k < tokens → [positions, k + 1].
    """
    return _OutcomeLogProbabilities.apply(logits, ids, tokens, temperature)


class _OutcomeLogProbabilities(torch.autograd.Function):
    """The gradient of the remainder outcome is distributed over its tokens in proportion to their probabilities.

    The backward pass thus needs only one exponential per logit; autograd would keep those of every operation.
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
        slopes = (given - log_q.exp() * given.sum(-1, keepdim=True)) / ctx.temperature  # at the logits
        of_logits = (others * (slopes[:, -1:] / sums)).scatter_(-1, ids, slopes[:, :-1])  # [positions, tokens]
        return F.pad(of_logits, (0, ctx.vocab_size - of_logits.size(-1))), None, None, None
