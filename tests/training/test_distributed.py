"""Two and four processes over gloo train what one process trains, and read each other's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import profile

from slmkit.data.stream import Stream
from slmkit.device import DeviceError, Ranks, find_device, find_ranks
from slmkit.model import build_decoder
from slmkit.training.distributed import ALONE, join
from slmkit.training.loop import Every, train_step
from slmkit.training.objectives import next_token
from slmkit.training.optimizers import OPTIMIZERS
from slmkit.training.recipe import Recipe
from slmkit.training.run import RunDirectory, State, fit, make_plan
from tests.training.helpers import LENGTH, TOKENIZER, config, dataset, settings
from tests.training.ranks import on_ranks

STEPS = 6


class UnevenRows:
    """Rows of which 0 to 31 tokens are learned: ranks have unequal weights, and some of them none at all."""

    rows_in_epoch, length = 40, LENGTH

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = (np.arange(LENGTH) * (index % 7 + 1) + index) % 260
        labels = np.roll(ids, -1)
        labels[(index % 4) * 8 :] = -100
        return ids, labels

    def documents(self, index: int) -> np.ndarray:
        return np.zeros(LENGTH, dtype=np.int64)


def train_run(root: Path, parallel: str, resume: bool = False, stop_at: int | None = None, **changes: Any) -> None:
    """A run on whatever ranks there are: 7 rows a step, 2 at once, so that no split is even. Metrics are its result."""
    masked = changes.pop("masked", False)
    train = settings(
        parallel=parallel, tokens_per_step=7 * LENGTH, micro_batch_tokens=2 * LENGTH, max_steps=STEPS,
        eval_steps=2, max_grad_norm=0.5, **changes,
    )  # fmt: skip
    rows, directory = UnevenRows() if masked else dataset(), RunDirectory(root)
    device = find_device("cpu", "float32")
    with join(device, 60) as group:
        if group.is_main:
            directory.checkpoints.mkdir(parents=True, exist_ok=True)
        plan = make_plan(train, rows.rows_in_epoch, LENGTH, device, group)
        shape = config(vocab_size=261)  # not divisible by any number of ranks
        fit(
            directory,
            Recipe(output_dir=str(root), train=train),
            build_decoder(shape, seed=1),
            shape,
            Stream(rows, train.rows_per_step(LENGTH), seed=0),
            plan,
            companions=TOKENIZER.save_pretrained,
            resume=resume,
        )
