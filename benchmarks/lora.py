"""What an adapter saves and what it costs: full fine-tuning, LoRA, rsLoRA, DoRA, and LoRA on a base in fewer bits.

python -m benchmarks.lora            # some ten minutes on two cores
python -m benchmarks.lora --smoke    # a minute, at a size that says nothing

A model is trained on stories for a while; then each method teaches it the conversations about them, the same steps on
the same rows, each time in a process of its own, in turn. Memory is the most that the process held, less what it held
before the model was there; the loss is that of conversations which were not trained on.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import spread
from slmkit.adapt.adapter import AdapterFiles, trained_tensors
from slmkit.adapt.load import start_adapter
from slmkit.data import stories
from slmkit.data.rows.datasets import TextDataset
from slmkit.data.stream import Stream
from slmkit.device import find_device, keep_freed_memory, peak_memory, reset_peak_memory, resident_memory
from slmkit.evaluation import validation_loss
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.files.directory import load_decoder, save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import Plan, State, train, train_step
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import OPTIMIZERS
from slmkit.training.recipe.recipe import TrainSettings

RESULTS = Path(__file__).parent / "results" / "lora.json"
TOKENIZER = SLMTokenizer(260)
METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora, base in bfloat16": {"base_weights": "bfloat16"},
    "lora, base in int8": {"base_weights": "int8"},
    "lora, base in nf4": {"base_weights": "nf4"},
}
RANK = {"r": 16, "lora_alpha": 32}
RATES = {"full": 5e-4, "others": 4e-3}
# Rows of a step, steps before and of the tuning, rounds.
WHOLE = {"width": 512, "depth": 8, "length": 256, "rows": 8, "before": 300, "steps": 60, "rounds": 2}
SMOKE = {"width": 64, "depth": 2, "length": 64, "rows": 4, "before": 10, "steps": 6, "rounds": 1}


def shape(size: dict[str, int]) -> SLMConfig:
    return SLMConfig(
        vocab_size=260, hidden_size=size["width"], intermediate_size=size["width"] * 11 // 4,
        num_hidden_layers=size["depth"], num_attention_heads=size["width"] // 32,
        max_position_embeddings=size["length"],
    )  # fmt: skip


def rows_of(kind: str, count: int, seed: int, length: int) -> TextDataset:
    """Stories, or conversations about them as text."""
    if kind == "stories":
        texts = [story.text for story in stories.tell_many(seed, count)]
    else:
        talks = (stories.conversation(seed, index) for index in range(count))
        texts = ["\n".join(f"{turn['role']}: {turn['content']}" for turn in talk) for talk in talks]
    return TextDataset(texts, TOKENIZER, max_length=length)


def learner(model: Decoder, rate: float) -> State:
    return State(model, OPTIMIZERS["adamw"](model, TrainSettings(learning_rate=rate, weight_decay=0.0)))


def make_base(directory: Path, size: dict[str, int]) -> None:
    state = learner(build_decoder(shape(size)), 1e-3)
    stream = Stream(rows_of("stories", size["before"] * 4, 0, size["length"]), size["rows"])
    train(state, next_token, stream, plan(size["before"], size))
    save_decoder(state.model, shape(size), directory)


def plan(steps: int, size: dict[str, int]) -> Plan:
    return Plan(steps, size["rows"], 1.0, lambda step: min(1.0, (step + 1) / 10), find_device("cpu"))


def tune(method: str, base: Path, size: dict[str, int]) -> dict[str, float]:
    """One method, in this process."""
    keep_freed_memory()
    held_out = rows_of("conversations", 40, 1, size["length"])
    stream = Stream(rows_of("conversations", size["steps"] * 4, 0, size["length"]), size["rows"])
    device, settings = find_device("cpu"), METHODS[method]
    before = resident_memory()
    reset_peak_memory(device)
    if settings is None:
        model, config = load_decoder(base)
        rate = RATES["full"]
    else:
        chosen = LoRASettings(**(RANK | settings))
        model, config, _ = start_adapter(base, chosen)
        rate = RATES["others"]
    first = validation_loss(model, held_out, device).loss
    state, seconds = learner(model, rate), []
    for step in range(size["steps"]):
        started = time.perf_counter()
        train_step(state, next_token, stream.batch(step), plan(size["steps"], size))
        seconds.append(time.perf_counter() - started)
    last = validation_loss(model, held_out, device).loss
    with tempfile.TemporaryDirectory() as folder:
        if settings is None:
            save_decoder(model, config, folder)
        else:
            AdapterFiles(config, chosen, base).write(model, trained_tensors(model), Path(folder))
        disk = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "trained_parameters": sum(tensor.numel() for tensor in trained_tensors(model).values()),
        "tokens_per_second": size["rows"] * size["length"] / statistics.median(seconds[2:]),
        "peak_mebibytes": max(0, peak_memory(device) - before) / 2**20,
        "disk_mebibytes": disk / 2**20,
        "loss_before": first,
        "loss_after": last,
    }


def main() -> None:
    size = SMOKE if "--smoke" in sys.argv else WHOLE
    if "--method" in sys.argv:
        method, base = sys.argv[sys.argv.index("--method") + 1 :][:2]
        print(json.dumps(tune(method, Path(base), size)))
        return
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), size)
        for _, method in itertools.product(range(size["rounds"]), METHODS):
            command = [sys.executable, "-m", "benchmarks.lora", "--method", method, folder, *sys.argv[1:]]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[method].append(json.loads(done.stdout))
            print(method, {name: round(value, 3) for name, value in found[method][-1].items()}, flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "what": f"{size['steps']} steps of {size['rows']} × {size['length']} tokens, {size['rounds']} rounds in turn",
        "environment": environment() | find_device("cpu").describe(),
        "parameters": sum(p.numel() for p in build_decoder(shape(size)).parameters()),
        "settings": RANK | {"learning_rate": RATES},
        "methods": {
            method: {name: spread([round_[name] for round_ in rounds]) for name in rounds[0]}
            for method, rounds in found.items()
        },
    }
    print(json.dumps(result["methods"], indent=2))
    if "--no-output" not in sys.argv and size is WHOLE:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
