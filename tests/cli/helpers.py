"""Run `slm` as a user does: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def slm(*arguments: str | Path, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from slmkit.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=stdin, check=False, timeout=300)


def refused(*arguments: str | Path, cwd: Path | None = None) -> str:
    """The one line of a command that must end with exit code 2; progress may stand before it."""
    done = slm(*arguments, cwd=cwd)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    *progress, last = done.stderr.splitlines()
    assert last.startswith("slm: ")
    assert all(line.startswith(("tokenizer: ", "opening ")) or " replaces " in line for line in progress), done.stderr
    return last


TINY = (
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.max_position_embeddings=64", "tokenizer.vocab_size=300", "train.tokens_per_step=512",
    "train.max_tokens=null", "train.max_steps=12", "train.device=cpu", "train.sample_tokens=10",
)  # fmt: skip
