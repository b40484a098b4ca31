"""Fixtures: the page's are in `browser.py`, the server's here, one of each for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slmkit.serving.models import ServedModel
from tests.serving.browser import chromium, open_page, shared_context
from tests.serving.servers import Client, Script, gemma, llama, serving

__all__ = ["chromium", "open_page", "shared_context"]


@pytest.fixture(scope="module")
def m1() -> ServedModel:
    return llama()


@pytest.fixture(scope="module")
def m2() -> ServedModel:
    return gemma()


@pytest.fixture(scope="module")
def m3() -> Script:
    return Script()


@pytest.fixture(scope="module")
def client(m1: ServedModel, m2: ServedModel, m3: Script) -> Iterator[Client]:
    """Of a server with the three models."""
    with serving(m1, m2, m3.served) as found:
        yield found
