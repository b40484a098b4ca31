"""Hooks that write metrics and plots during a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from slmkit.training.logging.plots import plot_losses, plot_shares
from slmkit.training.logging.trackers import Tracker
from slmkit.training.loop import Report, State

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
        except OSError as error:  # a failed plot must not end the run
            self.warn(f"{self.run.plot}: not drawn: {error}")
