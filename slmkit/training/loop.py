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
from slmkit.training.distributed import ALONE, Group, whole
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
    group: Group = ALONE


Hook = Callable[[State, Report], None]


@dataclass(frozen=True)
class Every:
    """Call `hook` after each `steps`-th step, and after the last one of the run.

    With several processes the first alone calls it, unless the hook is a matter of all ranks.
    """

    steps: int
    hook: Hook
    on_all_ranks: bool = False


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
    group = plan.group
    state.model.train()
    stream.seek(state.step, state.data)
    while state.step < plan.steps and stream.has(state.step):
        started, tokens_before = time.perf_counter(), state.tokens
        batch = stream.batch(state.step, group.rank, group.world)
        report = train_step(state, objective, batch, plan)
        report["tokens_per_second"] = round((state.tokens - tokens_before) / (time.perf_counter() - started))
        report |= {f"share/{name}": share for name, share in stream.shares(state.step).items()}
        state.data = stream.position()
        is_stopped = group.any(stop is not None and stop.is_set)
        is_last = state.step == plan.steps or is_stopped or not stream.has(state.step)
        for hook in hooks:
            if (is_last or state.step % hook.steps == 0) and (hook.on_all_ranks or group.is_main):
                hook.hook(state, report)
                state.model.train()
        if is_last:
            break
    return state


def train_step(state: State, objective: Objective, batch: Batch, plan: Plan) -> Report:
    """One update. Raises `FloatingPointError` instead of applying a gradient that is not finite."""
    # Dropout draws from (seed, step), so that a resumed run draws what the unbroken one would have drawn.
    torch.manual_seed(_mixed(state.seed, state.step, plan.group.rank))
    batch = batch.to(plan.device.torch_device)
    micro_batches = batch.split(plan.rows_per_micro_batch)
    weights, counts = plan.group.gather(batch.weight, len(micro_batches))
    weight = int(sum(weights))  # trained tokens of the whole step
    if weight == 0:
        raise ValueError(f"step {state.step}: not one trained token in its batch")
    rate = plan.schedule(state.step)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate

    total = torch.zeros((), device=plan.device.torch_device)
    # Ranks go through the model equally often, since with FSDP all must take part.
    micro_batches += [batch.untrained()] * int(max(counts) - len(micro_batches))
    for number, micro_batch in enumerate(micro_batches, 1):
        model = plan.group.prepared(state.model, is_last=number == len(micro_batches))
        with plan.device.autocast():
            loss = objective(model, micro_batch).total
        (loss * plan.group.world / weight).backward()  # gradients are averaged over ranks
        total += loss.detach()
    (loss_sum,) = plan.group.sum(total.item())
    grad_norm = whole(nn.utils.clip_grad_norm_(state.model.parameters(), plan.max_grad_norm))
    if not torch.isfinite(grad_norm):
        state.model.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"step {state.step}: the gradient norm is {grad_norm.item()}; weights left as they were"
        )
    for optimizer in state.optimizers:
        optimizer.step()
    state.model.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += weight
    return {
        "step": state.step,
        "tokens": state.tokens,
        "loss": loss_sum / weight,  # nats a trained token
        "learning_rate": state.optimizers[-1].param_groups[0]["lr"],
        "grad_norm": grad_norm.item(),
    }


def _mixed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed of a step on a rank, unrelated to its neighbours'."""
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
