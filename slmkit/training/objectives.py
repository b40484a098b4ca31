"""What a step minimises. An objective is a function from model and batch to a sum of losses; the loop knows no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from slmkit.data.stream import Batch
from slmkit.model import Decoder
from slmkit.training.losses import IGNORED, linear_cross_entropy


@dataclass(frozen=True)
class Loss:
    """A sum over the batch in nats, to be divided by the batch's weight over the whole step."""

    total: Tensor


Objective = Callable[[Decoder, Batch], Loss]


def next_token(model: Decoder, batch: Batch) -> Loss:
    """Cross-entropy of every label that is learned: pretraining, and fine-tuning on the assistant's tokens alone."""
    hidden = model(batch.ids, documents=batch.documents)  # [rows, length, width]
    learned = batch.labels != IGNORED  # [rows, length]
    # Only learned positions reach the head: in a conversation most are not, and the head is the widest matrix.
    cap = model.architecture.logit_cap
    return Loss(linear_cross_entropy(hidden[learned], model.head_weight, batch.labels[learned], cap))


OBJECTIVES: dict[str, Objective] = {"pretrain": next_token, "sft": next_token}
