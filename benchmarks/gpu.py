"""The presets' recipes on this machine: real steps on the built-in stories, tokens a second, memory and MFU.

python -m benchmarks.gpu                  # all in some ten minutes, on a CUDA device; nothing is downloaded
python -m benchmarks.gpu parity           # the parity tests that need a GPU, alone
python -m benchmarks.gpu decode           # generation alone: 1.24 B in bfloat16, beside transformers, in a minute
python -m benchmarks.gpu --smoke          # seconds, on any machine, with small shapes
python -m benchmarks.gpu --rows 4 --out benchmarks/results/presets-cpu.json     # anywhere, in small steps

Optimizer, schedule, precision, batch and length are each recipe's own; the text and its tokenizer are not: token ids of
the stories, spread over the preset's whole vocabulary, so that embedding and loss do the work of the real one. Beside
each recipe, transformers and a plain loop, compiled, with autocast to bfloat16 and fused AdamW, take steps of as many
tokens from the same weights, in the largest micro-batch up to slmkit's that fits; there is no dropout in any of them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks.decode import by_slmkit, by_transformers, in_turn, prompts, scaled_decoder
from benchmarks.figures import spread
from benchmarks.runs import Quiet
from benchmarks.training import OPTIMIZER
from benchmarks.training_worker import by_loop
from slmkit.config import UserError
from slmkit.data.prepare.corpus import DataSettings, TokenizerSettings, build_corpus
from slmkit.data.stream import PretrainRows, Stream
from slmkit.device import Device, find_device, measured_peak, peak_memory, reset_peak_memory, seconds_to_read
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.model.sizes import flops_per_token
from slmkit.training.estimate.memory import MemoryProfile, meta_model_of
from slmkit.training.estimate.micro_batch import resolve_micro_batch
from slmkit.training.fit import fresh_state, make_plan
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import Every, Report, State, StopRequested, train
from slmkit.training.objective import next_token
from slmkit.training.recipe.recipe import Recipe, TrainSettings, find_recipe, load_recipe
from slmkit.workflows.bench import bytes_of_a_step

# What their own documents claim, as far as they do.
CLAIMS = {"gemma-3-270m": "0.3 s an iteration of 32 × 128 tokens and 12 GB, on a T4"}
PRESETS = ("vector-slm", "vector-clm-50m", "llama-3.2-1b", "gemma-3-270m", "smallm-60m")
PARITY = "parity"  # tests/parity/test_cuda.py
DECODE = "decode"  # greedy generation with the weights of the preset below, random ones
DECODED, BATCHES, PROMPT, NEW, ROUNDS = "llama-3.2-1b", (1, 4, 16), 64, 256, 5
SMOKE = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMOKE_OF = {"gemma-3-270m": {"head_dim": 16, "num_key_value_heads": 1}, "smallm-60m": {}}
SMOKE_REST = {"num_key_value_heads": 1, "intermediate_size": 64}
RESULTS = Path(__file__).parent / "results" / "gpu.json"


class Spread(PretrainRows):
    """Rows whose ids are spread over a larger vocabulary, by a prime."""

    vocab_size: int

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = super().row(index)
        return ids * 65_537 % self.vocab_size, labels * 65_537 % self.vocab_size

    def rows(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = super().rows(indices)
        return ids * 65_537 % self.vocab_size, labels * 65_537 % self.vocab_size


def stories(length: int, vocab_size: int, folder: Path, documents: int) -> PretrainRows:
    data = DataSettings(source="stories", documents=documents, validation_documents=5)
    corpus = build_corpus("text", data, TokenizerSettings(vocab_size=2_048), 0, folder, None, Quiet())
    rows = Spread(corpus.train[0], length)
    rows.vocab_size = vocab_size
    return rows


def steps_of(
    preset: str, seconds: float, smoke: bool, rows_per_step: int | None, overrides: Sequence[str]
) -> dict[str, object]:
    """Take a recipe's steps for `seconds`, after two that warm up and compile; or steps of so many rows."""
    recipe: Recipe = load_recipe(find_recipe(preset), overrides)
    changes = SMOKE | SMOKE_OF.get(preset, SMOKE_REST) if smoke else {}
    config = SLMConfig.from_preset(preset, **changes, hidden_dropout=0.0, attention_dropout=0.0)
    settings = recipe.train
    length = 32 if smoke else settings.sequence_length or config.max_position_embeddings
    if smoke:
        settings = settings.model_copy(update={"tokens_per_step": 256, "micro_batch_tokens": "auto"})
    elif rows_per_step:
        tokens = rows_per_step * length
        settings = settings.model_copy(update={"tokens_per_step": tokens, "micro_batch_tokens": tokens})
    device = find_device(settings.device, settings.precision)
    model = build_decoder(config, recipe.seed)
    settings = resolve_micro_batch(settings, MemoryProfile(meta_model_of(model)), length, device)
    recipe = recipe.model_copy(update={"train": settings})
    state: State = fresh_state(recipe, model, device)
    plan = make_plan(settings, 10**6, length, device)
    reports: list[Report] = []
    stop, began = StopRequested(), time.perf_counter()

    def note(state: State, report: Report) -> None:
        nonlocal began
        if state.step == 2:
            began = time.perf_counter()
            reset_peak_memory(device)
        reports.append(report | {"seconds": time.perf_counter()})
        stop.is_set = state.step > 3 and time.perf_counter() - began > seconds

    with tempfile.TemporaryDirectory() as folder:
        rows = stories(length, config.vocab_size, Path(folder), 50 if smoke else 5_000)
        stream = Stream(rows, settings.rows_per_step(length), recipe.seed)
        train(state, next_token, stream, plan, [Every(1, note)], stop)
    times = [later["seconds"] - earlier["seconds"] for earlier, later in itertools.pairwise(reports[1:])]
    rate = settings.rows_per_step(length) * length / statistics.median(times)
    figures: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "changed": [*overrides],
        "optimizer": settings.optimizer,
        "steps": state.step,
        "tokens_per_step": settings.rows_per_step(length) * length,
        "micro_batch": [settings.rows_per_micro_batch(length), length],
        "seconds_per_step": round(statistics.median(times), 4),
        "seconds_per_micro_batch": round(settings.rows_per_micro_batch(length) * length / rate, 4),
        "tokens_per_second": round(rate),
        "peak_memory_gib": round(peak_memory(device) / 2**30, 2),
        "mfu": round(rate * 3 * flops_per_token(model.architecture, length).forward / measured_peak(device), 3),
        "first_and_last_loss": [round(reports[0]["loss"], 3), round(reports[-1]["loss"], 3)],
        "claimed": CLAIMS.get(preset),
        "device": device.describe(),
    }
    del model, state  # before the peers' memory is measured
    torch._dynamo.reset()
    return figures | {"peers": by_peers(config, settings, length, device, seconds)}


def by_peers(
    config: SLMConfig, settings: TrainSettings, length: int, device: Device, seconds: float
) -> dict[str, object]:
    """Speed and memory of transformers and of the plain loop, compiled, with steps of as many tokens."""
    rows = settings.rows_per_step(length)
    ids = torch.randint(config.vocab_size, (8, rows, length + 1), generator=torch.Generator().manual_seed(0))
    found: dict[str, object] = {}
    for peer in ("transformers", "plain"):
        if config.model_type not in ("gpt2", "llama") if peer == "plain" else not find_spec("transformers"):
            continue
        micro_batch, times, losses = settings.rows_per_micro_batch(length), list[float](), list[float]()
        with tempfile.TemporaryDirectory() as folder:
            save_decoder(build_decoder(config, seed=0), config, folder)
            while not times:
                reset_peak_memory(device)
                spec = {
                    "peer": peer, "model": folder, "device": str(device.torch_device), "micro_batch": micro_batch,
                    "compile": device.torch_device.type == "cuda", "precision": "bfloat16", "optimizer": OPTIMIZER,
                    "max_grad_norm": 1.0, "limit": seconds,
                }  # fmt: skip
                try:
                    losses, times = by_loop(spec, ids)
                except torch.OutOfMemoryError:
                    if micro_batch == 1:
                        break
                    micro_batch //= 2
        torch._dynamo.reset()
        if times:
            found[peer] = {
                "tokens_per_second": round(rows * length / statistics.median(times[1:] or times)),
                "micro_batch": [micro_batch, length],
                "peak_memory_gib": round(peak_memory(device) / 2**30, 2),
                "first_and_last_loss": [round(losses[0], 3), round(losses[-1], 3)],
            }
        else:
            found[peer] = {"failed": "out of memory with one row at once"}
    return found


def parity() -> dict[str, object]:
    """The result of the parity tests that need a GPU."""
    tests = Path(__file__).parents[1] / "tests" / "parity" / "test_cuda.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", tests], capture_output=True, text=True
    )
    return {"passed": done.returncode == 0, "pytest": done.stdout.strip().splitlines()[-1]}


def decoding(smoke: bool) -> dict[str, object]:
    """New tokens/s of slmkit and of transformers' `generate`, in turn, and the share of what the memory allows.

    A step cannot take less time than reading the weights does, which is measured.
    """
    if not (smoke or torch.cuda.is_available()):
        raise UserError("decode: measured on a CUDA device; benchmarks/decode.py is the benchmark for CPUs")
    config = SLMConfig.from_preset(DECODED, **(SMOKE | SMOKE_REST if smoke else {}))
    device, (new, rounds) = find_device("auto", "bfloat16-pure"), (4, 1) if smoke else (NEW, ROUNDS)
    decoder = scaled_decoder(config).to(torch.bfloat16)
    peers = {"slmkit": by_slmkit(decoder)}
    if find_spec("transformers"):
        with tempfile.TemporaryDirectory() as directory:
            save_decoder(decoder, config, directory)
            peers["transformers"] = by_transformers(Path(directory), "bfloat16", "dynamic", str(device.torch_device))
    decoder.to(device.torch_device)
    a_step = seconds_to_read(bytes_of_a_step(decoder), device)
    found: dict[str, object] = {
        "what": f"{DECODED} in bfloat16, prompt {PROMPT}, {new} new tokens, {rounds} rounds in turn",
        "read_terabytes_per_second": round(bytes_of_a_step(decoder) / a_step / 1e12, 2),
        "device": device.describe(),
    }
    for batch in BATCHES:
        ids = prompts(config.vocab_size, batch, PROMPT)
        rates = in_turn(peers, ids, new, rounds, 60, time.perf_counter)
        found[f"batch {batch}"] = {
            "tokens_per_second": {name: spread(each, 1) for name, each in rates.items()},
            "share_of_limit": {name: spread([rate * a_step / batch for rate in each]) for name, each in rates.items()},
            "times_as_fast": {
                name: spread([a / b for a, b in zip(rates["slmkit"], each)], 2) for name, each in rates.items()
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=[*PRESETS, PARITY, DECODE], help="of them")
    parser.add_argument("--seconds", type=float, default=10.0, help="of steps, of a preset and of each peer")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: only to see that it runs")
    parser.add_argument("--rows", type=int, help="of a step and of its micro-batch, where the recipe's are too many")
    parser.add_argument("--override", action="append", default=[], help="of the recipes, such as train.precision=…")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not (arguments.smoke or arguments.rows) and not torch.cuda.is_available():
        parser.error("no CUDA device here: --rows takes small steps, --smoke runs everything at tiny sizes")
    found: dict[str, object] = {}
    for preset in arguments.presets:
        try:
            seconds = 1.0 if arguments.smoke else arguments.seconds
            if preset == DECODE:
                found[preset] = decoding(arguments.smoke)
            elif preset == PARITY:
                found[preset] = parity()
            else:
                found[preset] = steps_of(preset, seconds, arguments.smoke, arguments.rows, arguments.override)
        except UserError as error:  # out of memory, or an extra that is missing: the others go on
            found[preset] = {"failed": str(error)}
        print(preset, json.dumps(found[preset]), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not arguments.smoke:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        if arguments.out.exists():  # on a CPU one process each, so that none's memory counts among another's
            found = json.loads(arguments.out.read_text())["presets"] | found
        content = {"date": datetime.date.today().isoformat(), "environment": environment(), "presets": found}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
