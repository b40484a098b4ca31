"""What benchmarks that train share: a reporter that says nothing, and the first rows of a corpus."""

from __future__ import annotations

from collections.abc import Callable

from slmkit.data.stream import Rows


class Quiet:
    """A reporter without output."""

    def say(self, line: object) -> None: ...

    warn = say

    def counter(self, label: str, total: int | None = None) -> Callable[..., None]:
        return lambda *counts: None


class First(Rows):
    """The first `count` of other rows."""

    rows_in_epoch = 0

    def __init__(self, rows: Rows, count: int) -> None:
        self.rows_in_epoch = min(count, rows.rows_in_epoch)
        self.row, self.documents = rows.row, rows.documents
