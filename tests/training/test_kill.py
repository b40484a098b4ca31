"""A handful of the kills of `make test-kill`, which has a hundred."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_run_killed_at_any_instant_ends_as_the_unbroken_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill", "--kills", "4", "--seed", "3", "--no-output"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    progress = [line.split() for line in done.stdout.splitlines() if " kills, " in line]
    kills, runs, equal = (int(progress[-1][place]) for place in (0, 2, 4))
    assert kills >= 4
    assert runs == equal
