"""Measured values in few figures."""

from __future__ import annotations

import statistics
from pathlib import Path

PERFORMANCE = Path(__file__).parent.parent / "docs" / "performance.md"


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """The median, and how far values lie apart."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }


def write_tables(page: Path, name: str, lines: list[str]) -> None:
    """Put lines between `<!-- NAME: … -->` and `<!-- /NAME -->` of a page, in the place of what is there."""
    text = page.read_text(encoding="utf-8")
    begin = text.index("-->", text.index(f"<!-- {name}: ")) + len("-->")
    end = text.index(f"<!-- /{name} -->")
    page.write_text(text[:begin] + "\n\n" + "\n".join(lines) + "\n\n" + text[end:], encoding="utf-8")
