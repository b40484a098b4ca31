"""Flight recorder: keeps the last steps' batches in memory and writes them to disk when a step is refused.

Random numbers and, with shards, batches follow from (seed, step), so that `slm replay` can repeat any step from the
checkpoint before it. A record adds the batches, which a stream may not yield twice, and protects that checkpoint from
deletion.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.training.checkpoints.checkpoint import checkpoint_name, complete_checkpoints, step_of
from slmkit.training.distributed import ALONE, Group
from slmkit.training.logging.metrics_log import finite
from slmkit.training.loop import Report, random_seed

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


def recorded_report(folder: Path, step: int) -> Report | None:
    """The recorded report of a step; None without a record."""
    path = folder / checkpoint_name(step) / FIGURES
    if not path.is_file():
        return None
    return next((report for report in json.loads(path.read_text(encoding="utf-8")) if report["step"] == step), None)


def recorded_batches(folder: Path, step: int) -> dict[int, Batch]:
    """Recorded batches by step; empty without a record. Raises `UserError` for an unreadable file."""
    path = folder / checkpoint_name(step) / BATCHES
    if not path.is_file():
        return {}
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return {
        number: _batch(tensors, f"{number}/") for number in sorted({int(name.partition("/")[0]) for name in tensors})
    }


def _batch(tensors: dict[str, torch.Tensor], prefix: str) -> Batch:
    ids, labels = (tensors[prefix + name].long() for name in ("ids", "labels"))
    documents = tensors.get(f"{prefix}documents")
    besides = f"{prefix}extra/"
    extra = {name.removeprefix(besides): tensor for name, tensor in tensors.items() if name.startswith(besides)}
    weight = int((labels != IGNORED).sum())
    return Batch(ids, labels, weight, None if documents is None else documents.long(), extra)
