"""Progress of long operations: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from slmkit.cli.show import counted

EVERY = 10.0  # seconds between two plain lines


class _Bar:
    """Base class of the bars below: drawn on a terminal, lines elsewhere."""

    console: Console
    bar: Progress
    started: float
    shown: float

    def _start(self) -> None:
        self.started = self.shown = time.monotonic()
        if self.console.is_terminal:
            self.bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bar.stop()


class PreparationProgress(_Bar):
    """Context manager that returns a callback for documents, tokens and bytes of text done.

    `fraction` returns the share of the input that has been read, or None: then no time left is shown.
    """

    def __init__(self, label: str, fraction: Callable[[], float | None]) -> None:
        self.label, self.fraction = label, fraction
        self.console = Console(stderr=True, highlight=False)
        figures = TextColumn("{task.fields[figures]}")
        columns = (TextColumn("{task.description}"), BarColumn(), figures, TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.task = self.bar.add_task(label, total=None, figures="")
        self.started = self.shown = 0.0

    def __enter__(self) -> Callable[[int, int, int], None]:
        self._start()
        return self._update

    def _update(self, documents: int, tokens: int, text_bytes: int) -> None:
        now = time.monotonic()
        seconds = max(now - self.started, 1e-3)
        figures = f"{counted(documents, 'document')}, {tokens:,} tokens, {text_bytes / seconds / 1e6:.1f} MB/s"
        fraction = self.fraction()
        if self.console.is_terminal:
            total = None if fraction is None else 1.0
            self.bar.update(self.task, total=total, completed=fraction or 0.0, figures=figures)
        elif now - self.shown >= EVERY:
            self.shown = now
            left = f", {seconds * (1 - fraction) / fraction:.0f} s left" if fraction else ""
            self.console.print(f"{self.label}: {figures}{left}", soft_wrap=True, markup=False)


class WritingProgress(_Bar):
    """Context manager that returns a callback for bytes written, of `total`."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
        self.task = self.bar.add_task(label, total=total)
        self.written, self.started, self.shown = 0, 0.0, 0.0

    def __enter__(self) -> Callable[[int], None]:
        self._start()
        return self._update

    def _update(self, more: int) -> None:
        self.written += more
        now = time.monotonic()
        if self.console.is_terminal:
            self.bar.update(self.task, completed=self.written)
        elif now - self.shown >= EVERY:
            self.shown = now
            rate = self.written / (now - self.started)
            figures = f"{self.written / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
            left = f"{(self.total - self.written) / rate:.0f} s left"
            self.console.print(f"{self.label}: {figures}, {left}", soft_wrap=True, markup=False)


class EvaluationProgress(_Bar):
    """Context manager that returns a callback for rows done and rows in total."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.task = self.bar.add_task(label, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._start()
        return self._update

    def _update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.console.is_terminal:
            self.bar.update(self.task, total=total, completed=done)
        elif now - self.shown >= EVERY:
            self.shown = now
            left = (now - self.started) / done * (total - done)
            self.console.print(
                f"{self.label}: {done:,} of {total:,} rows, {left:.0f} s left", soft_wrap=True, markup=False
            )
