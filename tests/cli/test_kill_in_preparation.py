"""A run that is killed before its data is ready goes on like any other."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from slmkit.training.checkpoints.checkpoint import file_sha256
from tests.cli.helpers import TINY, slm

STORY = "Once there was a fox who had a kite. The kite flew over the hill and the fox ran after it, laughing. "
TRAIN = ("train", "own-text", "data.source=book.txt", *TINY)


def test_a_run_killed_while_its_data_is_prepared_becomes_the_run_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text((STORY * 8 + "\n") * 500)
    command = [sys.executable, "-c", "from slmkit.cli import main; main()", *TRAIN, "output_dir=killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = tmp_path / "killed"
    ends = time.monotonic() + 120
    while not (killed / "recipe.yaml").is_file() and time.monotonic() < ends:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "environment.json").exists(), "it was ready before the signal came: give it more text"

    resumed = slm("resume", "killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "preparing it again" in resumed.stderr
    whole = slm(*TRAIN, "output_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    one, other = (file_sha256(tmp_path / run / "latest" / "model.safetensors") for run in ("killed", "whole"))
    assert one == other
