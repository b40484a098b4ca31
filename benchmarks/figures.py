"""Measured values in few figures."""

from __future__ import annotations

import statistics


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """The median, and how far values lie apart."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }
