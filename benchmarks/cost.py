"""How cost grows: tokens/s and memory of a training step over length, batch, width, depth, vocabulary and processes.

python -m benchmarks.cost            # goes on where it stopped; --only length,processes; --smoke: seconds
python -m benchmarks.cost --draw     # the charts of docs/, from benchmarks/results/cost.json

One small Llama, float32, AdamW, and one of its sizes changed at a time. Every point is a process of its own, so that
its peak memory is its own. With one thread seconds are processor time, which a busy machine disturbs least; with two
threads and with several processes they are the clock's, to be measured alone. Each point also has what the package
calculates: the FLOPs of a token (`training.logging.logger.StepFlops`) and the bytes of a step (`training.estimate`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost_charts import draw
from slmkit.data.batch import Batch
from slmkit.device import (
    find_device,
    keep_freed_memory,
    measured_peak,
    peak_memory,
    reset_peak_memory,
    resident_memory,
)
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import empty_decoder
from slmkit.model.initialization import build_decoder
from slmkit.model.sizes import flops_per_token, parameter_count
from slmkit.training.distributed import join
from slmkit.training.estimate.cluster import RESERVED, forecast_on_gpus
from slmkit.training.estimate.memory import MemoryProfile, training_bytes
from slmkit.training.logging.logger import StepFlops
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import Plan, State, train_step
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import make_optimizers
from slmkit.training.recipe.recipe import TrainSettings

RESULTS = Path(__file__).parent / "results" / "cost.json"
DOCS = Path(__file__).parent.parent / "docs"
BASE = {
    "vocab_size": 4_096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "length": 256, "rows": 4, "window": 0, "threads": 1, "world": 1, "parallel": "ddp",
}  # fmt: skip
LENGTHS = [128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768]
LONGEST_FULL = 16_384  # tokens; at 32,768 full attention takes most of a minute a step, and is left out
# One layer of attention and little else, for lengths: heads of 64, as the base has.
LONG = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2, "num_hidden_layers": 2, "rows": 1}
LEAST_SECONDS, MOST_STEPS = 1.0, 8  # of the measured steps of one point
AGREEMENTS = 50  # gatherings of three numbers from all processes, whose mean time is taken
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["slmkit.training.fit", "torch.distributed.fsdp"])


def sweeps() -> dict[str, list[dict[str, Any]]]:
    """The points of each chart: what differs from `BASE`."""
    widths = [(64, 1), (128, 2), (256, 4), (384, 6), (512, 8), (768, 12), (1_024, 16)]
    full = [LONG | {"length": length} for length in LENGTHS if length <= LONGEST_FULL]
    windows = [LONG | {"length": length, "window": 512} for length in LENGTHS]
    return {
        "length": full + windows,
        "batch": [{"rows": rows} for rows in (1, 2, 4, 8, 16, 32, 64)],
        "width": [
            {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": heads}
            for width, heads in widths
        ],
        "depth": [{"num_hidden_layers": depth} for depth in (1, 2, 4, 8, 16, 32)],
        "vocabulary": [{"vocab_size": size} for size in (256, 1_024, 4_096, 16_384, 65_536, 131_072)],
        "threads": [{"threads": threads, "rows": 8} for threads in (1, 2)],
        "processes": [
            {"world": world, "parallel": parallel, "rows": 8 // world}
            for world, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"))
        ],
    }


# -- one point, in a process of its own -------------------------------------------------------------------------------


def loopback_bytes() -> int:
    """Bytes that this network namespace sent over its loopback device so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def sizes_of(point: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `SLMConfig`: a Llama, or with a window a Mistral, which is a Llama with one."""
    sizes = {name: point[name] for name in BASE if name.endswith("size") or name.startswith("num_")}
    window = {"model_type": "mistral", "sliding_window": point["window"]} if point["window"] else {}
    return sizes | window | {"max_position_embeddings": point["length"], "tie_word_embeddings": True}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Steps of this point on this rank: seconds, peak memory, and the FLOPs of a token."""
    torch.set_num_threads(point["threads"])
    keep_freed_memory()
    config, settings, length, rows = SLMConfig(**sizes_of(point)), TrainSettings(), point["length"], point["rows"]
    device = find_device("cpu", "float32")
    with join(device, 600) as group:
        clock = time.process_time if point["threads"] == group.world == 1 else time.perf_counter

        def steps(config: SLMConfig, rows: int, length: int) -> tuple[list[float], int]:
            """Seconds of each step after the first, and bytes that all processes sent in the last one."""
            model = build_decoder(config, seed=0)
            group.share(model, point["parallel"], device.torch_device)
            state = State(model, make_optimizers(model, settings, device))
            plan = Plan(MOST_STEPS, rows, 1.0, lambda step: 1.0, device, group=group)
            ids = torch.randint(config.vocab_size, (rows, length + 1))
            batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rows * length)
            seconds: list[float] = []
            while len(seconds) < 2 or (group.sum(sum(seconds[1:]))[0] < LEAST_SECONDS and len(seconds) < MOST_STEPS):
                started, before = clock(), loopback_bytes()
                train_step(state, next_token, batch, plan)
                group.sum(0)  # all ranks have ended their step
                seconds.append(clock() - started)
                sent = loopback_bytes() - before
            return seconds[1:], sent

        steps(SLMConfig(vocab_size=256, hidden_size=64, num_attention_heads=1, num_hidden_layers=1), 1, 64)
        reset_peak_memory(device)
        before = resident_memory()
        seconds, sent = steps(config, rows, length)
        memory = peak_memory(device) - before
        started = time.perf_counter()
        for _ in range(AGREEMENTS):
            group.gather(1.0, 2.0, 3.0)
        agreement = (time.perf_counter() - started) / AGREEMENTS
    model = empty_decoder(config)
    return {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "steps": len(seconds),
        "tokens": rows * length * point["world"],
        "memory_bytes": memory,
        "loopback_bytes": sent if point["world"] > 1 else 0,
        "agreement_seconds": agreement,
        "peak_flops": measured_peak(device),
        "parameters": parameter_count(model.architecture),
        "flops_per_token": StepFlops(model, length).of_step(1, 1),
        "attention_flops_per_token": 3 * flops_per_token(model.architecture, length).attention,
        "head_flops_per_token": 3 * StepFlops(model, length).head,
    }


def predicted(point: dict[str, Any]) -> dict[str, int]:
    """Bytes of a rank's step, and what collectives exchange in it, by calculation."""
    profile = MemoryProfile(empty_decoder(SLMConfig(**sizes_of(point))))
    length, rows, world = point["length"], point["rows"], point["world"]
    settings = TrainSettings(
        sequence_length=length, tokens_per_step=rows * length * world, micro_batch_tokens=rows * length,
        precision="float32",
    )  # fmt: skip
    if world > 1 and point["parallel"] == "fsdp":
        said = forecast_on_gpus(profile, settings, world, "h100")
        exchanged = {"gathered_bytes": said.gathered_bytes, "reduced_bytes": said.reduced_bytes}
        return {"predicted_memory_bytes": said.memory_bytes - int(RESERVED), **exchanged}
    gradients = sum(p.numel() for p in profile.model.parameters()) * 4
    said_bytes = training_bytes(profile, settings, rows, length, find_device("cpu", "float32"))
    if world == 1:
        return {"predicted_memory_bytes": said_bytes}
    return {"predicted_memory_bytes": said_bytes + gradients, "reduced_bytes": gradients}


# -- all points -------------------------------------------------------------------------------------------------------


def on_a_rank(point: dict[str, Any], rank: int, port: int, answers: Any) -> None:
    if point["world"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(point["world"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = measure(point)
    if rank == 0:
        answers.put(found)


def run(point: dict[str, Any]) -> dict[str, Any]:
    """The point measured in processes of its own, which find the libraries loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = PROCESSES.Queue()
    started = [
        PROCESSES.Process(target=on_a_rank, args=(point, rank, port, answers), daemon=True)
        for rank in range(point["world"])
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise SystemExit(f"{point}: a process failed")
    return answers.get()


def key_of(point: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in point.items() if value != BASE[name]) or "base"


def measure_all(chosen: list[str], results: Path, smoke: bool, budget: float, jobs: int) -> None:
    """Measure what is missing in the results, `jobs` points at a time, and write each as it comes."""
    content = json.loads(results.read_text()) if results.exists() and not smoke else {"points": {}}
    content |= {"base": BASE, "environment": environment() | find_device("cpu", "float32").describe()}
    began, writing = time.monotonic(), threading.Lock()

    def one(key: str, point: dict[str, Any]) -> None:
        if key in content["points"] or time.monotonic() - began > budget:
            return
        found = point | run(point)
        rate, memory = found["tokens"] / found["seconds"], found["memory_bytes"] / 2**20
        with writing:
            print(f"{key}: {rate:,.0f} tokens/s, {memory:,.0f} MiB", flush=True)
            content["points"][key] = found | {"date": datetime.date.today().isoformat()}
            if not smoke:
                results.write_text(json.dumps(content, indent=1) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for name in chosen:
            for change in sweeps()[name][:1] if smoke else sweeps()[name]:
                tiny = {"length": 64, "rows": 1, "vocab_size": 256, "num_hidden_layers": 1} if smoke else {}
                waiting.append(pool.submit(one, f"{name}: {key_of(BASE | change)}", BASE | change | tiny))
        for each in waiting:
            each.result()


def calculate_all(results: Path) -> dict[str, Any]:
    """The results, with what is calculated for every point."""
    content = json.loads(results.read_text())
    for point in content["points"].values():
        if "predicted_memory_bytes" not in point:
            point |= predicted(point)
    results.write_text(json.dumps(content, indent=1) + "\n")
    return content["points"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(sweeps()), help="some of: %(default)s")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further point after these")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="points with one thread that may run side by side")
    parser.add_argument("--smoke", action="store_true", help="one tiny point of each; writes nothing")
    parser.add_argument("--measure", action="store_true", help="neither calculate nor draw")
    parser.add_argument("--draw", action="store_true", help="only calculate and draw")
    arguments = parser.parse_args()
    if not arguments.draw:
        measure_all(arguments.only.split(","), arguments.results, arguments.smoke, arguments.seconds, arguments.jobs)
    if not (arguments.smoke or arguments.measure):
        draw(calculate_all(arguments.results), DOCS)


if __name__ == "__main__":
    main()
