"""`torchrun … -m slmkit.cli`: one voice, one run, one checkpoint at the end, and the same run when started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.helpers import python

RECIPE = """
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
  max_position_embeddings: 64}
tokenizer: {vocab_size: 300}
data: {source: stories, documents: 100, validation_documents: 10}
train: {tokens_per_step: 256, max_steps: 40, eval_steps: 40, save_steps: 40, logging_steps: 1, device: cpu,
  precision: float32, sample_tokens: 5}
"""
AS_OF_A_LAUNCHER = (("TORCHELASTIC_RUN_ID", "a-job"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"))
PATIENCE = 120  # seconds
TWO_RANKS = """
import os, socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(free.getsockname()[1])
other = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if other else "1"
from slmkit.cli import main
try:
    main()
except SystemExit as end:
    if other:
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == (end.code or 0)
    raise
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "a-job"]
    return subprocess.Popen(
        [*launcher, *rendezvous, "-m", "slmkit.cli", *words],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_job_that_is_stopped_goes_on_with_its_run_when_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = tmp_path / "runs" / "job"
    command = ("train", "recipe.yaml", "output_dir=runs/job")
    first = start(tmp_path, *command, "train.max_steps=4000")
    deadline = time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 3:
        assert first.poll() is None, first.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=PATIENCE)
    stopped = [line for line in said.splitlines() if "stopped after step" in line]
    assert len(stopped) == 1, said[-2000:]
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert (run / "latest").resolve() == checkpoint
    step = json.loads((checkpoint / "training_state" / "state.json").read_text())["step"]
    assert f"stopped after step {step} of 4000" in stopped[0]

    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 4000", f"max_steps: {step + 2}"))
    # A launcher and its two processes take long to start: here the environment is what it makes it.
    for name, value in AS_OF_A_LAUNCHER:
        monkeypatch.setenv(name, value)
    second = python(TWO_RANKS, *command, cwd=tmp_path)
    assert second.returncode == 0, second.stderr[-2000:]
    assert second.stdout.splitlines()[0] == "run: runs/job"
    assert second.stdout.count("run: ") == 1
    assert os.listdir(tmp_path / "runs") == ["job"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 3))


def test_a_mistake_on_every_rank_is_a_line_that_names_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AS_OF_A_LAUNCHER:
        monkeypatch.setenv(name, value)
    done = python(TWO_RANKS, "train", "nothing.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert not done.stdout
    said = done.stderr
    assert "slm: rank 0: nothing.yaml: no such recipe" in said or "slm: rank 1: nothing.yaml: no such recipe" in said
