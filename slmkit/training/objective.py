"""Objectives: from model and batch to a sum of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.device import Device
from slmkit.model.decoder import Decoder
from slmkit.training.distributed import Group
from slmkit.training.losses import linear_cross_entropy


@dataclass(frozen=True)
class Loss:
    """Sums over a batch, to be divided by the objective's weight of the whole step.

    `figures` are reported beside the loss, such as how often a preferred answer is the likelier one. A figure of two
    numbers is a sum and its own divisor.
    """

    total: Tensor  # [], in nats, with autograd graph
    figures: Mapping[str, Tensor] = field(default_factory=dict)  # detached; [] or [2] each


class Objective(Protocol):
    """What is minimised, and the divisor of its sums.

    If the loss of a row depends on a mean over the whole step, computed before any gradient, an objective also has
    `survey(model, batch)`: the sum [] of that quantity over the rows that count in `weight`.
    """

    def __call__(self, model: Decoder, batch: Batch) -> Loss: ...

    def weight(self, batch: Batch) -> int:
        """The divisor of a batch's loss: its trained tokens, its pairs, …; 0 where there is nothing to learn."""
        return batch.weight


MEAN_OF_STEP = "mean_of_step"  # key in `Batch.extra`: [rows], the same value in each


@torch.no_grad()
def surveyed(
    objective: Objective, model: Decoder, batches: Sequence[Batch], device: Device, group: Group
) -> list[Batch]:
    """The batches of a step, with the mean over all ranks if the objective needs one. Dropout is off meanwhile."""
    survey = getattr(objective, "survey", None)
    if survey is None:
        return list(batches)
    was_training = model.training
    model.eval()
    total, weight = 0.0, 0
    for batch in batches:
        with device.autocast():
            total += survey(model, batch).item()
        weight += objective.weight(batch)
    model.train(was_training)
    sum_of_all, weight_of_all = group.sum(total, weight)
    mean = sum_of_all / max(1, weight_of_all)
    return [batch.with_extra(**{MEAN_OF_STEP: torch.full((len(batch.ids),), mean).to(batch.ids.device)})
            for batch in batches]  # fmt: skip


class Sums:
    """Sums of losses and figures over the batches of a step or a validation, divided once."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.figures: dict[str, Tensor] = {}

    def add(self, loss: Loss) -> None:
        self.total = self.total + loss.total.detach()
        for name, figure in loss.figures.items():
            self.figures[name] = self.figures[name] + figure if name in self.figures else figure

    def means(self, weight: float, group: Group) -> tuple[float, dict[str, float]]:
        """Mean loss and figures over all ranks. A figure with divisor 0 is left out."""
        numbers = [number for figure in self.figures.values() for number in figure.reshape(-1).tolist()]
        total, *sums = group.sum(float(self.total), *numbers)
        means, rest = {}, iter(sums)
        for name, figure in self.figures.items():
            amount, over = next(rest), next(rest) if figure.dim() else max(1, weight)
            if over:
                means[name] = amount / over
        return total / max(1, weight), means


class NextToken(Objective):
    """Cross-entropy of every label that is learned: pretraining, and fine-tuning on the assistant's tokens alone."""

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        hidden = model(batch.ids, documents=batch.documents)  # [rows, length, width]
        learned = batch.labels != IGNORED  # [rows, length]
        # Only learned positions reach the head: in a conversation most are not, and the head is the widest matrix.
        cap = model.architecture.logit_cap
        return Loss(linear_cross_entropy(hidden[learned], model.head_weight, batch.labels[learned], cap))


next_token = NextToken()
