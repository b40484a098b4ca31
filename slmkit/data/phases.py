"""Phases of a mixture: which weights hold until how many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from slmkit.config import Settings, UserError, did_you_mean

WhenExhausted = Literal["stop", "repeat", "redistribute"]


class PhaseSettings(Settings):
    """Weights by source name, until a number of tokens has been seen since the run began; the last phase has no end."""

    until_tokens: int | None = Field(None, gt=0)  # where the phase ends, in tokens seen
    weights: dict[str, float]  # source name: weight


class Phase(NamedTuple):
    """`until`: one past the last row, None where it never ends. `weights` by source, in the order of the sources."""

    until: int | None
    weights: tuple[float, ...]


def plan_phases(settings: Sequence[PhaseSettings], weights: Mapping[str, float], length: int) -> list[Phase]:
    """Phases in rows of `length` tokens; without any, one endless phase of the sources' own `weights`, by name.

    Raises `UserError` for phases out of order, sources that do not exist, and weights that are negative or all zero.
    """
    if not settings:
        settings = [PhaseSettings(weights=dict(weights))]
    phases: list[Phase] = []
    for number, phase in enumerate(settings, start=1):
        where = f"data.phases: phase {number}"
        for name, weight in phase.weights.items():
            if name not in weights:
                raise UserError(f"{where}: no source is named {name!r}; {did_you_mean(name, weights)}")
            if not 0 <= weight < float("inf"):
                raise UserError(f"{where}: expected a weight of 0 or more for {name!r}, found {weight}")
        if not any(phase.weights.values()):
            raise UserError(f"{where}: all weights are 0, so that nothing would be read; give one source a weight")
        is_last = number == len(settings)
        if phase.until_tokens is None and not is_last:
            raise UserError(f"{where}: only the last phase may have no end; set until_tokens of this one")
        until = None if is_last or phase.until_tokens is None else round(phase.until_tokens / length)
        if until is not None and until <= (phases[-1].until or 0 if phases else 0):
            raise UserError(f"{where}: until_tokens {phase.until_tokens:,} is not more than that of the phase before")
        phases.append(Phase(until, tuple(phase.weights.get(name, 0.0) for name in weights)))
    return phases
