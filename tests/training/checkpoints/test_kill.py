"""A handful of the kills of `make test-kill`, which has a hundred."""

from __future__ import annotations

from pathlib import Path

from tests.cli.helpers import python


def test_a_run_killed_at_any_instant_ends_as_the_unbroken_one() -> None:
    # Of this seed are four kills of one run: at operations on files and in between.
    code = "from benchmarks.kill import main; main(kills=4, seed=136, output=None)"
    done = python(code, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout + done.stderr
    progress = [line.split() for line in done.stdout.splitlines() if " kills, " in line]
    kills, runs, equal = (int(progress[-1][place]) for place in (0, 2, 4))
    assert kills >= 4
    assert runs == equal
