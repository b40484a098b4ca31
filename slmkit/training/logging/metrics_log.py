"""Log files of a run: `metrics.jsonl`, `samples.md`, `environment.json`; and whether it is running."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from slmkit.config import UserError
from slmkit.files import sync, write_whole

if TYPE_CHECKING:
    from slmkit.training.loop import Report  # its module imports torch, which reading a run does not need

RUNNING, TRIES = ".running", 10
SAMPLES_OF_A_STEP = re.compile(r"^## Step ([\d,]+)\n\n(?:> .*\n+)*", re.MULTILINE)

# Measured keys. The others are bit-identical, however often a run is killed and resumed.
MEASURED = ("tokens_per_second", "seconds", "mfu", "memory_bytes")


def finite(report: Report) -> Report:
    """A report for JSON: null in place of infinity and NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in report.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it is missing or invalid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class MetricsLog:
    """`metrics.jsonl`: one appended line per logged step; a resumed run first drops the lines it will repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, report: Report) -> None:
        """Add a line. Raises `UserError` when the disk is full."""
        _append(self.path, json.dumps(finite(report)) + "\n")

    def read(self) -> list[Report]:
        """All complete lines, up to a partial one left by a crash."""
        if not self.path.exists():
            return []
        reports = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                reports.append(json.loads(line))
            except ValueError:
                break
        return reports

    def seconds(self) -> float:
        """Training time so far in seconds, without pauses."""
        return max((report.get("seconds", 0.0) for report in self.read()), default=0.0)

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`."""
        kept = [report for report in self.read() if report["step"] <= step]
        write_whole(self.path, "".join(json.dumps(report) + "\n" for report in kept))

    def sync(self) -> None:
        """fsync the file."""
        if self.path.exists():
            sync(self.path)

    def comparable(self) -> list[Report]:
        """The lines without `MEASURED` keys: equal for interrupted and uninterrupted runs."""
        return [{key: value for key, value in report.items() if key not in MEASURED} for report in self.read()]


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error}); free some space, then `slm resume {path.parent}`"
        ) from None


def append_samples(path: Path, step: int, samples: list[tuple[str, str]]) -> None:
    """Append the `samples` (prompt, continuation) of a step. Raises `UserError` when the disk is full."""
    quoted = ((prompt + text).strip().replace("\n", "\n> ") for prompt, text in samples)
    _append(path, f"## Step {step:,}\n\n" + "".join(f"> {text}\n\n" for text in quoted))


def rewind_samples(path: Path, step: int) -> None:
    """Drop the samples after `step`, and partial ones left by a crash."""
    if path.exists():
        sections = SAMPLES_OF_A_STEP.finditer(path.read_text(encoding="utf-8", errors="replace"))
        kept = [section[0] for section in sections if int(section[1].replace(",", "")) <= step]
        write_whole(path, "".join(kept))


def environment() -> dict[str, Any]:
    """Versions, machine and git revision, for repeating the run."""
    packages = ("slmkit", "torch", "numpy", "tokenizers", "safetensors")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    """The commit of the working directory, `-dirty` if it has changes; None outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


@contextlib.contextmanager
def mark_running(root: Path) -> Iterator[None]:
    """Context manager that locks the run for this process; the lock ends with the process in any case.

    Raises `UserError` if another process holds it.
    """
    with (root / RUNNING).open("a+") as file:
        tries = 0
        while not _locked(file):
            tries += 1
            if tries == TRIES:
                file.seek(0)
                raise UserError(f"{root} is running ({file.read() or 'in another process'}): wait for it, or stop it")
            time.sleep(0.05)  # the lock may belong to a short check by `is_running`
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
        file.truncate(0)


def is_running(root: Path) -> bool:
    """Whether a process is training in this run's directory."""
    try:
        with (root / RUNNING).open("r+") as file:
            return not _locked(file)
    except OSError:
        return False


def _locked(file: TextIO) -> bool:
    """Take the file's lock; False if another process has it. True if the system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
