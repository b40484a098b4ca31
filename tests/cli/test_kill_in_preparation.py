"""A run that is killed before its data is ready goes on like any other."""

from __future__ import annotations

import signal
from pathlib import Path

from slmkit.files import file_sha256
from tests.cli.helpers import TINY, python, slm

STORY = "Once there was a fox who had a kite. The kite flew over the hill and the fox ran after it, laughing. "
TRAIN = ("train", "own-text", "data.source=book.txt", *TINY)
# Kills itself when the rows to train on are written, and their header is not.
KILLED = """
import os, signal, sys
def hook(event, arguments):
    if event == "open" and ".partial-train/.header.json" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from slmkit.cli import main
main()
"""


def test_a_run_killed_while_its_data_is_prepared_becomes_the_run_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text((STORY * 8 + "\n") * 500)
    assert python(KILLED, *TRAIN, "output_dir=killed", cwd=tmp_path).returncode == -signal.SIGKILL
    killed = tmp_path / "killed"
    assert (killed / "recipe.yaml").is_file()
    assert not (killed / "environment.json").exists()

    resumed = slm("resume", "killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "preparing it again" in resumed.stderr
    whole = slm(*TRAIN, "output_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    one, other = (file_sha256(tmp_path / run / "latest" / "model.safetensors") for run in ("killed", "whole"))
    assert one == other
