"""Asynchronous checkpoint writer: the state is copied between two steps and written by a thread, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from slmkit.config import UserError
from slmkit.training.checkpoints import checkpoint as checkpoints
from slmkit.training.checkpoints.checkpoint import ModelFiles
from slmkit.training.distributed import ALONE, Group
from slmkit.training.loop import Goal, Report, State

if TYPE_CHECKING:
    from slmkit.training.run_directory import RunDirectory

FAILURES_BORNE = 3  # failed saves in a row that end the run: a disk that is full now may have room later


class Saver:
    """Hook that saves checkpoints, and moves the links `latest` and `best` once a checkpoint is complete.

    As a context manager it waits for the last checkpoint. A second Ctrl-C does not wait, and leaves a partial
    checkpoint that is ignored later.
    """

    def __init__(
        self,
        run: RunDirectory,
        files: ModelFiles,
        extra_files: checkpoints.ExtraFiles,
        save_total_limit: int,
        warn: Callable[[str], None],
        needed: Callable[[], set[str]] = set,
        group: Group = ALONE,
        goal: Goal | None = None,
    ) -> None:
        """`needed` names checkpoints to keep in addition to the newest `save_total_limit` and the best by `goal`."""
        self.run, self.files, self.extra_files, self.limit = run, files, extra_files, save_total_limit
        self.warn, self.needed, self.group, self.goal = warn, needed, group, goal or Goal()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed: BaseException | None = None  # why the last checkpoint could not be written
        self._failures = 0

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None and not issubclass(kind, KeyboardInterrupt):
            self._thread.join()

    def save(self, state: State, report: Report) -> None:
        """Copy the state and start writing it, after the previous checkpoint has been written."""
        metric = self.goal.metric
        if metric in report and self.goal.is_better(report[metric], state.best.get(metric)):
            told = dict.fromkeys((metric, "validation_loss"))  # the forecast of a run is compared with its loss
            state.best = {"step": state.step} | {name: report[name] for name in told if name in report}
        self.wait()
        snapshot = checkpoints.take_snapshot(state, self.files, self.group)
        if not self.group.is_main:
            return
        self._thread = threading.Thread(target=self._write, args=(snapshot, best_checkpoint(state)), daemon=True)
        self._thread.start()

    def check(self, state: State, report: Report) -> None:
        """Hook for every step: report a failed save as soon as it is known."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def finish(self) -> None:
        """Wait for the run's last checkpoint. Raises `UserError` if it could not be written."""
        self._failures = FAILURES_BORNE
        self.wait()
        if self._failed is not None:  # `check` may have seen the failure first, as one of a run that goes on
            raise self._failed

    def wait(self) -> None:
        """Wait for the checkpoint being written. Raises its error if the run cannot go on."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        self._failed = error
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        older = checkpoints.complete_checkpoints(self.run.checkpoints)
        if not isinstance(error, UserError) or not older or self._failures >= FAILURES_BORNE:
            raise error
        self.warn(f"{error}; the run goes on, and would be resumed from {older[-1].name}")

    def _write(self, snapshot: checkpoints.Snapshot, best: str | None) -> None:
        try:
            self.run.metrics.sync()  # the log must hold all steps up to a checkpoint
            path = checkpoints.write_checkpoint(snapshot, self.run.checkpoints, self.extra_files)
            point_links(self.run, path, best)
            keep = self.needed() | ({best} if best else set())
            checkpoints.keep_newest(self.run.checkpoints, self.limit, keep, until=snapshot.step)
        except OSError as error:
            self._error = UserError(f"{self.run.root}: {error}; free some space, then `slm resume`")
        except BaseException as error:  # raised again in the main thread
            self._error = error


def best_checkpoint(state: State) -> str | None:
    """The name of the checkpoint that is the best so far by the run's metric."""
    return checkpoints.checkpoint_name(int(state.best["step"])) if state.best else None


def point_links(run: RunDirectory, latest: Path, best: str | None) -> None:
    """Point the run's links to these checkpoints; remove the link `best` if its checkpoint no longer exists.

    Raises `UserError` if a link has become a folder that is no copy of a checkpoint.
    """
    for link in (run.latest, run.best):
        checkpoints.remove_copy(link, run.checkpoints)
    checkpoints.point_link(run.latest, latest)
    if best is not None and (run.checkpoints / best / checkpoints.MANIFEST).is_file():
        checkpoints.point_link(run.best, run.checkpoints / best)
    else:
        run.best.unlink(missing_ok=True)
