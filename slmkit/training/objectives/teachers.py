"""Teachers: one that is asked during training, and one of whom only the likeliest tokens were stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.rows.teacher_cache import IDS, LOGITS, REST
from slmkit.device import Device
from slmkit.model.decoder import Decoder
from slmkit.training.objectives.distillation import DistillationLoss, TeacherTargets


class Teacher(Protocol):
    """Whoever says what a student should."""

    def lessons(self, loss: DistillationLoss, batch: Batch, learned: Tensor) -> Callable[[slice], TeacherTargets]:
        """What is said at any of the learned positions, which `learned` [rows, length] shows, row by row."""


class OnlineTeacher:
    """A frozen model, asked at each step. It is no part of the state, and so in no checkpoint."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        """`tokens`: of the tokenizer; what a vocabulary holds beyond them is padding, and is not learned."""
        self.decoder, self.tokens = decoder, tokens

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Hidden states [rows, length, width]."""
        return self.decoder(batch.ids, documents=batch.documents)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """All of them, float32 [rows, length, vocab_size]."""
        return self.decoder.logits(self.states(batch)).float()

    def lessons(self, loss: DistillationLoss, batch: Batch, learned: Tensor) -> Callable[[slice], TeacherTargets]:
        states = self.states(batch)[learned]  # [positions, width]

        @torch.no_grad()
        def lesson(place: slice) -> TeacherTargets:
            return loss.lesson(self.decoder.logits(states[place]).float(), self.tokens)

        return lesson


class StoredTeacher:
    """What `slm distill-cache` stored of a teacher, which comes with each batch."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def lessons(self, loss: DistillationLoss, batch: Batch, learned: Tensor) -> Callable[[slice], TeacherTargets]:
        # Of a row's places, the first ones hold its learned positions.
        filled = torch.arange(learned.size(1), device=learned.device) < learned.sum(1, keepdim=True)
        logits, ids, rest = (batch.extra[name][filled] for name in (LOGITS, IDS, REST))

        def lesson(place: slice) -> TeacherTargets:
            return stored_lesson(logits[place], ids[place], rest[place], self.tokens, loss.temperature)

        return lesson


def stored_lesson(logits: Tensor, ids: Tensor, rest: Tensor, tokens: int, temperature: float) -> TeacherTargets:
    """The k likeliest tokens and whichever other: logits and ids [positions, k]; `rest` [positions], the log of the
    probability of all others at this temperature.

    The k share what the rest leaves as their logits say, so that only the differences of these matter.
    """
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)  # [positions, k]
    if ids.size(-1) == tokens:
        return TeacherTargets(log_p, tokens, ids.long())
    rest = rest.float()[:, None]  # [positions, 1]
    return TeacherTargets(torch.cat([log_p + torch.log1p(-rest.exp()), rest], dim=-1), tokens, ids.long())


@torch.no_grad()
def likeliest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is stored of float32 logits [positions, tokens]: the k largest, less the largest of all, their ids, both
    [positions, k], and the log of what all others have of the probability at `temperature` [positions].
    """
    top, ids = logits.topk(k, dim=-1)
    log_p = F.log_softmax(logits / temperature, dim=-1)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return top - top[:, :1], ids, rest


def frozen(decoder: Decoder, device: Device) -> Decoder:
    """A teacher as a run uses it: on its device, for reading alone."""
    return decoder.to(device.torch_device).eval().requires_grad_(False)


def in_compute_type(decoder: Decoder, device: Device) -> Decoder:
    """Weights in the type in which matrices are multiplied, half the memory of bfloat16 runs.

    Float16 leaves them as they are: hidden states may grow beyond what that type holds.
    """
    if device.compute_dtype == torch.bfloat16:
        for parameter in decoder.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return decoder


def check_fit(decoder: Decoder, tokens: int, length: int, who: str) -> None:
    """Raises `UserError` where a teacher does not know all of a tokenizer's tokens, or cannot read a whole row."""
    a = decoder.architecture
    if a.vocab_size < tokens:
        raise UserError(
            f"{who}: a vocabulary of {a.vocab_size:,} for a tokenizer of {tokens:,} tokens: teacher and student must "
            "have the same tokenizer"
        )
    if a.max_positions < length:
        raise UserError(
            f"{who}: reads {a.max_positions:,} tokens at most, rows have {length:,}: lower train.sequence_length"
        )
