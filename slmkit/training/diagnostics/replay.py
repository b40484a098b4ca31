"""Replay of one step with hooks on every module: which one produced NaN or infinity, at which row and token.

Training goes from the checkpoint before the step through the steps in between, which are bit-identical on the same
kind of machine. Nothing is written.
"""

from __future__ import annotations

import dataclasses
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


@dataclass(frozen=True)
class NonFinite:
    """The first non-finite tensor: an output in the forward pass, or a gradient in the backward pass."""

    what: str  # such as `output of blocks.3.mlp.up`
    row: int | None = None  # of the batch; None for a weight's gradient, which is a sum over rows
    position: int | None = None  # the first in that row


@dataclass(frozen=True)
class Row:
    """Loss and gradient of one row alone. Dropout draws other numbers than in the batch."""

    number: int
    loss: float  # nats per trained token
    grad_norm: float


@dataclass(frozen=True)
class Replay:
    """Results of a replayed step."""

    start: int  # the step that training started from
    batch: Batch
    report: Report
    broken: NonFinite | None
    gradients: list[tuple[str, float]]  # the norm of each parameter's gradient, the largest first
    rows: list[Row]  # the largest gradient first


def replay_step(
    state: State,
    objective: Objective,
    stream: Batches,
    plan: Plan,
    step: int,
    recorded: Batch | None = None,
    hooks: Sequence[Every] = (),
) -> Replay:
    """Train from `state`, of an earlier step, through step `step` (from 1, as in metrics.jsonl).

    A `recorded` batch replaces the stream's for that step. `hooks` are called in the steps before it.
    """
    start = state.step
    train(state, objective, stream, dataclasses.replace(plan, steps=step - 1), hooks)
    batch = stream.batch(step - 1) if recorded is None else recorded
    state.model.train()
    rows = [
        Row(number, *compute_gradients(state, objective, row, plan)[:2]) for number, row in enumerate(batch.split(1))
    ]
    with watched(state.model, plan.rows_per_micro_batch, len(batch.ids)) as watch:
        report = train_step(state, objective, batch, plan)
    return Replay(
        start=start,
        batch=batch,
        report=report,
        broken=watch.broken,
        gradients=sorted(watch.norms.items(), key=_size, reverse=True),
        rows=sorted(rows, key=lambda row: _size((row.number, row.grad_norm)), reverse=True),
    )


def differences(replayed: Report, recorded: Report) -> dict[str, tuple[Any, Any]]:
    """Figures that are not bit-identical: name → (replayed, recorded)."""
    return {
        key: (value, recorded[key])
        for key, value in finite(replayed).items()
        if key in recorded and recorded[key] != value
    }


@dataclass
class Watch:
    """Results of the hooks of `watched`."""

    broken: NonFinite | None = None
    norms: dict[str, float] = field(default_factory=dict)
    micro_batch: int = -1  # index of the current one

    def see(self, what: str, tensor: Tensor, first_row: int | None) -> None:
        """Record the first non-finite tensor."""
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
    watch = Watch()
    micro_batches = -(-rows // rows_per_micro_batch)
    handles: list[Any] = []

    def begin(*_: Any) -> None:
        watch.micro_batch = (watch.micro_batch + 1) % micro_batches
        if watch.micro_batch == 0:  # the step starts again, with a lower loss scale
            watch.broken = None

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first_row = watch.micro_batch * rows_per_micro_batch
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    watch.see(f"output of {name}", tensor.detach(), first_row)
                    if tensor.requires_grad:
                        tensor.register_hook(
                            lambda gradient: watch.see(f"gradient at the output of {name}", gradient, first_row)
                        )

        return hook

    def arrived(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                watch.see(f"gradient of {name}", parameter.grad, None)
                watch.norms[name] = parameter.grad.norm().item()

        return hook

    handles.append(model.register_forward_pre_hook(begin))
    handles += [module.register_forward_hook(after(name)) for name, module in model.named_modules() if name]
    handles += [p.register_post_accumulate_grad_hook(arrived(name)) for name, p in trained(model).items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _size(named: tuple[Any, float]) -> float:
    """Sort key: NaN counts as larger than all numbers."""
    return named[1] if named[1] == named[1] else float("inf")
