"""Live progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from slmkit.training.loop import Report, State

# Position relative to the reference curve of a shipped recipe.
WORDS = {"inside": "as expected", "above": "above its reference", "below": "below its reference"}
SHARES = {"answers/right": "right", "rewards/accuracy": "reward accuracy"}
NO_MARGIN = 1e-4  # a mean margin below which rewards differ by rounding only
LINES = 20  # plain lines printed in a whole run


class TrainingProgress:
    """Hook for every step that shows step, epoch, loss, time left and rate.

    Use it as a context manager. `steps_in_epoch` is None if the data's length is unknown.
    """

    def __init__(
        self, label: str, steps: int, console: Console | None = None, steps_in_epoch: float | None = None
    ) -> None:
        self.label, self.steps, self.steps_in_epoch = label, steps, steps_in_epoch
        self.console = console or Console(stderr=True)
        self.is_live = self.console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=len(label))),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.console,
            transient=False,
        )
        self.task = self.bar.add_task(label, total=steps, figures="", start=True)
        self.started, self.first_step = 0.0, -1
        self.validation_loss: float | None = None

    def __enter__(self) -> TrainingProgress:
        self.started = time.monotonic()
        if self.is_live:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_live:
            self.bar.stop()

    def update(self, state: State, report: Report) -> None:
        """Show a step's report."""
        if self.first_step < 0:
            self.first_step = state.step - 1
        self.validation_loss = report.get("validation_loss", self.validation_loss)
        line = self._figures(state, report)
        if self.is_live:
            self.bar.update(self.task, completed=state.step, figures=line)
        elif state.step % max(1, self.steps // LINES) == 0 or state.step == self.steps:
            self.console.print(f"{self.label}: {line}", soft_wrap=True, highlight=False)

    def _figures(self, state: State, report: Report) -> str:
        done = state.step - self.first_step
        left = (time.monotonic() - self.started) / done * (self.steps - state.step)
        figures = [f"step {state.step:,}/{self.steps:,}"]
        if self.steps_in_epoch:
            figures.append(f"epoch {state.step / self.steps_in_epoch:.1f}/{self.steps / self.steps_in_epoch:.1f}")
        figures.append(f"loss {report['loss']:.3f}")
        if "preference_loss" in report:
            figures.append(f"preference loss {report['preference_loss']:.3f}")
        if self.validation_loss is not None:
            figures.append(f"validation {self.validation_loss:.3f}")
        if abs(report.get("rewards/margin", 1)) > NO_MARGIN:
            figures += [f"{share} {report[name]:.0%}" for name, share in SHARES.items() if name in report]
        figures += [f"{clock(left)} left", f"{report['tokens_per_second']:,} tokens/s"]
        if "mfu" in report:
            figures.append(f"MFU {report['mfu']:.0%}")
        if "reference" in report:
            figures.append(WORDS[report["reference"]])
        return "  ".join(figures)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
