"""A layer with a window beside one with full attention: the shapes of Gemma 3 270M, forward and backward.

python -m benchmarks.window                # eight minutes of one core; --smoke: seconds

Each way in turn, in one run: attention in blocks of queries (FlexAttention on a GPU), full attention, and the mask of
the whole row that a window took before. Of the model six layers are read, five with a window and one without, which is
a third of it, and no head. On a CPU the seconds are processor time, since its cores are shared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.figures import spread
from slmkit.device import Device, find_device
from slmkit.model import context
from slmkit.model.architectures import Layer, architecture_of
from slmkit.model.attend import attend
from slmkit.model.config import SLMConfig
from slmkit.model.context import AttentionInputs, Context
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.logging.metrics_log import environment

CASES = [  # what, tokens, whether backward too, rounds: the cheapest first
    ("layer", 2_048, False, 3),
    ("layer", 2_048, True, 3),
    ("layer", 8_192, False, 3),
    ("model", 2_048, False, 3),
    ("layer", 32_768, False, 3),
    ("layer", 8_192, True, 3),
    ("model", 8_192, False, 1),
]
SMOKE = [("layer", 600, True, 1), ("model", 600, False, 1)]
LAYERS = 6
LONGEST_DENSE = 8_192  # tokens; beyond, the mask of a row takes gigabytes
PRESET = "gemma-3-270m"
RESULTS = Path(__file__).parent / "results" / "window.json"
Ways = dict[str, Callable[[], torch.Tensor]]


@contextmanager
def one_mask() -> Iterator[None]:
    """Within, a window is a mask of the whole row."""
    queries, context.QUERIES_AT_ONCE = context.QUERIES_AT_ONCE, 10**9
    try:
        yield
    finally:
        context.QUERIES_AT_ONCE = queries


def seconds(run: Callable[[], object], device: Device) -> float:
    clock = time.process_time if device.torch_device.type == "cpu" else time.perf_counter
    started = clock()
    run()
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def in_turn(ways: Ways, rounds: int, device: Device, backward: bool) -> dict[str, object]:
    """Seconds of each way, and how many times those of the window the others take, round by round."""

    def run(way: str) -> None:
        with torch.set_grad_enabled(backward):
            y = ways[way]()
            if backward:
                y.sum().backward()

    if device.torch_device.type == "cuda":
        for way in ways:
            run(way)  # compiles
    taken = [{way: seconds(lambda way=way: run(way), device) for way in ways} for _ in range(rounds)]
    found: dict[str, object] = {way: spread([times[way] for times in taken]) for way in ways}
    for way in list(ways)[1:]:
        found[f"{way}, times the window's"] = round(statistics.median(t[way] / t["window"] for t in taken), 2)
    return found


def layer_ways(length: int, device: Device) -> Ways:
    """Attention alone, its mask made before: layers share it."""
    a = architecture_of(SLMConfig.from_preset(PRESET))
    local = a.layers[0]
    where = {"device": device.torch_device, "requires_grad": True}
    q = torch.randn(1, a.heads, length, a.head_dim, **where)
    k, v = (torch.randn(1, a.kv_heads, length, a.head_dim, **where) for _ in range(2))
    ids = torch.zeros(1, length, dtype=torch.long, device=device.torch_device)

    def view(layer: Layer) -> AttentionInputs:
        return Context({layer: 0}, {}, ids, cache=None, documents=None).inputs[0]

    views = {"window": view(Layer(window=local.window)), "full": view(Layer())}
    if length <= LONGEST_DENSE:
        with one_mask():
            views["mask"] = view(Layer(window=local.window))
    return {way: lambda seen=seen: attend(q, k, v, seen, a.attention_scale, None, 0.0) for way, seen in views.items()}


def model_ways(length: int, device: Device) -> Ways:
    """Six layers, and the same where all of them see the whole past."""
    sizes = {"num_hidden_layers": LAYERS, "vocab_size": 1_024}
    config = SLMConfig.from_preset(PRESET, **sizes)
    windowed = build_decoder(config, seed=0).to(device.torch_device)
    full = Decoder(replace(windowed.architecture, layers=windowed.architecture.layers[-1:] * LAYERS))
    full.load_state_dict(windowed.state_dict())
    full.to(device.torch_device)
    ids = torch.randint(1_024, (1, length), device=device.torch_device)

    def with_one_mask() -> torch.Tensor:
        with one_mask():
            return windowed(ids)

    return {"window": lambda: windowed(ids), "full": lambda: full(ids), "mask": with_one_mask}


MEASURED = {"layer": layer_ways, "model": model_ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="short texts, in seconds; writes nothing")
    parser.add_argument("--no-output", action="store_true")
    arguments = parser.parse_args()
    device = find_device("auto", "float32")
    result: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "what": f"{PRESET}, one row, float32, seconds, the ways in turn",
        "environment": environment() | device.describe(),
    }
    in_turn(layer_ways(64, device), 1, device, backward=True)  # what libraries load is none of the first way's
    for name, length, backward, rounds in SMOKE if arguments.smoke else CASES:
        key = f"{name}, {length} tokens, {'forward and backward' if backward else 'forward'}"
        found = in_turn(MEASURED[name](length, device), rounds, device, backward)
        result[key] = {"rounds": rounds, **found}
        print(key, result[key], flush=True)
        if not (arguments.smoke or arguments.no_output):
            RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
