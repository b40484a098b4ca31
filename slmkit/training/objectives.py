"""What a step minimises. An objective goes from model and batch to a sum of losses; the loop knows no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from slmkit.data.batch import Batch
from slmkit.model import Decoder
from slmkit.training.losses import IGNORED, linear_cross_entropy


@dataclass(frozen=True)
class Loss:
    """Sums over a batch, to be divided by the objective's weight of the whole step.

    `figures` are told of in the report beside the loss, such as how often a preferred answer is the likelier one.
    """

    total: Tensor  # in nats, with its graph
    figures: Mapping[str, Tensor] = field(default_factory=dict)  # without one


class Objective(Protocol):
    """What is minimised, and what its sums are divided by."""

    def __call__(self, model: Decoder, batch: Batch) -> Loss: ...

    def weight(self, batch: Batch) -> int:
        """What of a batch the mean is over: its trained tokens, its pairs, …; 0 where there is nothing to learn."""


class NextToken:
    """Cross-entropy of every label that is learned: pretraining, and fine-tuning on the assistant's tokens alone."""

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        hidden = model(batch.ids, documents=batch.documents)  # [rows, length, width]
        learned = batch.labels != IGNORED  # [rows, length]
        # Only learned positions reach the head: in a conversation most are not, and the head is the widest matrix.
        cap = model.architecture.logit_cap
        return Loss(linear_cross_entropy(hidden[learned], model.head_weight, batch.labels[learned], cap))

    def weight(self, batch: Batch) -> int:
        return batch.weight


next_token = NextToken()
