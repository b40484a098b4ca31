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
