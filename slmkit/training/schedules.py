"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup_steps: int, floor: float) -> float:
    """Linear from near 0 to 1 over `warmup_steps`, then half a cosine down to `floor` at the last step.

    `step` counts from 0. The first step has a rate above zero, so that no step is spent on nothing.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
