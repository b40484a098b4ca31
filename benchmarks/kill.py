"""A short run killed with SIGKILL again and again, and resumed each time: does it end as the one that nobody killed?

python -m benchmarks.kill              # 100 kills, some minutes on two cores

Half of the kills come after a random time, half at a random operation on a file: in the midst of a checkpoint that is
written, of a link that is moved, of half a line of metrics. What is compared, bit for bit: weights, optimizer, the rest
of the state, samples, and all of metrics.jsonl but what the clock says.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from slmkit.cli.show import TerminalReporter
from slmkit.device import find_device
from slmkit.training.logging.metrics_log import environment
from slmkit.training.recipe.recipe import Recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.train import resume_run, train_recipe
from tests.training.faults import kill, operations_on_files

RESULTS = Path(__file__).parent / "results" / "kill.json"
MOST_KILLS_OF_A_RUN = 4


def recipe(folder: Path) -> Recipe:
    """Dropout, Muon beside AdamW, a spike guard: all that a run remembers is at stake."""
    return Recipe.model_validate({
        "output_dir": str(folder / "unbroken"),
        "model": {
            "preset": "quickstart", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_dropout": 0.1,
        },
        "tokenizer": {"vocab_size": 512},
        "data": {"source": "stories", "documents": 120, "validation_documents": 10},
        "train": {
            "tokens_per_step": 256, "max_steps": 40, "eval_steps": 8, "save_steps": 4, "logging_steps": 1,
            "optimizer": "muon", "sample_tokens": 8, "device": "cpu", "precision": "float32",
        },
        "guard": {"max_spike": 100},
    })  # fmt: skip


def in_a_process(work: Callable[[], object], log: Path) -> int:
    """Start a real process that has torch loaded already; returns its id."""
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def wait_for(child: int, seconds: float | None = None) -> bool:
    """Wait for a process, and kill it after `seconds`; whether it ended by itself and well."""
    if seconds is not None:
        deadline = time.monotonic() + seconds
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= deadline:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.001)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit("a run failed instead of going on: see its log")
    return True


def result_of(root: Path) -> dict[str, str]:
    """What a finished run has come to: a checksum each."""
    run = RunDirectory(root)
    parts = {
        name: (run.latest / name).read_bytes()
        for name in ("model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json")
    }
    parts["metrics.jsonl"] = json.dumps(run.metrics.comparable()).encode()
    parts["samples.md"] = run.samples.read_bytes()
    parts["best"] = (run.best / "model.safetensors").read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}


def one_run(root: Path, generator: random.Random, seconds: float, operations: int, log: Path) -> list[str]:
    """Resume `root` until it is done, killing it up to a few times; returns what each kill hit."""

    def resume(at: int | None = None) -> None:
        with operations_on_files(at, kill) if at else contextlib.nullcontext():
            resume_run(root, TerminalReporter())

    hits: list[str] = []
    for _ in range(generator.randint(1, MOST_KILLS_OF_A_RUN)):
        if generator.random() < 0.5:
            child = in_a_process(resume, log)
            finished = wait_for(child, generator.uniform(0, seconds))
        else:
            at = generator.randint(1, operations)
            finished = wait_for(in_a_process(lambda at=at: resume(at), log))
        if finished:
            return hits
        hits.append(what_was_hit(root))
    wait_for(in_a_process(resume, log))
    return hits


def what_was_hit(root: Path) -> str:
    """What a kill left behind."""
    metrics = root / "metrics.jsonl"
    if list((root / "checkpoints").glob(".partial-*")):
        return "a checkpoint half-written"
    if list((root / "checkpoints").glob(".deleted-*")):
        return "a checkpoint half-deleted"
    if metrics.exists() and metrics.read_bytes()[-1:] not in (b"", b"\n"):
        return "a metrics line half-written"
    if list(root.glob(".latest-*")) + list(root.glob(".best-*")):
        return "a link half-moved"
    return "a step, or the start" if (root / "latest").exists() else "before the first checkpoint"


def main(kills: int, seed: int, output: Path | None) -> None:
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]  # loss.png would take most of the time
    generator = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    log = folder / "log"
    count = folder / "operations"

    def unbroken() -> None:
        with operations_on_files() as counted:
            train_recipe(recipe(folder), TerminalReporter())
        count.write_text(str(counted.count))

    assert wait_for(in_a_process(unbroken, log))
    expected = result_of(folder / "unbroken")
    start = folder / "start"  # as a run is that was killed before its first step
    shutil.copytree(folder / "unbroken", start, symlinks=True)
    for name in ("latest", "best", "metrics.jsonl", "samples.md"):
        (start / name).unlink()
    shutil.rmtree(start / "checkpoints")
    (start / "checkpoints").mkdir()
    shutil.copytree(start, folder / "timed", symlinks=True)
    begun = time.monotonic()
    assert wait_for(in_a_process(lambda: resume_run(folder / "timed", TerminalReporter()), log))
    seconds = time.monotonic() - begun
    hits: list[str] = []
    runs, equal = 0, 0
    while len(hits) < kills:
        root = folder / f"run-{runs}"
        shutil.copytree(start, root, symlinks=True)
        hits += one_run(root, generator, seconds, int(count.read_text()), log)
        runs, equal = runs + 1, equal + (result_of(root) == expected)
        print(f"{len(hits)} kills, {runs} runs, {equal} equal to the unbroken one", flush=True)
        if equal == runs:
            shutil.rmtree(root)
    result = {
        "date": datetime.date.today().isoformat(),
        "what": "runs killed with SIGKILL, resumed, and compared bit for bit with an unbroken one",
        "environment": environment() | find_device("cpu", "float32").describe(),
        "kills": len(hits),
        "runs": runs,
        "equal": equal,
        "hit": {hit: hits.count(hit) for hit in sorted(set(hits))},
    }
    print(json.dumps(result["hit"], indent=2))
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n")
    if equal < runs:
        raise SystemExit(f"{runs - equal} of {runs} runs differ: see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--no-output", dest="output", action="store_const", const=None, help="measure, write nothing")
    arguments = parser.parse_args()
    main(arguments.kills, arguments.seed, arguments.output)
