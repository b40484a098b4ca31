"""A program as a child process that ends with this process, however that ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO


def free_port() -> int:
    """A port of 127.0.0.1 that no program uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Child:
    """A program that runs beside this one. `process.poll()`: its exit code, or None while it runs."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: int | IO[bytes] = 2) -> None:
        """`words`: the command; `environment`: variables beside those of this process; `log`: where its output goes."""
        # A session of its own: Ctrl-C in the terminal is for this process, which decides when the child ends.
        self.process = subprocess.Popen(
            words, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

        # If this process is killed, the pipe closes, and the shell behind it ends the child and those it has started.
        self.watcher = subprocess.Popen(
            ["sh", "-c", "read line; kill -KILL -$0", str(self.process.pid)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def kill(self) -> None:
        """With the processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.watcher.kill()
        self.watcher.wait()

    def stop(self, seconds: float = 10) -> None:
        """Ask it to end, and kill it if it still runs after `seconds`."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()
