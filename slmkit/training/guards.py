"""The guard: which updates are refused, and when a run that does nothing else is taken back or ended.

A loss or gradient that is not finite never reaches the weights; a gradient far above its recent median does not where
the recipe asks for that (PaLM skipped such batches by hand: arXiv:2204.02311, section 5.1). What the guard remembers is
part of the state that a checkpoint holds, so that a resumed run refuses what the unbroken one would have refused.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from slmkit.config import Settings

FEWEST_NORMS = 16  # a median of fewer says too little about what is usual


class GuardSettings(Settings):
    """What is refused, how much of that is borne, and what happens then."""

    max_skipped: int = Field(10, gt=0)  # refused steps in a row before the run is taken back or stopped
    on_divergence: Literal["stop", "rollback"] = "stop"
    max_spike: float | None = Field(None, gt=1)  # times the median of recent gradient norms; None: any norm is taken
    window: int = Field(64, ge=FEWEST_NORMS)  # steps whose gradient norms are "recent"
    rollback_learning_rate_ratio: float = Field(0.5, gt=0, le=1)  # by which each rollback lowers the learning rate
    max_rollbacks: int = Field(3, gt=0)  # of a whole run; then it stops


class Diverged(Exception):  # noqa: N818 - what follows on it is the recipe's choice
    """So many steps in a row were refused that going on makes no sense."""


@dataclass
class Guard:
    """What the guard remembers from step to step."""

    norms: list[float] = field(default_factory=list)  # gradient norms of the last steps that were taken
    skipped: int = 0  # refused steps of the whole run
    in_a_row: int = 0
    rollbacks: int = 0

    def judge(self, settings: GuardSettings, loss: float, grad_norm: float) -> str | None:
        """Why this update is refused, or None: it may be taken."""
        reason = self._objection(settings, loss, grad_norm)
        if reason is None:
            self.in_a_row = 0
            self.norms = [*self.norms, grad_norm][-settings.window :]
        else:
            self.in_a_row += 1
            self.skipped += 1
        return reason

    def check(self, settings: GuardSettings) -> None:
        """Raises `Diverged` when no further step should be tried."""
        if self.in_a_row >= settings.max_skipped:
            raise Diverged(f"{self.in_a_row} steps in a row were refused")

    def learning_rate_ratio(self, settings: GuardSettings) -> float:
        """What rollbacks have left of the learning rate."""
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
