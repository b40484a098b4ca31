"""Teachers: a model in memory, or a cache of top-k logits."""

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
    """Source of a student's targets."""

    def lessons(self, loss: DistillationLoss, batch: Batch, learned: Tensor) -> Callable[[slice], TeacherTargets]:
        """Function from a slice of the learned positions (`learned` [rows, length], row by row) to their targets."""


class OnlineTeacher:
    """A frozen model, evaluated at each step. It is not part of the state or of checkpoints."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        """`tokens`: size of the tokenizer; further entries of the vocabulary are padding, and not learned."""
        self.decoder, self.tokens = decoder, tokens

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Hidden states [rows, length, width]."""
        return self.decoder(batch.ids, documents=batch.documents)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """All logits, float32 [rows, length, vocab_size]."""
        return self.decoder.logits(self.states(batch)).float()

    def lessons(self, loss: DistillationLoss, batch: Batch, learned: Tensor) -> Callable[[slice], TeacherTargets]:
        states = self.states(batch)[learned]  # [positions, width]

        @torch.no_grad()
        def lesson(place: slice) -> TeacherTargets:
            return loss.lesson(self.decoder.logits(states[place]).float(), self.tokens)

        return lesson


class StoredTeacher:
    """Top-k logits stored by `slm distill-cache`, which are part of each batch."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def lessons(self, loss: DistillationLoss, batch: Batch, learned: Tensor) -> Callable[[slice], TeacherTargets]:
        # The first places of a row hold its learned positions.
        filled = torch.arange(learned.size(1), device=learned.device) < learned.sum(1, keepdim=True)
        logits, ids, rest = (batch.extra[name][filled] for name in (LOGITS, IDS, REST))

        def lesson(place: slice) -> TeacherTargets:
            return stored_lesson(logits[place], ids[place], rest[place], self.tokens, loss.temperature)

        return lesson


def stored_lesson(logits: Tensor, ids: Tensor, rest: Tensor, tokens: int, temperature: float) -> TeacherTargets:
    """Targets of the top k and a remainder outcome: logits and ids [positions, k]; `rest` [positions], the
    log-probability of all other tokens at this temperature.

    The probability not in `rest` is distributed by the softmax of the k logits: only their differences matter.
    """
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)  # [positions, k]
    if ids.size(-1) == tokens:
        return TeacherTargets(log_p, tokens, ids.long())
    rest = rest.float()[:, None]  # [positions, 1]
    return TeacherTargets(torch.cat([log_p + torch.log1p(-rest.exp()), rest], dim=-1), tokens, ids.long())


@torch.no_grad()
def likeliest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Top k of float32 logits [positions, tokens] for the cache: logits minus the largest, and ids, both
    [positions, k]; and the log-probability of all others at `temperature` [positions].
    """
    top, ids = logits.topk(k, dim=-1)
    log_p = F.log_softmax(logits / temperature, dim=-1)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return top - top[:, :1], ids, rest


def frozen(decoder: Decoder, device: Device) -> Decoder:
    """The decoder frozen, in evaluation mode, on the run's device."""
    return decoder.to(device.torch_device).eval().requires_grad_(False)


def in_compute_type(decoder: Decoder, device: Device) -> Decoder:
    """The decoder with weights in the type of matrix products: half the memory in bfloat16 runs.

    Float16 runs keep the weights' type: hidden states may overflow in float16.
    """
    if device.compute_dtype == torch.bfloat16:
        for parameter in decoder.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return decoder


def check_fit(decoder: Decoder, tokens: int, length: int, who: str) -> None:
    """Raises `UserError` if the model lacks tokens of the tokenizer, or its context is shorter than a row."""
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
