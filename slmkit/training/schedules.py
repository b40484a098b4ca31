"""Learning rate schedules, as a factor on the peak.

Each rises linearly over `warmup_steps`, then falls. Steps count from 0; the rate of the first is above zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # step → share of the peak
Fall = Callable[[int, int, int, float], float]  # steps since the peak, steps until the end, warm-up steps, floor


def cosine(since: int, until_end: int, warmup_steps: int, floor: float) -> float:
    """Half a cosine down to `floor` at the last step (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, since / max(1, until_end))))


def linear(since: int, until_end: int, warmup_steps: int, floor: float) -> float:
    """A straight line down to `floor` at the last step."""
    return 1 - (1 - floor) * min(1.0, since / max(1, until_end))


def inverse_sqrt(since: int, until_end: int, warmup_steps: int, floor: float) -> float:
    """Proportional to the inverse square root of the step, at least `floor` (Vaswani et al. 2017, arXiv:1706.03762).

    The peak is at the end of the warm-up; after four times as many steps the rate is half of it.
    """
    peak_at = max(1, warmup_steps)
    return max(floor, math.sqrt(peak_at / (peak_at + since)))


def warmup_stable_decay(share: float) -> Fall:
    """Constant at the peak, then linear to `floor` over the last `share` of all steps (arXiv:2404.06395)."""

    def fall(since: int, until_end: int, warmup_steps: int, floor: float) -> float:
        decay = min(until_end, round(share * (warmup_steps + until_end + 1)))
        return linear(max(0, since - (until_end - decay)), decay, warmup_steps, floor)

    return fall


def make_schedule(kind: str, steps: int, warmup_steps: int, floor: float, decay_share: float = 0.2) -> Schedule:
    """The schedule `kind` (Hugging Face's name) for a run of `steps` steps.

    `decay_share` is the share of all steps in which `warmup_stable_decay` falls. Raises `KeyError` for an unknown name.
    """
    falls: dict[str, Fall] = {
        "cosine": cosine,
        "linear": linear,
        "inverse_sqrt": inverse_sqrt,
        "warmup_stable_decay": warmup_stable_decay(decay_share),
    }
    return functools.partial(_share, falls[kind], steps, warmup_steps, floor)


def _share(fall: Fall, steps: int, warmup_steps: int, floor: float, step: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return fall(step - warmup_steps, steps - 1 - warmup_steps, warmup_steps, floor)
