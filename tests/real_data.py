"""Real text and tokenizers beside the repository, for tests that skip where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("SLMKIT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real_data(name: str) -> Path:
    """A file or folder below the data folder, such as `sft/alpaca-100.json`. Skips the test where it is absent."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{path} is absent: set SLMKIT_TEST_DATA to the folder that holds it")
    return path
