"""The guard: refuses single updates, and stops or rolls back a run whose updates are refused many times in a row.

A run whose first steps change no weight is stopped too, with the reason: no label, no gradient, or updates too small.

A non-finite loss or gradient never reaches the weights; nor, if the recipe sets a limit, does a gradient far above its
recent median (PaLM skipped such batches by hand: arXiv:2204.02311, section 5.1). The guard's state is part of a
checkpoint, so that a resumed run refuses the same updates as an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from slmkit.config import Settings, UserError

LEAST_NORM = 1e-12  # smaller gradient norms count as 0
FEWEST_NORMS = 16  # a median of fewer norms is unreliable


class GuardSettings(Settings):
    """Which steps are refused, how many of them are allowed, and what happens then."""

    max_skipped: int = Field(10, gt=0)  # refused steps in a row before `on_divergence` applies
    on_divergence: Literal["stop", "rollback"] = "stop"  # stop the run, or go back to a checkpoint
    # refuse a gradient norm above this many times the recent median; None: no limit
    max_spike: float | None = Field(None, gt=1)
    window: int = Field(64, ge=FEWEST_NORMS)  # how many recent steps that median is of
    rollback_learning_rate_ratio: float = Field(0.5, gt=0, le=1)  # each rollback multiplies the learning rate by this
    max_rollbacks: int = Field(3, gt=0)  # rollbacks in a whole run before it stops
    max_idle: int | None = Field(10, gt=0)  # stop when this many steps from the start have changed nothing; None: never


class Diverged(Exception):  # noqa: N818 - what follows on it is the recipe's choice
    """Too many steps in a row were refused."""


@dataclass
class Guard:
    """State of the guard between steps."""

    norms: list[float] = field(default_factory=list)  # gradient norms of the last accepted steps
    skipped: int = 0  # refused steps of the whole run
    in_a_row: int = 0
    rollbacks: int = 0
    idle: int = 0  # latest steps in a row from which nothing was learned
    idle_reason: str = ""  # why
    has_learned: bool = False  # whether any step changed a weight

    def judge(self, settings: GuardSettings, loss: float, grad_norm: float) -> str | None:
        """Why this update is refused; None if it is accepted."""
        reason = self._objection(settings, loss, grad_norm)
        if reason is None:
            self.in_a_row = 0
            self.norms = [*self.norms, grad_norm][-settings.window :]
        else:
            self.in_a_row += 1
            self.skipped += 1
        return reason

    def check(self, settings: GuardSettings) -> None:
        """Raises `Diverged` after too many refused steps in a row, `UserError` after too many without effect."""
        if self.in_a_row >= settings.max_skipped:
            raise Diverged(f"{self.in_a_row} steps in a row were refused")
        if settings.max_idle is not None and self.idle >= settings.max_idle and not self.has_learned:
            raise UserError(f"stopped: {self.idle_report()} (guard.max_idle says how many such steps end a run)")

    def note_learning(self, why_not: str | None) -> None:
        """Record why nothing was learned from the last step; None if something was."""
        self.idle = 0 if why_not is None else self.idle + 1
        self.idle_reason = why_not or ""
        self.has_learned |= why_not is None

    def idle_report(self) -> str:
        """In how many steps nothing was learned, and why."""
        since = "the last" if self.has_learned else "the first"
        return f"nothing was learned in {since} {self.idle} steps: {self.idle_reason}"

    def learning_rate_ratio(self, settings: GuardSettings) -> float:
        """Factor on the learning rate after all rollbacks so far."""
        return settings.rollback_learning_rate_ratio**self.rollbacks

    def _objection(self, settings: GuardSettings, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if settings.max_spike is None or len(self.norms) < FEWEST_NORMS:
            return None
        usual = statistics.median(self.norms)
        if grad_norm <= settings.max_spike * usual:
            return None
        return f"the gradient norm {grad_norm:.3g} is {grad_norm / usual:.1f} times the recent median"
