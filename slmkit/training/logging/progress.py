"""Live progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

if TYPE_CHECKING:  # the command line shows progress before torch is imported
    from slmkit.training.loop import Hook, Report, State

# Position relative to the reference curve of a shipped recipe.
WORDS = {"inside": "as expected", "above": "above its reference", "below": "below its reference"}
SHARES = {"answers/right": "right", "rewards/accuracy": "reward accuracy"}
NO_MARGIN = 1e-4  # a mean margin below which rewards differ by rounding only
TASKS_SHOWN = 3
LINES = 20  # plain lines printed in a whole run


# Shows a line of figures and the share done, None if it is not known; not on a terminal, only a line that is due.
Show = Callable[[str, float | None, bool], None]


@contextlib.contextmanager
def bar_or_lines(label: str, console: Console, transient: bool = True) -> Iterator[Show]:
    """Figures beside a bar on a terminal, in plain lines elsewhere."""
    bar = Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=len(label))),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=transient,
    )
    task = bar.add_task(label, total=None, figures="")

    def show(figures: str, share: float | None, is_due: bool) -> None:
        if console.is_terminal:
            bar.update(task, total=None if share is None else 1.0, completed=share or 0.0, figures=figures)
        elif is_due:
            console.print(f"{label}: {figures}", soft_wrap=True, markup=False, highlight=False)

    with bar if console.is_terminal else contextlib.nullcontext():
        yield show


@contextlib.contextmanager
def training_progress(
    label: str, steps: int, console: Console | None = None, steps_in_epoch: float | None = None
) -> Iterator[Hook]:
    """Context manager with a hook for every step that shows step, epoch, loss, time left and rate.

    `steps_in_epoch` is None if the data's length is unknown.
    """
    began, first_step, validation_loss = time.monotonic(), -1, None
    tasks: dict[str, float] = {}  # the last figures of evaluations on tasks
    with bar_or_lines(label, console or Console(stderr=True), transient=False) as show:

        def update(state: State, report: Report) -> None:
            nonlocal first_step, validation_loss
            if first_step < 0:
                first_step = state.step - 1
            validation_loss = report.get("validation_loss", validation_loss)
            tasks.update((key, value) for key, value in report.items() if key.startswith("eval/"))
            left = (time.monotonic() - began) / (state.step - first_step) * (steps - state.step)
            figures = [f"step {state.step:,}/{steps:,}"]
            if steps_in_epoch:
                figures.append(f"epoch {state.step / steps_in_epoch:.1f}/{steps / steps_in_epoch:.1f}")
            line = "  ".join([*figures, *_figures(report, validation_loss, tasks, left)])
            show(line, state.step / steps, state.step % max(1, steps // LINES) == 0 or state.step == steps)

        yield update


def _figures(report: Report, validation_loss: float | None, tasks: dict[str, float], seconds_left: float) -> list[str]:
    figures = [f"loss {report['loss']:.3f}"]
    if "preference_loss" in report:
        figures.append(f"preference loss {report['preference_loss']:.3f}")
    if validation_loss is not None:
        figures.append(f"validation {validation_loss:.3f}")
    firsts = {key.split("/")[1]: key for key in reversed(tasks) if not key.endswith("_stderr")}  # metric of each task
    figures += [f"{task} {tasks[key]:.3g}" for task, key in [*reversed(firsts.items())][:TASKS_SHOWN]]
    if abs(report.get("rewards/margin", 1)) > NO_MARGIN:
        figures += [f"{share} {report[name]:.0%}" for name, share in SHARES.items() if name in report]
    figures += [f"{clock(seconds_left)} left", f"{report['tokens_per_second']:,} tokens/s"]
    if "mfu" in report:
        figures.append(f"MFU {report['mfu']:.0%}")
    if "reference" in report:
        figures.append(WORDS[report["reference"]])
    return figures


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
