"""What is logged during a run: metrics and plots, time, memory and MFU; trackers beside metrics.jsonl."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmkit.config import UserError
from slmkit.device import Device, measured_peak, peak_memory
from slmkit.model.decoder import Decoder
from slmkit.model.sizes import flops_per_token
from slmkit.training.logging.plots import plot_losses, plot_shares, plot_tasks
from slmkit.training.loop import Report, State
from slmkit.training.recipe.changes import leaves_of

if TYPE_CHECKING:
    from slmkit.training.run_directory import RunDirectory

IDLE_REPORTED = 10  # steps in a row


class Logger:
    """Appends to `metrics.jsonl`, calls the trackers, and redraws `loss.png`."""

    def __init__(
        self,
        run: RunDirectory,
        perfect_loss: float | None,
        warn: Callable[[str], None],
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.run, self.perfect_loss, self.warn, self.trackers = run, perfect_loss, warn, trackers
        self.last_step = -1

    def log(self, state: State, report: Report) -> None:
        """Log the step, once even if several intervals ask for it; every validation is logged."""
        if state.step != self.last_step:
            self.run.metrics.append(report)
            for tracker in self.trackers:
                tracker.log(report)
        self.last_step = state.step

    def log_if_skipped(self, state: State, report: Report) -> None:
        """Log every refused step, and warn after many in a row from which nothing was learned."""
        if state.guard.has_learned and state.guard.idle and state.guard.idle % IDLE_REPORTED == 0:
            self.warn(f"step {state.step}: {state.guard.idle_report()}")
        if "skipped" in report:
            self.warn(f"step {state.step}: skipped, {report['skipped']}; weights left as they were")
            self.log(state, report)

    def log_and_draw(self, state: State, report: Report) -> None:
        self.log(state, report)
        try:
            reports = self.run.metrics.read()
            plot_losses(reports, self.run.plot, self.run.root.name, self.perfect_loss)
            plot_shares(reports, self.run.shares, self.run.root.name)
            plot_tasks(reports, self.run.tasks, self.run.root.name)
        except OSError as error:  # a failed plot must not end the run
            self.warn(f"{self.run.plot}: not drawn: {error}")


# -- time, memory, MFU -------------------------------------------------------------------------------------------------


class StepFlops:
    """FLOPs of an update, forward and backward. A frozen matrix needs no weight gradient; adapter parameters beside it
    have their own products.
    """

    def __init__(self, model: Decoder, length: int) -> None:
        a = model.architecture
        self.per_token, self.head = flops_per_token(a, length), 2 * a.vocab_size * a.width
        self.is_frozen = not all(parameter.requires_grad for parameter in model.parameters())
        trained = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad and p.dim() == 2)
        self.adapter = trained if self.is_frozen else 0

    def of_step(self, positions: int, trained: int) -> int:
        """FLOPs of an update in which `trained` of all positions are learned: only those pass through the head."""
        matrices = positions * self.per_token.matrices - (positions - trained) * self.head
        attention, adapter = positions * self.per_token.attention, positions * 2 * self.adapter
        return (2 if self.is_frozen else 3) * matrices + 3 * (attention + adapter)


class ThroughputMonitor:
    """Hook for every step that adds `seconds` of the run so far, `mfu` and `memory_bytes` to its report.

    MFU (model FLOPs utilisation; Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is the FLOPs per second of the
    model's matrix products, forward and backward, over the device's peak in the same type: a measured peak, not the
    datasheet's. Recomputed layers count once.
    """

    def __init__(
        self,
        model: Decoder,
        device: Device,
        rows_per_step: int | None,
        length: int,
        tokens: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """An update is `rows_per_step` rows of `length` tokens, on as many such devices as there are ranks.

        None if rows vary in length: then there is no `mfu`.

        `tokens` and `seconds` are those of a resumed run so far.
        """
        self.device, self.positions = device, (rows_per_step or 0) * length
        self.flops = StepFlops(model, length)
        self.peak = measured_peak(device) * device.ranks.world
        self.tokens = tokens
        self.started = time.monotonic() - seconds

    def update(self, state: State, report: Report) -> None:
        trained, self.tokens = report["tokens"] - self.tokens, report["tokens"]
        seconds = trained / max(1, report["tokens_per_second"])
        if seconds > 0 and self.positions:
            report["mfu"] = round(self.step_flops(trained) / seconds / self.peak, 4)
        report["seconds"] = round(time.monotonic() - self.started, 2)
        report["memory_bytes"] = peak_memory(self.device)

    def step_flops(self, trained: int) -> int:
        """FLOPs of an update in which `trained` of all positions are learned."""
        return self.flops.of_step(self.positions, trained)


# -- trackers ----------------------------------------------------------------------------------------------------------

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
