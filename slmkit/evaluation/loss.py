"""Validation loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from slmkit.data.packing import IGNORED
from slmkit.data.stream import Rows
from slmkit.device import Device
from slmkit.generation.ensemble import LanguageModel
from slmkit.model.sizes import LOGITS_AT_ONCE


@dataclass(frozen=True)
class LossReport:
    """The summed loss in nats, and the number of tokens it was summed over."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits per UTF-8 byte, comparable between tokenizers. `text_bytes`: UTF-8 length of the evaluated text."""
        return self.nats / math.log(2) / text_bytes


@torch.inference_mode()
def validation_loss(
    model: LanguageModel,
    rows: Rows,
    device: Device,
    rows_per_batch: int = 8,
    separate: bool = False,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> LossReport:
    """Cross-entropy summed over all labels of `rows`, in the device's compute precision.

    `separate`: attention stays inside a document, as in training with `data.separate_documents`. Each of `world` ranks
    sums its share of the batches; a share may be empty. `progress` gets the rows done and their total number.
    """
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    for start in range(rank * rows_per_batch, rows.rows_in_epoch, world * rows_per_batch):
        indices = range(start, min(start + rows_per_batch, rows.rows_in_epoch))
        batch = rows.batch(indices, separate).to(device.torch_device)
        with device.autocast():
            learned = batch.labels != IGNORED  # [rows, length]
            hidden = model(batch.ids, documents=batch.documents)[learned]  # [positions, width]
            parts = zip(hidden.split(LOGITS_AT_ONCE), batch.labels[learned].split(LOGITS_AT_ONCE))
            losses = [F.cross_entropy(model.logits(part).float(), wanted, reduction="sum") for part, wanted in parts]
        nats += sum(loss.item() for loss in losses)
        tokens += len(hidden)
        progress(indices.stop, rows.rows_in_epoch)
    model.train(was_training)
    return LossReport(nats, tokens)
