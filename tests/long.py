"""Long forms of tests: `make test-long` draws more at random, measures larger models, and exports every kind.

The ordinary suite has a short form of each, with the same code: no test is in the long run alone.
"""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")
IS_LONG = bool(os.environ.get("SLMKIT_TEST_LONG"))


def several(short: T, long: T) -> T:
    """How many rounds, rows or cases a test has in this run."""
    return long if IS_LONG else short
