"""The loop: one for every objective. Read it from top to bottom in one sitting.

A step takes its batch, a function of (seed, step) alone; sums the losses of its micro-batches; divides once, by
the trained tokens of the whole step; and updates. Whatever else happens (logging, validation, samples, checkpoints)
is a hook.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from slmkit.data.stream import Batch, Batches
from slmkit.device import Device
from slmkit.model import Decoder
from slmkit.training.guards import Guard, GuardSettings
from slmkit.training.objectives import Objective
from slmkit.training.precision import LossScale

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
    guard: Guard = field(default_factory=Guard)
    loss_scale: LossScale = field(default_factory=LossScale)
    data: dict[str, Any] = field(default_factory=dict)  # where a streamed corpus goes on; {} of shards


@dataclass(frozen=True)
class Plan:
    """How long and how: what the loop needs of a recipe."""

    steps: int
    rows_per_micro_batch: int
    max_grad_norm: float
    schedule: Callable[[int], float]  # step → share of the peak learning rate
    device: Device
    guard: GuardSettings = field(default_factory=GuardSettings)


Hook = Callable[[State, Report], None]


@dataclass(frozen=True)
class Every:
    """Call `hook` after each `steps`-th step, and after the last one of the run.

    A run that is stopped early ends as it would have gone on, so that a resumed one has the same metrics as an unbroken
    one: only what must not be lost (`on_stop`) is done out of turn.
    """

    steps: int
    hook: Hook
    on_stop: bool = False


class Recorder(Protocol):
    """Is told of every step with its batch, and writes down what is needed to look at one again."""

    def note(self, batch: Batch, report: Report) -> None: ...


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
    recorder: Recorder | None = None,
) -> State:
    """Run from `state.step` to `plan.steps`, or to the end of the data.

    Hooks fire in their order; a stop makes the step it ends the last one. Raises `Diverged` when the guard has refused
    too many steps in a row.
    """
    state.model.train()
    stream.seek(state.step, state.data)
    while state.step < plan.steps and stream.has(state.step):
        state.guard.check(plan.guard)
        started = time.perf_counter()
        batch = stream.batch(state.step)
        report = train_step(state, objective, batch, plan)
        report["tokens_per_second"] = round(batch.weight / (time.perf_counter() - started))
        report |= {f"share/{name}": share for name, share in stream.shares(state.step).items()}
        state.data = stream.position()
        if recorder is not None:
            recorder.note(batch, report)
        is_last = state.step == plan.steps or not stream.has(state.step)
        is_stopping = stop is not None and stop.is_set
        for hook in hooks:
            if is_last or state.step % hook.steps == 0 or (is_stopping and hook.on_stop):
                hook.hook(state, report)
                state.model.train()
        if is_stopping:
            break
    return state


def train_step(state: State, objective: Objective, batch: Batch, plan: Plan) -> Report:
    """One update, or none where the guard refuses it or there is nothing to learn: then `skipped` says why."""
    rate = plan.schedule(state.step) * state.guard.learning_rate_ratio(plan.guard)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate

    mean_loss, grad_norm = compute_gradients(state, objective, batch, plan)
    while state.loss_scale.overflows(mean_loss, grad_norm):
        mean_loss, grad_norm = compute_gradients(state, objective, batch, plan)
    if batch.weight == 0:
        refused: str | None = "not one trained token in its batch"
    else:
        refused = state.guard.judge(plan.guard, mean_loss, grad_norm)
    if refused is None:
        seed_everything(state.seed, state.step)  # rounding draws what it draws on every rank
        for optimizer in state.optimizers:
            optimizer.step()
        state.tokens += batch.weight
    state.model.zero_grad(set_to_none=True)
    state.step += 1
    report = {
        "step": state.step,
        "tokens": state.tokens,
        "loss": mean_loss,  # nats a trained token
        "learning_rate": state.optimizers[-1].param_groups[0]["lr"],
        "grad_norm": grad_norm,
    }
    return report if refused is None else report | {"skipped": refused, "skipped_steps": state.guard.skipped}


def compute_gradients(state: State, objective: Objective, batch: Batch, plan: Plan) -> tuple[float, float]:
    """Leave the clipped gradients of the mean loss in the parameters. Returns that loss, and the norm as it was."""
    seed_everything(state.seed, state.step)
    state.model.zero_grad(set_to_none=True)
    weight = max(1, batch.weight)  # trained tokens of the whole step
    scale = state.loss_scale.value
    total = torch.zeros((), device=plan.device.torch_device)
    for micro_batch in batch.to(plan.device.torch_device).split(plan.rows_per_micro_batch):
        with plan.device.autocast():
            loss = objective(state.model, micro_batch).total
        (loss * (scale / weight)).backward()
        total += loss.detach()
    if scale != 1:
        torch._foreach_div_([p.grad for p in state.model.parameters() if p.grad is not None], scale)
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), plan.max_grad_norm)
    return (total / weight).item(), grad_norm.item()


def seed_everything(seed: int, step: int) -> None:
    """Every generator's numbers follow from (seed, step), so that a resumed run draws what the unbroken one drew."""
    number = random_seed(seed, step)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)  # the generators of all devices


def random_seed(seed: int, step: int) -> int:
    """A 63-bit seed of a step, unrelated to its neighbours'."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
