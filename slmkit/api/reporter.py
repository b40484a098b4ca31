"""Where what takes long says how far it is."""

from __future__ import annotations

from typing import Protocol

from rich.text import Text

from slmkit.data import source_shards
from slmkit.data.prepare import Progress


class Reporter(source_shards.Reporter, Protocol):
    """Where the long functions below say how far they are; a `Text` has colours that mean something."""

    def say(self, line: str | Text) -> None: ...

    def warn(self, line: str) -> None: ...


class Silence:
    """A reporter for the processes that do not speak."""

    def say(self, line: str | Text) -> None: ...

    def warn(self, line: str) -> None: ...

    def counter(self, label: str, total: int | None = None) -> Progress:
        return lambda *done: None


SILENCE = Silence()
