"""The training loop, the same for every objective.

A step takes its batch, a function of (seed, step) alone; sums the losses of its micro-batches; divides once, by
the trained tokens of the whole step; and updates. Logging, validation, samples and checkpoints are hooks.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.stream import Batches
from slmkit.device import Device
from slmkit.model.decoder import Decoder
from slmkit.training.distributed import ALONE, Group, own_share, whole
from slmkit.training.guards import LEAST_NORM, Guard, GuardSettings
from slmkit.training.objective import Objective, Sums, surveyed
from slmkit.training.precision import LossScale

SAMPLED = 4096  # weights sampled per parameter to see whether the first steps change anything
Report = dict[str, Any]  # one line of metrics.jsonl; hooks may add to it


@dataclass
class State:
    """The state that a checkpoint holds, so that a resumed run equals an uninterrupted one.

    Random numbers and the position in shards follow from `seed` and `step`; a streamed corpus adds its own position.
    """

    model: Decoder
    optimizers: list[torch.optim.Optimizer]
    seed: int = 0
    step: int = 0
    tokens: int = 0  # trained tokens so far
    best: dict[str, float] = field(default_factory=dict)  # step and metric of the best checkpoint
    evaluations: dict[str, float | None] = field(
        default_factory=dict
    )  # {metric: its best, "in_vain": evaluations since}
    guard: Guard = field(default_factory=Guard)
    loss_scale: LossScale = field(default_factory=LossScale)
    data: dict[str, Any] = field(default_factory=dict)  # position in a streamed corpus; {} for shards


@dataclass(frozen=True)
class Goal:
    """The metric that the best checkpoint is chosen by, and that early stopping waits for."""

    metric: str = "validation_loss"  # a key of the reports
    greater_is_better: bool = False

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than `best`, the best so far. NaN never is."""
        if math.isnan(value) or best is None:
            return not math.isnan(value)
        return value > best if self.greater_is_better else value < best

    def note(self, state: State, report: Report) -> None:
        """Hook after evaluation, for all ranks: count the evaluations since the best one."""
        if self.metric not in report:
            return
        known = state.evaluations if self.metric in state.evaluations else {}  # a resumed run may have another metric
        value, best = report[self.metric], known.get(self.metric)
        if self.is_better(value, best):
            state.evaluations = {self.metric: value, "in_vain": 0}
        else:
            state.evaluations = {self.metric: best, "in_vain": (known.get("in_vain") or 0) + 1}


@dataclass(frozen=True)
class Plan:
    """The loop's parameters, computed from a recipe."""

    steps: int
    rows_per_micro_batch: int
    max_grad_norm: float
    schedule: Callable[[int], float]  # step → share of the peak learning rate
    device: Device
    guard: GuardSettings = field(default_factory=GuardSettings)
    group: Group = ALONE
    patience: int | None = None  # evaluations without a better one that end the run
    goal: Goal = field(default_factory=Goal)

    def is_stalled(self, state: State) -> bool:
        """Whether `patience` evaluations in a row brought no better value of the goal's metric."""
        if self.patience is None or self.goal.metric not in state.evaluations:
            return False
        return (state.evaluations["in_vain"] or 0) >= self.patience


Hook = Callable[[State, Report], Any]  # True ends the run after this step; all ranks must return the same


class Stage(IntEnum):
    """The order in which the hooks of one step are called."""

    MEASURE = 0  # time and memory of the step, before evaluation adds to them
    EVALUATE = 1  # adds losses and samples to the report
    COUNT = 2  # counts evaluations without a better one: the checkpoint holds the count
    SHOW = 3  # progress bar, predictions, callbacks of a script: they see the whole report
    LOG = 4  # metrics.jsonl, before the checkpoint, which must not be ahead of it
    SAVE = 5  # checkpoints


@dataclass(frozen=True)
class Every:
    """Call `hook` after each `steps`-th step, and after the last one of the run.

    When a run is stopped early, only hooks with `on_stop` are called out of turn, so that a resumed run has the same
    metrics as an uninterrupted one. Only rank 0 calls hooks, except those that concern all ranks.
    """

    steps: int
    hook: Hook
    stage: Stage = Stage.EVALUATE
    on_stop: bool = False
    on_all_ranks: bool = False


class RunStopped(Exception):  # noqa: N818 - no error: the user asked for it
    """The run was stopped on request, after a checkpoint; later stages of a workflow must not run."""


class StopRequested:
    """Ends the loop after the current step: set from outside (a signal, a test), or at a given time.

    `at` is a time of `time.monotonic`, in seconds.
    """

    def __init__(self, at: float = math.inf) -> None:
        self.at, self.is_asked = at, False

    @property
    def is_set(self) -> bool:
        return self.is_asked or time.monotonic() >= self.at

    @is_set.setter
    def is_set(self, value: bool) -> None:
        self.is_asked = value


def train(
    state: State,
    objective: Objective,
    stream: Batches,
    plan: Plan,
    hooks: Sequence[Every] = (),
    stop: StopRequested | None = None,
    record: Callable[[Batch, Report], None] | None = None,
) -> State:
    """Train from `state.step` to `plan.steps`, or to the end of the data. Returns the state.

    Hooks are called by stage, and within a stage in the order given; after a stop request the current step is the last.
    `record` gets the batch of every step, for a replay. Raises `Diverged` when the guard has refused too many steps in
    a row.
    """
    group, hooks = plan.group, sorted(hooks, key=lambda each: each.stage)
    state.model.train()
    stream.seek(state.step, state.data)
    while state.step < plan.steps and stream.has(state.step) and not plan.is_stalled(state):
        state.guard.check(plan.guard)
        started, before = time.perf_counter(), state.tokens
        batch = stream.batch(state.step, group.rank, group.world)
        report = train_step(state, objective, batch, plan)
        report["tokens_per_second"] = round((state.tokens - before) / (time.perf_counter() - started))
        report |= {f"share/{name}": share for name, share in stream.shares(state.step).items()}
        state.data = stream.position()
        if record is not None:
            record(batch, report)
        is_stopping = group.any(stop is not None and stop.is_set)
        for hook in hooks:
            is_last = state.step == plan.steps or not stream.has(state.step) or plan.is_stalled(state)
            is_due = is_last or state.step % hook.steps == 0 or (is_stopping and hook.on_stop)
            if is_due and (hook.on_all_ranks or group.is_main):
                is_stopping |= hook.hook(state, report) is True
                state.model.train()
        if is_stopping:
            break
    return state


def train_step(state: State, objective: Objective, batch: Batch, plan: Plan) -> Report:
    """One update and its report; `skipped` says why if the guard refused it or there was nothing to learn."""
    rate = plan.schedule(state.step) * state.guard.learning_rate_ratio(plan.guard)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate

    before = None if state.guard.has_learned else _sample_of(state.model)
    found = compute_gradients(state, objective, batch, plan)
    while state.loss_scale.overflows(found.loss, found.norm):
        found = compute_gradients(state, objective, batch, plan)
    if found.weight == 0:
        refused: str | None = "its batch has no trained token"
    else:
        refused = state.guard.judge(plan.guard, found.loss, found.norm)
    if refused is None:
        seed_everything(state.seed, state.step)  # stochastic rounding draws the same numbers on every rank
        for optimizer in state.optimizers:
            optimizer.step()
        state.tokens += found.tokens
    if refused is None or found.weight == 0:
        state.guard.note_learning(_why_nothing_is_learned(state, found, before, plan))
    state.model.zero_grad(set_to_none=True)
    state.step += 1
    report = {
        "step": state.step,
        "tokens": state.tokens,
        "loss": found.loss,  # mean over the objective's weight: nats per trained token for `next_token`
        "learning_rate": state.optimizers[-1].param_groups[0]["lr"],
        "grad_norm": found.norm,
        **found.figures,
    }
    if state.guard.idle:
        report["idle_steps"] = state.guard.idle
    if state.guard.rollbacks:
        report["rollbacks"] = state.guard.rollbacks
    return report if refused is None else report | {"skipped": refused, "skipped_steps": state.guard.skipped}


def _why_nothing_is_learned(state: State, found: Gradients, before: list[Tensor] | None, plan: Plan) -> str | None:
    """Why a step left the model unchanged; None if it learned. `before`: a sample of the weights before the step."""
    if found.weight == 0:
        return "their batches have no trained token"
    if found.norm < LEAST_NORM:
        silent = found.figures.get("groups/without_signal") == 1
        because = "all answers to a question get the same reward" if silent else "the loss is the same whatever changes"
        return f"every gradient is 0, since {because}"
    if before is None or plan.group.any(not all(map(torch.equal, before, _sample_of(state.model)))):
        return None
    rate = state.optimizers[-1].param_groups[0]["lr"]
    return f"no weight changed: a learning rate of {rate:.2g} is too small for weights in {plan.device.weight_dtype}"


def _sample_of(model: nn.Module) -> list[Tensor]:
    """Copies of some weights of every trained parameter, from this rank's shard."""
    parts = [own_share(p.detach()).flatten() for p in model.parameters() if p.requires_grad]
    return [part[:: max(1, part.numel() // SAMPLED)].clone() for part in parts]


class Gradients(NamedTuple):
    """Figures of the gradients now in the parameters: over all ranks, the same on each."""

    loss: float  # the mean
    norm: float  # before it was clipped
    weight: int  # the mean's divisor
    tokens: int  # trained tokens
    figures: dict[str, float]  # means of the objective's other figures


def compute_gradients(state: State, objective: Objective, batch: Batch, plan: Plan) -> Gradients:
    """Compute the clipped gradients of the mean loss. Raises `UserError` if it depends on no trained weight."""
    group, scale = plan.group, state.loss_scale.value
    seed_everything(state.seed, state.step, group.rank)
    state.model.zero_grad(set_to_none=True)
    batch = batch.to(plan.device.torch_device)
    micro_batches = batch.split(plan.rows_per_micro_batch)
    weights, tokens, counts = group.gather(objective.weight(batch), batch.weight, len(micro_batches))
    weight = int(sum(weights))
    # All ranks run the model equally often, since every rank must take part in FSDP's collectives.
    micro_batches += [batch.untrained()] * int(max(counts) - len(micro_batches))
    micro_batches = surveyed(objective, state.model, micro_batches, plan.device, group)
    sums = Sums()
    for number, micro_batch in enumerate(micro_batches, 1):
        model = group.prepared(state.model, is_last=number == len(micro_batches))
        with plan.device.autocast():
            loss = objective(model, micro_batch)
        if not loss.total.requires_grad:
            raise UserError("the loss does not depend on any weight that is trained: nothing can be learned from it")
        (loss.total * (scale * group.world / max(1, weight))).backward()  # DDP and FSDP average over ranks
        sums.add(loss)
    if scale != 1:
        torch._foreach_div_([p.grad for p in state.model.parameters() if p.grad is not None], scale)
    grad_norm = whole(nn.utils.clip_grad_norm_(state.model.parameters(), plan.max_grad_norm))
    mean_loss, figures = sums.means(weight, group)
    return Gradients(mean_loss, grad_norm.item(), weight, int(sum(tokens)), figures)


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """Seed all generators from (seed, step, rank), so that a resumed run draws the same numbers."""
    number = random_seed(seed, step, rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)  # the generators of all devices


def random_seed(seed: int, step: int, rank: int = 0) -> int:
    """A 63-bit seed for a step, independent of other steps' and ranks' seeds."""
    digest = hashlib.blake2b(f"{seed}:{step}{f':{rank}' * bool(rank)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
