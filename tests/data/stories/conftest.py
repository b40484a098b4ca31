"""Samples of the corpus that several tests look at."""

from __future__ import annotations

import pytest

from slmkit.data.stories import Story, tell_many


@pytest.fixture(scope="session")
def stories() -> list[Story]:
    return list(tell_many(seed=11, count=5000))


@pytest.fixture(scope="session")
def heldout_stories() -> list[Story]:
    return list(tell_many(seed=11, count=1000, split="heldout"))
