"""A person at a terminal: what is typed goes to a pseudo-terminal, and an emulator (pyte) shows what appears."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time
from pathlib import Path

import pyte

from tests.cli.helpers import begin, ended

# The pseudo-terminal becomes the one that sends signals for Ctrl-C.
SLM = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
from slmkit.cli import main
main()
"""


class Screen:
    """What a terminal shows for bytes that are fed, lines that were scrolled out included."""

    def __init__(self, columns: int, rows: int) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self._screen)

    def feed(self, data: bytes) -> None:
        self._stream.feed(data)

    @property
    def text(self) -> str:
        gone = [
            "".join(line[column].data for column in range(self._screen.columns)) for line in self._screen.history.top
        ]
        return "\n".join(line.rstrip() for line in (*gone, *self._screen.display)).rstrip()

    def style_of(self, word: str) -> pyte.screens.Char:
        """How the first character of a word that stands on the screen looks."""
        for row, line in enumerate(self._screen.display):
            if word in line:
                return self._screen.buffer[row][line.index(word)]
        raise AssertionError(f"{word!r} is not on the screen:\n{self.text}")


class Terminal:
    """`slm` in a terminal."""

    def __init__(
        self, *arguments: str | Path, cwd: Path, columns: int = 80, rows: int = 24, **environment: str
    ) -> None:
        self.screen, self.raw, self._words = Screen(columns, rows), b"", [str(argument) for argument in arguments]
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        begin(SLM, self._words, cwd, [theirs] * 3, **{"TERM": "xterm-256color"} | environment)
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, end: str = "", timeout: float = 300) -> str:
        """Read until the screen's text contains `text`, and ends with `end`; returns it whole."""
        limit = time.monotonic() + timeout
        while text not in self.screen.text or not self.screen.text.endswith(end):
            assert self._read(0.1), f"the command ended without {text!r}:\n{self.screen.text}"
            assert time.monotonic() < limit, f"no {text!r} with {end!r} at the end in:\n{self.screen.text}"
        return self.screen.text

    def say(self, text: str) -> str:
        """Type a line, and wait for the next prompt; returns what appeared between them."""
        before = self.wait_for("you>", "you>")
        self.type(f"{text}\r")
        return self.wait_for(f"{before} ", "\nyou>")[len(before) :].removesuffix("\nyou>").strip("\n")

    def leave(self, text: str = "\x04") -> int:
        """Type the last thing, by default Ctrl-D; returns the exit code."""
        self.type(text)
        while self._read(1):
            pass
        return self.close()

    def close(self) -> int:
        """Close the terminal, which ends a command that still runs; returns its exit code."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours, self._code = -1, ended(300, self._words)
        return self._code

    def _read(self, seconds: float) -> bool:
        """Read what appears within so many seconds; False if the command has ended."""
        if select.select([self._ours], [], [], seconds)[0]:
            try:
                data = os.read(self._ours, 65_536)
            except OSError:  # how Linux says that the other end is closed
                return False
            self.raw += data
            self.screen.feed(data)
        return True
