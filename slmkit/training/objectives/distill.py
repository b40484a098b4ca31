"""Distillation objectives of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.config import UserError, kind_of_value
from slmkit.data.batch import Batch
from slmkit.model.decoder import Decoder
from slmkit.training.losses import IGNORED, chunked_loss
from slmkit.training.objective import Loss
from slmkit.training.objectives.distillation import DistillationLoss
from slmkit.training.objectives.teachers import OnlineTeacher, Teacher


class Distill:
    """A `DistillationLoss` at the learned positions, with chunked logits.

    Figures: the cross-entropy of the labels and the divergence from the teacher, in nats.
    """

    def __init__(self, loss: DistillationLoss, teacher: Teacher) -> None:
        self.loss, self.teacher = loss, teacher

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        learned = batch.labels != IGNORED  # [rows, length]
        labels, lessons = batch.labels[learned], self.teacher.lessons(self.loss, batch, learned)
        hidden = model(batch.ids, documents=batch.documents)[learned]  # [positions, width]

        def of_chunk(logits: Tensor, place: slice) -> tuple[Tensor, Tensor]:
            parts = self.loss.parts(logits, lessons(place), labels[place])
            return self.loss.mixed(*parts), torch.stack(parts)

        total, (cross_entropy, divergence) = chunked_loss(
            hidden, model.head_weight, model.architecture.logit_cap, of_chunk
        )
        return Loss(total, {"cross_entropy": cross_entropy, "divergence": divergence})

    def weight(self, batch: Batch) -> int:
        return batch.weight


class DistillWithStates:
    """`Distill`, plus a layer-wise loss on hidden states, reported as `hidden`."""

    def __init__(self, logits: Distill, teacher: OnlineTeacher, share: float) -> None:
        self.logits, self.teacher, self.share = logits, teacher, share

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        pairs = paired_layers(len(model.blocks), len(self.teacher.decoder.blocks))
        mine, theirs = zip(*pairs)
        with watched_layers(model, mine) as student, watched_layers(self.teacher.decoder, theirs) as teacher:
            loss = self.logits(model, batch)
        learned = batch.labels != IGNORED
        apart = [relations_apart(s, t, learned) for s, t in zip(student, teacher, strict=True)]
        hidden = torch.stack(apart).mean()
        figures: Mapping[str, Tensor] = {**loss.figures, "hidden": hidden.detach()}
        return Loss(loss.total + self.share * hidden, figures)

    def weight(self, batch: Batch) -> int:
        return batch.weight


class DistillAsGiven:
    """A user's own loss, called with all logits: [rows, length, vocab_size], labels [rows, length].

    Raises `UserError` if it does not return a tensor of one number.
    """

    def __init__(self, loss: DistillationLoss, teacher: OnlineTeacher) -> None:
        self.loss, self.teacher = loss, teacher

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        theirs = self.teacher.logits(batch)
        logits = model.logits(model(batch.ids, documents=batch.documents)).float()
        total = self.loss(logits, theirs, batch.labels)
        if not isinstance(total, Tensor) or total.dim():
            raise UserError(
                f"{type(self.loss).__name__}.forward: expected a tensor of one number, the sum over learned labels, "
                f"found {tuple(total.shape) if isinstance(total, Tensor) else kind_of_value(total)}"
            )
        learned = batch.labels != IGNORED
        with torch.no_grad():
            lesson = self.loss.lesson(theirs[learned], self.teacher.tokens)
            cross_entropy, divergence = self.loss.parts(logits[learned], lesson, batch.labels[learned])
        return Loss(total, {"cross_entropy": cross_entropy, "divergence": divergence})

    def weight(self, batch: Batch) -> int:
        return batch.weight


def objective_of(loss: DistillationLoss, teacher: OnlineTeacher) -> Distill | DistillAsGiven:
    """`Distill`, or `DistillAsGiven` if `loss` overrides `forward`."""
    is_built_in = type(loss).forward is DistillationLoss.forward
    return Distill(loss, teacher) if is_built_in else DistillAsGiven(loss, teacher)


def paired_layers(students: int, teachers: int) -> list[tuple[int, int]]:
    """Pairs of student and teacher layers at the same relative depth; the last layers are a pair."""
    return [(layer, -(-(layer + 1) * teachers // students) - 1) for layer in range(students)]


@contextmanager
def watched_layers(model: Decoder, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Context manager that collects these blocks' outputs in each forward pass: [rows, length, width] each."""
    seen: list[Tensor] = []

    @torch.compiler.disable
    def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output)

    handles = [model.blocks[layer].register_forward_hook(see) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relations_apart(student: Tensor, teacher: Tensor, learned: Tensor) -> Tensor:
    """Sum [] over the positions of `learned` [rows, length] of the mean squared difference between the cosine
    similarities to all positions of the row, in student and teacher states [rows, length, width].
    """
    total = torch.zeros((), device=student.device)
    with torch.autocast(student.device.type, enabled=False):
        for mine, theirs, here in zip(student, teacher, learned):
            s, t = (F.normalize(states[here].float(), dim=-1) for states in (mine, theirs))  # [positions, width]
            if len(s):
                total = total + (s @ s.T - t @ t.T).square().mean(-1).sum()
    return total
