"""Learning rate schedules, as a factor on the peak.

Each rises linearly over the warm-up, then falls; all but one reach a floor at the last step. Steps count from 0; the
rate of the first is above zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # step → share of the peak
Fall = Callable[[float], float]  # share of the fall that is behind → share of it that is still to come


def cosine(done: float) -> float:
    """Half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """A straight line."""
    return 1 - done


# warmup_stable_decay is constant at the peak, then linear over the last steps (arXiv:2404.06395).
FALLS: dict[str, Fall] = {"cosine": cosine, "linear": linear, "warmup_stable_decay": linear}


def make_schedule(kind: str, steps: int, warmup_steps: int, floor: float, decay_share: float = 0.2) -> Schedule:
    """The schedule `kind` (Hugging Face's name) for a run of `steps` steps.

    `decay_share` is the share of all steps in which `warmup_stable_decay` falls. Raises `KeyError` for an unknown name.
    """
    if kind == "inverse_sqrt":
        return functools.partial(_risen, functools.partial(_inverse_sqrt, warmup_steps, floor), warmup_steps)
    falling = steps - 1 - warmup_steps
    if kind == "warmup_stable_decay":
        falling = min(falling, round(decay_share * steps))
    return functools.partial(_risen, functools.partial(_fallen, FALLS[kind], steps, falling, floor), warmup_steps)


def _risen(after: Schedule, warmup_steps: int, step: int) -> float:
    return (step + 1) / warmup_steps if step < warmup_steps else after(step)


def _fallen(fall: Fall, steps: int, falling: int, floor: float, step: int) -> float:
    done = (step - (steps - 1 - falling)) / max(1, falling)
    return floor + (1 - floor) * fall(min(1.0, max(0.0, done)))


def _inverse_sqrt(warmup_steps: int, floor: float, step: int) -> float:
    """Half of the peak after four times the steps of the warm-up (Vaswani et al. 2017, arXiv:1706.03762)."""
    peak_at = max(1, warmup_steps)
    return max(floor, math.sqrt(peak_at / (peak_at + step - warmup_steps)))
