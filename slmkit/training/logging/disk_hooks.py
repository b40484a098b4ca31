"""Hooks that write metrics, plots and checkpoints during a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmkit.training.checkpoints import checkpoint as checkpoints
from slmkit.training.checkpoints.saver import Saver
from slmkit.training.logging.plots import plot_losses, plot_shares
from slmkit.training.logging.trackers import Tracker
from slmkit.training.loop import Every, Report, State
from slmkit.training.recipe.recipe import TrainSettings

if TYPE_CHECKING:
    from slmkit.training.run_directory import RunDirectory


IDLE_REPORTED = 10  # steps in a row


def hooks_on_disk(
    settings: TrainSettings,
    eval_steps: int,
    logger: Logger,
    saver: Saver,
    on_save: Callable[[State, Path], Any] | None = None,
) -> tuple[Every, ...]:
    """Hooks that write to disk, in this order: metrics first, so that no checkpoint is ahead of them.

    `on_save` is called on all ranks with each checkpoint that is complete.
    """

    def saved(state: State, report: Report) -> Any:
        saver.wait()
        path = saver.run.checkpoints / checkpoints.checkpoint_name(state.step)
        return on_save(state, path) if on_save is not None else None

    return (
        Every(1, logger.log_if_skipped),
        Every(settings.logging_steps, logger.log),
        Every(eval_steps, logger.log_and_draw),
        Every(settings.save_steps or eval_steps, saver.save, on_stop=True, on_all_ranks=True),
        *([Every(settings.save_steps or eval_steps, saved, on_stop=True, on_all_ranks=True)] if on_save else []),
        Every(1, saver.check),
    )


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
        except OSError as error:  # a failed plot must not end the run
            self.warn(f"{self.run.plot}: not drawn: {error}")
