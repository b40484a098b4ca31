"""What merging takes: seconds and memory of each method, on models much larger than that.

python -m benchmarks.merging [--megabytes 1000]        # some minutes; needs four times as much room on disk

Each merge runs in a process of its own, which asks the kernel for its peak of memory, less what it held when all models
had been opened and compared. A copy of a model in float32 would be twice the file of a model in bfloat16.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from slmkit.model.config import SLMConfig
from slmkit.model.families import family_of
from slmkit.model.files.directory import WEIGHTS, empty_decoder, stored_names
from slmkit.model.files.stored import write_tensors
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.logging.metrics_log import environment

RESULTS = Path(__file__).parent / "results" / "merging.json"
ROUNDS = 3
RECIPES = {
    "linear": {"merge_method": "linear"},
    "slerp": {"merge_method": "slerp"},
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "ties": {"merge_method": "ties", "density": 0.5},
    "dare_linear": {"merge_method": "dare_linear", "density": 0.5},
    "dare_ties": {"merge_method": "dare_ties", "density": 0.5},
}
MEASURED = """
import sys, time
from slmkit.adapt.merge_recipe import load_merge_recipe
from slmkit.workflows.merge import prepare_merge, write_merge
import torch
torch.set_num_threads(1)
def memory(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
prepared = prepare_merge(load_merge_recipe(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew; getrusage's includes that of the parent process
before, started = memory("VmRSS"), time.perf_counter()
write_merge(prepared)
print(time.perf_counter() - started, memory("VmHWM") - before)
"""


def write_model(directory: Path, layers: int, seed: int) -> None:
    """Llama's shapes at a width of 2,048 in bfloat16: 11 MB to a matrix, and to the embedding of 260 tokens less."""
    config = SLMConfig(
        vocab_size=260, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4,
    )  # fmt: skip
    directory.mkdir()
    config.save_pretrained(directory)
    SLMTokenizer(260).save_pretrained(directory)
    sizes = {name: tuple(tensor.shape) for name, tensor in empty_decoder(config).state_dict().items()}
    names = {theirs: ours for theirs, (ours,) in stored_names(sizes, family_of(config.model_type)).items()}
    generator = torch.Generator().manual_seed(seed)
    write_tensors(
        directory / WEIGHTS,
        {theirs: (sizes[ours], torch.bfloat16) for theirs, ours in names.items()},
        ((theirs, torch.randn(sizes[ours], generator=generator).bfloat16()) for theirs, ours in names.items()),
    )


def measure(folder: Path, recipe: dict[str, object]) -> tuple[float, int]:
    """Seconds, and bytes held at the peak beyond what was held before."""
    density = {"density": recipe["density"]} if "density" in recipe else {}
    content = {
        "models": [{"model": str(folder / name)} | density for name in ("a", "b")],
        "output_dir": str(folder / "out"),
        "merge_method": recipe["merge_method"],
    }
    if recipe["merge_method"] not in ("linear", "slerp"):
        content["base_model"] = str(folder / "base")
    (folder / "merge.yaml").write_text(json.dumps(content))
    command = [sys.executable, "-c", MEASURED, str(folder / "merge.yaml")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(folder / "out")
    seconds, held = done.stdout.split()
    return float(seconds), int(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of a model's file")
    parser.add_argument("--no-output", action="store_true")
    arguments = parser.parse_args()
    layers = max(1, round(arguments.megabytes / 88))  # a layer has 88 MB
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, model in enumerate(("base", "a", "b")):
            write_model(folder / model, layers, seed)
        size = (folder / "a" / WEIGHTS).stat().st_size
        measured: dict[str, list[tuple[float, int]]] = {method: [] for method in RECIPES}
        for _ in range(ROUNDS):
            for method, recipe in RECIPES.items():
                measured[method].append(measure(folder, recipe))
                print(method, measured[method][-1], flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "what": f"two models of {size / 1e6:,.0f} MB in bfloat16 merged, {ROUNDS} rounds in turn, one thread",
        "environment": environment(),
        "largest_tensor_in_float32_MB": round(2048 * 5632 * 4 / 1e6, 1),
        "methods": {
            method: {
                "seconds": sorted(round(seconds, 1) for seconds, _ in rounds),
                "held_at_the_peak_MB": sorted(round(held / 1e6) for _, held in rounds),
            }
            for method, rounds in measured.items()
        },
    }
    print(json.dumps(result, indent=2))
    if not arguments.no_output:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
