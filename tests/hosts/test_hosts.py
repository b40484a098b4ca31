"""Two hosts, as network namespaces with addresses of their own: one fails in mid-run, and the job ends as if none had.

Needs root and iproute2, and is skipped where they are missing. Run by `make test-hosts` alone: it takes minutes, mostly
of torchrun's waiting. `tests/cli/test_torchrun.py` is the short form, a job that is stopped and started again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cli.helpers import slm

whole = pytest.mark.skipif("SLMKIT_TEST_HOSTS" not in os.environ, reason="run by `make test-hosts`")
HOSTS, ADDRESSES = ("slmkit-a", "slmkit-b"), ("10.77.0.1", "10.77.0.2")
STEPS, PATIENCE = 80, 150
RECIPE = {
    "seed": 3,
    "model": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "tokenizer": {"vocab_size": 300},
    "data": {"source": "stories", "documents": 200, "validation_documents": 20},
    "train": {
        "tokens_per_step": 448, "max_steps": STEPS, "eval_steps": 40, "save_steps": 5, "logging_steps": 1,
        "precision": "float32", "device": "cpu", "sample_tokens": 5, "ddp_timeout": 5,
    },
}  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces joined by a cable."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
    except subprocess.CalledProcessError as error:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        ip("link", "add", "eth0", "netns", HOSTS[0], "type", "veth", "peer", "name", "eth0", "netns", HOSTS[1])
        for host, address in zip(HOSTS, ADDRESSES):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", host, "link", "set", interface, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}


def launch(number: int, folder: Path) -> subprocess.Popen[bytes]:
    """`torchrun` on one of the hosts; the first keeps the rendezvous."""
    conf = f"is_host={int(number == 0)},last_call_timeout=2,keep_alive_interval=1,read_timeout=5"
    command = [
        "ip", "netns", "exec", HOSTS[number], sys.executable, "-m", "torch.distributed.run",
        "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "5",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", "a-job",
        "--rdzv-conf", conf, "--local-addr", ADDRESSES[number],
        "-m", "slmkit.cli", "train", "recipe.yaml", "output_dir=runs/job",
    ]  # fmt: skip
    log = (folder / f"host-{number}.log").open("wb")
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True)


def steps_done(folder: Path) -> int:
    metrics = folder / "runs" / "job" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def wait_for_step(folder: Path, step: int, first: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while steps_done(folder) < step:
        assert first.poll() is None, (folder / "host-0.log").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "host-0.log").read_text()[-3000:]
        time.sleep(0.05)


def worker_of(launcher: subprocess.Popen[bytes]) -> int:
    """The process that trains: `ip netns exec` has become the launcher, whose child it is."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(children[0])


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@whole
@pytest.mark.parametrize("failure", ["killed", "cut off"])
def test_a_job_survives_the_loss_of_a_host(tmp_path: Path, hosts: None, failure: str) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    alone = slm("train", "recipe.yaml", "output_dir=runs/alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    launchers = [launch(number, tmp_path) for number in range(2)]
    try:
        wait_for_step(tmp_path, 12, launchers[0])
        if failure == "killed":
            os.kill(worker_of(launchers[1]), signal.SIGKILL)
        else:
            ip("-n", HOSTS[1], "link", "set", "eth0", "down")
        # The host whose worker was killed may train again first, and end the job before the other one is back.
        able = launchers if failure == "killed" else launchers[:1]
        deadline = time.monotonic() + PATIENCE
        while not any(launcher.poll() == 0 for launcher in able):
            assert time.monotonic() < deadline, (tmp_path / "host-0.log").read_text()[-3000:]
            assert None in [launcher.poll() for launcher in able], (tmp_path / "host-0.log").read_text()[-3000:]
            time.sleep(0.2)
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                launcher.send_signal(signal.SIGTERM)
                try:
                    launcher.wait(40)
                except subprocess.TimeoutExpired:
                    os.killpg(launcher.pid, signal.SIGKILL)
    ours, expected = losses(tmp_path / "runs" / "job"), losses(tmp_path / "runs" / "alone")
    assert [step for step, _ in ours] == list(range(1, STEPS + 1))
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in expected], rel=1e-3)
    assert (
        "continuing the run of this job"
        in (tmp_path / "host-0.log").read_text() + (tmp_path / "host-1.log").read_text()
    )
