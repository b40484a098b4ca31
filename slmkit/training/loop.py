"""The loop: one for every objective. Read it from top to bottom in one sitting.

A step takes its batch, a function of (seed, step) alone; sums the losses of its micro-batches; divides once, by
the trained tokens of the whole step; and updates. Whatever else happens (logging, validation, samples, checkpoints)
is a hook.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slmkit.data.stream import Batch, Batches
from slmkit.device import Device
from slmkit.model import Decoder
from slmkit.training.objectives import Objective

Report = dict[str, Any]  # one line of metrics.jsonl; hooks may add to it


@dataclass
class State:
    """Everything that must survive a crash for the run to go on as if it had not happened.

    Every random number follows from `seed` and `step`, and so does the place in shards; a streamed corpus adds its own.
    """

    model: Decoder
    optimizers: list[torch.optim.Optimizer]
    seed: int = 0
    step: int = 0
    tokens: int = 0  # trained tokens so far
    best: dict[str, float] = field(default_factory=dict)  # {"step", "validation_loss"} of the best checkpoint
    data: dict[str, Any] = field(default_factory=dict)  # where a streamed corpus goes on; {} of shards


@dataclass(frozen=True)
class Plan:
    """How long and how: what the loop needs of a recipe."""

    steps: int
    rows_per_micro_batch: int
    max_grad_norm: float
    schedule: Callable[[int], float]  # step → share of the peak learning rate
    device: Device


Hook = Callable[[State, Report], None]


@dataclass(frozen=True)
class Every:
    """Call `hook` after each `steps`-th step, and after the last one of the run."""

    steps: int
    hook: Hook


class RunStopped(Exception):  # noqa: N818 - no error: the user asked for it
    """The run was asked to stop and did, with a checkpoint: nothing is wrong, but nothing should follow on it."""


class StopRequested:
    """Set from outside (a signal, a test) to end the loop after the step it is in."""

    def __init__(self) -> None:
        self.is_set = False


def train(
    state: State,
    objective: Objective,
    stream: Batches,
    plan: Plan,
    hooks: Sequence[Every] = (),
    stop: StopRequested | None = None,
) -> State:
    """Run from `state.step` to `plan.steps`, or to the end of the data.

    Hooks fire in their order; a stop makes the step it ends the last one.
    """
    state.model.train()
    stream.seek(state.step, state.data)
    while state.step < plan.steps and stream.has(state.step):
        started = time.perf_counter()
        batch = stream.batch(state.step)
        report = train_step(state, objective, batch, plan)
        report["tokens_per_second"] = round(batch.weight / (time.perf_counter() - started))
        report |= {f"share/{name}": share for name, share in stream.shares(state.step).items()}
        state.data = stream.position()
        is_last = state.step == plan.steps or (stop is not None and stop.is_set) or not stream.has(state.step)
        for hook in hooks:
            if is_last or state.step % hook.steps == 0:
                hook.hook(state, report)
                state.model.train()
        if is_last:
            break
    return state


def train_step(state: State, objective: Objective, batch: Batch, plan: Plan) -> Report:
    """One update. Raises `FloatingPointError` instead of applying a gradient that is not finite."""
    # Dropout draws from (seed, step), so that a resumed run draws what the unbroken one would have drawn.
    torch.manual_seed(_mixed(state.seed, state.step))
    if batch.weight == 0:
        raise ValueError(f"step {state.step}: not one trained token in its batch")
    rate = plan.schedule(state.step)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate

    total = torch.zeros((), device=plan.device.torch_device)
    for micro_batch in batch.to(plan.device.torch_device).split(plan.rows_per_micro_batch):
        with plan.device.autocast():
            loss = objective(state.model, micro_batch).total
        (loss / batch.weight).backward()
        total += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), plan.max_grad_norm)
    if not torch.isfinite(grad_norm):
        state.model.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"step {state.step}: the gradient norm is {grad_norm.item()}; weights left as they were"
        )
    for optimizer in state.optimizers:
        optimizer.step()
    state.model.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += batch.weight
    return {
        "step": state.step,
        "tokens": state.tokens,
        "loss": (total / batch.weight).item(),  # nats a trained token
        "learning_rate": state.optimizers[-1].param_groups[0]["lr"],
        "grad_norm": grad_norm.item(),
    }


def _mixed(seed: int, step: int) -> int:
    """A 63-bit seed of a step, unrelated to its neighbours'."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
