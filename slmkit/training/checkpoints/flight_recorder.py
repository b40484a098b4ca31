"""Flight recorder and replay. The recorder keeps the last steps' batches, and writes them when a step is refused.

Random numbers and, with shards, batches follow from (seed, step), so that `slm replay` can repeat any step from the
checkpoint before it. A record adds the batches, which a stream may not yield twice, and protects that checkpoint from
deletion.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.data.stream import Batches
from slmkit.training.checkpoints.checkpoint import checkpoint_name, complete_checkpoints, step_of
from slmkit.training.distributed import ALONE, Group
from slmkit.training.logging.metrics_log import finite
from slmkit.training.loop import Every, Plan, Report, State, compute_gradients, random_seed, train, train_step
from slmkit.training.objective import Objective
from slmkit.training.optimizers.choose import trained

STEPS_KEPT, BATCHES_KEPT, RECORDS_KEPT = 64, 4, 8
FIGURES, BATCHES = "steps.json", "batches.safetensors"


class FlightRecorder:
    """Called after each step; writes `records/step-…/` for a refused step and keeps the newest few records."""

    def __init__(self, folder: Path, seed: int, warn: Callable[[str], None], group: Group = ALONE) -> None:
        self.folder, self.seed, self.warn, self.group = folder, seed, warn, group
        self.reports: deque[Report] = deque(maxlen=STEPS_KEPT)
        self.batches: deque[tuple[int, Batch]] = deque(maxlen=BATCHES_KEPT)

    def note(self, batch: Batch, report: Report) -> None:
        """Keep the batch of the last step; write a record if the step was refused."""
        self.reports.append(dict(report))
        self.batches.append((report["step"], batch))
        if "skipped" not in report:  # the same on all ranks
            return
        batches = self._of_all_ranks()
        if self.group.is_main:
            try:
                self._write(report["step"], batches)
            except (OSError, safetensors.SafetensorError) as error:
                self.warn(f"{self.folder}: no record of step {report['step']}: {error}")

    def needed_checkpoints(self) -> set[str]:
        """The checkpoint from which the newest recorded step can be replayed."""
        records = recorded_steps(self.folder)
        earlier = [path for path in complete_checkpoints(self.folder.parent / "checkpoints")
                   if records and step_of(path) < records[-1]]  # fmt: skip
        return {earlier[-1].name} if earlier else set()

    def _of_all_ranks(self) -> list[tuple[int, Batch]]:
        """The kept batches with the rows of all ranks, in order."""
        shares = self.group.collect(list(self.batches))
        return [(parts[0][0], Batch.joined([batch for _, batch in parts])) for parts in zip(*shares)]

    def _write(self, step: int, batches: list[tuple[int, Batch]]) -> None:
        final = self.folder / checkpoint_name(step)
        partial = self.folder / f".partial-{final.name}"
        for path in (partial, final):  # the same step before a rollback
            shutil.rmtree(path, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors: dict[str, torch.Tensor] = {}
        for number, batch in batches:
            tensors |= {f"{number}/ids": batch.ids.int(), f"{number}/labels": batch.labels.int()}
            if batch.documents is not None:
                tensors[f"{number}/documents"] = batch.documents.int()
            tensors |= {f"{number}/extra/{name}": tensor.contiguous() for name, tensor in batch.extra.items()}
        save_file(tensors, partial / BATCHES)
        steps = [
            finite(report) | {"random_seed": random_seed(self.seed, report["step"] - 1)} for report in self.reports
        ]
        (partial / FIGURES).write_text(json.dumps(steps, indent=2) + "\n", encoding="utf-8")
        partial.rename(final)
        for old in recorded_steps(self.folder)[:-RECORDS_KEPT]:
            shutil.rmtree(self.folder / checkpoint_name(old), ignore_errors=True)


def recorded_steps(folder: Path) -> list[int]:
    """Steps that have a record, ascending."""
    return sorted(step_of(path) for path in folder.glob("step-*"))


def read_record(folder: Path, step: int) -> tuple[Report | None, Batch | None]:
    """The recorded report and batch of a step; None without a record. Raises `UserError` for an unreadable file."""
    figures, batches = (folder / checkpoint_name(step) / name for name in (FIGURES, BATCHES))
    if not figures.is_file() or not batches.is_file():
        return None, None
    try:
        tensors = {
            name.removeprefix(f"{step}/"): tensor
            for name, tensor in load_file(batches).items()
            if name.startswith(f"{step}/")
        }
        reports = json.loads(figures.read_text(encoding="utf-8"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / checkpoint_name(step)}: cannot be read: {error}") from None
    report = next((report for report in reports if report["step"] == step), None)
    ids, labels = tensors.pop("ids").long(), tensors.pop("labels").long()
    documents = tensors.pop("documents").long() if "documents" in tensors else None
    extra = {name.removeprefix("extra/"): tensor for name, tensor in tensors.items()}
    return report, Batch(ids, labels, int((labels != IGNORED).sum()), documents, extra)


# -- replay of one step, with hooks on every module: which one gave NaN or infinity, at which row and token ------------
#
# Training goes from the checkpoint before the step through the steps in between, which are bit-identical on the same
# kind of machine. Nothing is written.

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
