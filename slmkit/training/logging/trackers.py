"""Trackers: TensorBoard and Weights & Biases, in addition to metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.training.loop import Report
from slmkit.training.recipe.changes import leaves_of

AXES = ("step", "tokens")  # horizontal axes of plots


class TensorBoard:
    """Event files in `tensorboard/` of the run: `tensorboard --logdir runs` shows all runs side by side."""

    def __init__(self, root: Path, recipe: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a resumed run will repeat are dropped, as in metrics.jsonl.
        self.writer = SummaryWriter(str(root / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            self.writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in leaves_of(recipe)))

    def log(self, report: Report) -> None:
        for name, value in _figures(report).items():
            self.writer.add_scalar(name, value, report["step"])
        self.writer.add_scalar("tokens", report["tokens"], report["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run in the project `slmkit`, or the one in WANDB_PROJECT. WANDB_MODE=offline keeps it in `wandb/`."""

    def __init__(self, root: Path, recipe: dict[str, Any], step: int) -> None:
        import os

        import wandb

        earlier = sorted((root / "wandb").glob("*run-*-*")) if step else []
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "slmkit"),
            name=root.name,
            dir=str(root),
            config=recipe,
            id=earlier[-1].name.rpartition("-")[2] if earlier else None,  # a resumed run continues the same one
            resume="allow" if earlier else None,
        )
        # The step of W&B never decreases; ours does when a resumed run repeats steps.
        self.run.define_metric("*", step_metric="step")

    def log(self, report: Report) -> None:
        self.run.log(_figures(report) | {axis: report[axis] for axis in AXES})

    def close(self) -> None:
        self.run.finish()


Tracker = TensorBoard | WeightsAndBiases
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_trackers(names: Sequence[str]) -> None:
    """Raises `UserError` for a tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.report_to: {name} is not installed: pip install slmkit[track]")


@contextmanager
def open_trackers(names: Sequence[str], root: Path, recipe: dict[str, Any], step: int) -> Iterator[list[Tracker]]:
    """Context manager with the trackers of a run that continues after `step`; closes them in any case."""
    check_trackers(names)
    with ExitStack() as stack:
        yield [stack.enter_context(closing(TRACKERS[name](root, recipe, step))) for name in names]


def _figures(report: Report) -> dict[str, float]:
    return {key: value for key, value in report.items() if key not in AXES and isinstance(value, int | float)}
