"""The loss in chunks beside torch's own ways: time and memory for one forward and backward pass over the head.

python benchmarks/loss.py                # minutes on two cores; --smoke: seconds

Each measurement runs in a process of its own, whose peak of resident memory is read before and after.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from slmkit.device import find_device, peak_memory, reset_peak_memory, resident_memory
from slmkit.training.logging.metrics_log import environment
from slmkit.training.losses import linear_cross_entropy

# positions, vocabulary, width
CASES = {"quickstart": (4096, 4_096, 128), "gpt2": (4096, 50_257, 768), "gemma-3-270m": (1024, 262_144, 640)}
SMOKE = {"small": (64, 1_000, 32)}
WAYS = ("slmkit", "cross_entropy", "torch linear_cross_entropy")
RESULTS = Path(__file__).parent / "results" / "loss.json"


def loss_of(way: str, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if way == "slmkit":
        return linear_cross_entropy(hidden, head, labels)
    if way == "cross_entropy":
        return F.cross_entropy(hidden @ head.T, labels, reduction="sum")
    # Without options it is the plain form.
    return F.linear_cross_entropy(hidden, head, labels, reduction="sum", options=torch.nn.LinearCrossEntropyOptions())


def measure(way: str, positions: int, vocabulary: int, width: int, rounds: int) -> dict[str, float]:
    """Median seconds of a pass, and the bytes by which the process grew at most, gradients included."""
    device = find_device("auto", "float32")
    hidden = torch.randn(positions, width, device=device.torch_device, requires_grad=True)
    head = (torch.randn(vocabulary, width, device=device.torch_device) * 0.02).requires_grad_()
    labels = torch.randint(vocabulary, (positions,), device=device.torch_device)
    loss_of(way, hidden[:8], head[:100], labels[:8] % 100).backward()  # what libraries load is none of the loss's
    hidden.grad = head.grad = None
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated() if device.torch_device.type == "cuda" else resident_memory()
    times = []
    for _ in range(rounds):
        started = time.process_time() if device.torch_device.type == "cpu" else time.perf_counter()
        loss_of(way, hidden, head, labels).backward()
        if device.torch_device.type == "cuda":
            torch.cuda.synchronize()
        ended = time.process_time() if device.torch_device.type == "cpu" else time.perf_counter()
        times.append(ended - started)
        hidden.grad = head.grad = None
    return {
        "seconds": round(statistics.median(times), 4),
        "spread": [round(min(times), 4), round(max(times), 4)],
        "mebibytes": round((peak_memory(device) - before) / 2**20),
        "mebibytes_of_all_logits": round(positions * vocabulary * 4 / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, *sizes = arguments.one
        print(json.dumps(measure(way, *map(int, sizes), rounds=arguments.rounds)))
        return
    found: dict[str, dict[str, object]] = {}
    for name, sizes in (SMOKE if arguments.smoke else CASES).items():
        found[name] = {}
        for way in WAYS if hasattr(F, "linear_cross_entropy") else WAYS[:2]:
            command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--one", way, *map(str, sizes)]
            done = subprocess.run(command, capture_output=True, text=True)
            ok = done.returncode == 0
            found[name][way] = json.loads(done.stdout.splitlines()[-1]) if ok else done.stderr.strip()[-200:]
            print(name, way, found[name][way], flush=True)
    content = {"date": datetime.date.today().isoformat(), "environment": environment(), "float32": found}
    if not arguments.smoke:
        RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
