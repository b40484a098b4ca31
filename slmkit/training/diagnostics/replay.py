"""Replay of one step with hooks on every module: which one produced NaN or infinity, at which row and token.

Training goes from the checkpoint before the step through the steps in between, which are bit-identical on the same
kind of machine. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.data.batch import Batch
from slmkit.data.stream import Batches
from slmkit.training.logging.metrics_log import finite
from slmkit.training.loop import Every, Plan, Report, State, compute_gradients, train, train_step
from slmkit.training.objective import Objective
from slmkit.training.optimizers.choose import trained

TOKENS_BEFORE = 24  # context shown before a token


@dataclass(frozen=True)
class NonFinite:
    """The first non-finite tensor: an output in the forward pass, or a gradient in the backward pass."""

    what: str  # such as `output of blocks.3.mlp.up`
    row: int | None = None  # of the batch; None for a weight's gradient, which is a sum over rows
    position: int | None = None  # the first in that row


@dataclass(frozen=True)
class RowGradient:
    """Loss and gradient of one row alone. Dropout draws other numbers than in the batch."""

    number: int
    loss: float  # nats per trained token
    grad_norm: float


@dataclass(frozen=True)
class Replay:
    """A replayed step, and the run's record of it."""

    batch: Batch
    report: Report
    recorded: Report | None  # the step's line in metrics.jsonl, if it was logged
    broken: NonFinite | None
    gradients: list[tuple[str, float]]  # the norm of each parameter's gradient, the largest first
    rows: list[RowGradient]  # the largest gradient first
    decode: Callable[[list[int]], str]

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Figures that are not bit-identical, name → (replayed, recorded); on another kind of machine, some differ."""
        recorded = self.recorded or {}
        return {
            key: (value, recorded[key])
            for key, value in finite(self.report).items()
            if key in recorded and recorded[key] != value
        }

    def text_before(self, row: int, position: int) -> str:
        """Text of a row up to a token, inclusive."""
        return self.decode(self.batch.ids[row, max(0, position - TOKENS_BEFORE) : position + 1].tolist())


def replay_step(
    state: State,
    objective: Objective,
    stream: Batches,
    plan: Plan,
    step: int,
    recorded: Report | None,
    recorded_batch: Batch | None,
    decode: Callable[[list[int]], str],
    hooks: Sequence[Every] = (),
) -> Replay:
    """Train from `state`, of an earlier step, through step `step` (from 1, as in metrics.jsonl).

    `recorded_batch` replaces the stream's for that step. `hooks` are called in the steps before it.
    """
    train(state, objective, stream, dataclasses.replace(plan, steps=step - 1), hooks)
    batch = stream.batch(step - 1) if recorded_batch is None else recorded_batch
    state.model.train()
    rows = [
        RowGradient(number, *compute_gradients(state, objective, row, plan)[:2])
        for number, row in enumerate(batch.split(1))
    ]
    with watched(state.model, plan.rows_per_micro_batch, len(batch.ids)) as watch:
        report = train_step(state, objective, batch, plan)
    gradients = sorted(watch.norms.items(), key=lambda named: _size(named[1]), reverse=True)
    rows.sort(key=lambda row: _size(row.grad_norm), reverse=True)
    return Replay(batch, report, recorded, watch.broken, gradients, rows, decode)


def _size(norm: float) -> float:
    """Sort key: NaN counts as larger than all numbers."""
    return math.inf if math.isnan(norm) else norm


@dataclass
class Watch:
    """Hooks that note the first non-finite tensor of a step, and the norm of each weight's gradient."""

    rows_per_micro_batch: int
    micro_batches: int
    broken: NonFinite | None = None
    norms: dict[str, float] = field(default_factory=dict)
    micro_batch: int = -1  # index of the current one

    def begin(self, *_: Any) -> None:
        self.micro_batch = (self.micro_batch + 1) % self.micro_batches
        if self.micro_batch == 0:  # the step starts again, with a lower loss scale
            self.broken = None

    def after_forward(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        first_row = self.micro_batch * self.rows_per_micro_batch
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.see(f"output of {name}", first_row, tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(functools.partial(self.see, f"gradient at the output of {name}", first_row))

    def after_backward(self, name: str, parameter: Tensor) -> None:  # [...]
        if parameter.grad is not None:
            self.see(f"gradient of {name}", None, parameter.grad)
            self.norms[name] = parameter.grad.norm().item()

    def see(self, what: str, first_row: int | None, tensor: Tensor) -> None:  # [rows, length, width] or [...]
        if self.broken is not None or torch.isfinite(tensor).all():
            return
        if first_row is None or tensor.dim() < 3:  # not [rows, length, width]
            self.broken = NonFinite(what)
            return
        places = (~torch.isfinite(tensor)).flatten(2).any(-1).nonzero()  # [broken, 2]
        row, position = places[0].tolist()
        self.broken = NonFinite(what, first_row + row, position)


@contextmanager
def watched(model: nn.Module, rows_per_micro_batch: int, rows: int) -> Iterator[Watch]:
    """Context manager with hooks on every module's output, every output's gradient and every weight's gradient."""
    watch = Watch(rows_per_micro_batch, -(-rows // rows_per_micro_batch))
    handles: list[Any] = [model.register_forward_pre_hook(watch.begin)]
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(functools.partial(watch.after_forward, name)))
    for name, parameter in trained(model).items():
        hook = functools.partial(watch.after_backward, name)
        handles.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
