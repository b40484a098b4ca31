"""Greedy decoding by slmkit, transformers and llama.cpp: the same weights, prompts and threads, in turn, in one run.

pip install xllamacpp gguf
python -m benchmarks.decode                # a quarter of an hour on two idle cores
python -m benchmarks.decode --quick        # a minute of one busy core, in processor time
python -m benchmarks.decode --only slmkit "llama.cpp Q8_0"     # some of them
python -m benchmarks.decode --only "slmkit int4" --profile     # where the time goes
python -m benchmarks.decode --draw docs/decode.png             # the chart of what was measured

A Llama of 46 M parameters with random weights. First the tokens: in float32 slmkit, transformers and llama.cpp must
write the same ones. Then in each round each of them writes 1 and 1 + n tokens: new tokens/s are of the difference,
prompt tokens/s of a prompt of 512 with one new token. Ratios are of one round, their medians and spread of all rounds.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import json
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.figures import spread
from slmkit.adapt.quantize import round_to, to_quantize
from slmkit.device import find_device, seconds_to_read
from slmkit.generation.engine import Engine, Request
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import load_decoder, save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.logging.metrics_log import environment
from slmkit.workflows.bench import GROUP, bytes_of_a_step

LLAMA_46M = {
    "vocab_size": 16_384,
    "hidden_size": 512,
    "intermediate_size": 1_536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16_640,
}
PROMPT, PREFILL = 32, 512
BATCHES = (1, 4, 16)
GROWTH = {"context": (64, 256, 1_024, 4_096, 16_384), "batch": (1, 2, 4, 8, 16, 32)}
TIE = 2e-3  # logits: llama.cpp's differ by up to half of it in float32; the two likeliest are 0.2 apart on average
BITS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # slmkit's names → llama.cpp's
NAMES = [
    *(f"slmkit {form}" for form in BITS),
    *(f"transformers {dtype} {way}" for dtype in ("float32", "bfloat16") for way in ("dynamic", "static", "compiled")),
    *(f"llama.cpp {form}" for form in BITS.values()),
]
QUICK = [name for name in NAMES if "transformers" not in name or name == "transformers float32 static"]
RESULTS = Path(__file__).parent / "results" / "decode.json"
Generate = Callable[[torch.Tensor, int], list[list[int]]]  # prompts [batch, prompt], count → new tokens [batch][count]


# -- the peers --------------------------------------------------------------------------------------------------------


def open_peer(name: str, directory: Path, sequences: int, length: int) -> Generate:
    """One of `NAMES`, with the weights of a model directory, for so many sequences of so many tokens."""
    side, form, *way = name.split()
    if side == "slmkit":
        return by_slmkit(slmkit_decoder(directory, form))
    if side == "transformers":
        return by_transformers(directory, form, way[0])
    from benchmarks.llama_cpp import LlamaCpp, write_gguf

    path = directory / f"{form}.gguf"
    write_gguf(load_file(directory / "model.safetensors"), SLMConfig.from_pretrained(directory), path, form)
    cache_type = "F32" if form == "F32" else "F16"
    return LlamaCpp(path, torch.get_num_threads(), sequences, length, cache_type).generate


def slmkit_decoder(directory: Path, form: str) -> Decoder:
    decoder = load_decoder(directory)[0]
    if form in ("int8", "int4"):
        round_to(decoder, to_quantize(decoder, form, GROUP, "int8"), GROUP)
        return decoder
    return decoder.to(getattr(torch, form))


def by_slmkit(decoder: Decoder) -> Generate:
    greedy = SamplingSettings(do_sample=False)

    def generate(ids: torch.Tensor, new: int) -> list[list[int]]:
        ids = ids.to(decoder.device)
        rows = generate_ids(decoder, ids, max_new_tokens=new, stop_ids=set(), settings=greedy, pad_token_id=0)
        return rows[:, ids.size(1) :].tolist()

    return generate


def by_transformers(directory: Path, dtype: str, way: str, device: str = "cpu") -> Generate:
    from transformers import AutoModelForCausalLM, CompileConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    anywhere = CompileConfig(mode="default")
    anywhere._compile_all_devices = True  # without it, only on accelerators
    options: dict[str, Any] = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "compiled": {"cache_implementation": "static", "compile_config": anywhere},
    }[way]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
    model.generation_config.eos_token_id = None

    def generate(ids: torch.Tensor, new: int) -> list[list[int]]:
        ids = ids.to(device)
        mask = torch.ones_like(ids)
        rows = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, **options)
        return rows[:, ids.size(1) :].tolist()

    return generate


def scaled_decoder(config: SLMConfig) -> Decoder:
    """Random weights under which every layer counts and the likeliest token is well ahead of the second."""
    decoder = build_decoder(config, seed=0).eval()
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    return decoder


def prompts(vocab_size: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch))


def expect_same_tokens(decoder: Decoder, peers: Mapping[str, Generate]) -> dict[str, str]:
    """How many rows of each float32 peer are the decoder's own, token by token.

    A row may leave them only where the two tokens' logits are nearly equal. Raises `ValueError` if another does.
    """
    ids, new, found = prompts(decoder.architecture.vocab_size, 8, 8), 24, {}
    expected = by_slmkit(decoder)(ids, new)
    with torch.inference_mode():
        texts = torch.cat((ids, torch.tensor(expected)), dim=1)
        logits = decoder.logits(decoder(texts)[:, 7:-1])  # [rows, new, vocab_size], without a cache
    if expected != logits.argmax(-1).tolist():
        raise ValueError("slmkit's tokens are not those of its whole forward pass")
    for name in (name for name in peers if "float32" in name or name.endswith(" F32")):
        rows = peers[name](ids, new)
        for row, (ours, theirs) in enumerate(zip(expected, rows)):
            at = next((i for i in range(new) if ours[i] != theirs[i]), None)
            if at is not None and logits[row, at, ours[at]] - logits[row, at, theirs[at]] > TIE:
                raise ValueError(f"{name}: token {at} of row {row} is {theirs[at]}, not {ours[at]}")
        found[name] = f"{sum(a == b for a, b in zip(expected, rows))} of {len(rows)} rows equal to the last token"
    return found


# -- what is measured -------------------------------------------------------------------------------------------------


def seconds(clock: Callable[[], float], generate: Generate, ids: torch.Tensor, new: int) -> float:
    started = clock()
    generate(ids, new)
    return clock() - started


def first_and_rest(clock: Callable[[], float], generate: Generate, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds of one new token, and of `new` more; measured again if another process disturbed the first."""
    while True:
        first = seconds(clock, generate, ids, 1)
        rest = seconds(clock, generate, ids, 1 + new) - first if new else 0.0
        if rest > 0 or new == 0:
            return first, rest


def in_turn(
    peers: Mapping[str, Generate], ids: torch.Tensor, new: int, rounds: int, budget: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Tokens per second of each peer in each round: new ones, or for `new` 0 the prompt's.

    `budget`: seconds by `clock`, in equal parts to all; a peer that has used up its own leaves after that round.
    """
    found: dict[str, list[float]] = {name: [] for name in peers}
    used = dict.fromkeys(peers, 0.0)
    for name, generate in peers.items():  # at first use they allocate and compile
        generate(ids, 1 + new if "compiled" in name else 1)
    for name, generate in [*peers.items()] * rounds:
        if used[name] > budget / len(peers):
            continue
        time.sleep(0.05)  # another library's threads stop spinning
        first, rest = first_and_rest(clock, generate, ids, new)
        used[name] += 2 * first + rest
        found[name].append(ids.size(0) * new / rest if new else ids.numel() / first)
    return found


def limits(names: list[str], directory: Path) -> dict[str, float]:
    """New tokens/s of one sequence if a step took only as long as reading its weights from memory, as measured here."""
    found = {}
    for side, form, *_ in (name.split() for name in names):
        gguf = directory / f"{form}.gguf"
        size = gguf.stat().st_size if side == "llama.cpp" else bytes_of_a_step(slmkit_decoder(directory, form))
        found[f"{side} {form}"] = round(1 / seconds_to_read(size, find_device("cpu")), 1)
    return found


def profile(generate: Generate, vocab_size: int, new: int) -> None:
    """Print where the time of a decoding step goes, by function."""
    ids = prompts(vocab_size, 1, PROMPT)
    generate(ids, 2)
    profiler = cProfile.Profile()
    profiler.runcall(generate, ids, new)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


Figures = dict[str, dict[str, list[float]]]  # what is measured → peer → tokens/s in each round


def ratios(figures: Figures) -> dict[str, dict[str, float]]:
    """Ratios of one round each, with their median and spread."""
    found: dict[str, dict[str, float]] = {}
    for what, rates in figures.items():
        for ours, theirs in BITS.items():
            if {f"slmkit {ours}", f"llama.cpp {theirs}"} <= rates.keys():
                pairs = zip(rates[f"slmkit {ours}"], rates[f"llama.cpp {theirs}"])
                found[f"{what}: slmkit {ours} / llama.cpp {theirs}"] = spread([a / b for a, b in pairs], 2)
        for side in ("slmkit", "transformers"):
            names = [name for name in rates if name.startswith(side)]
            best = max(names, key=lambda name: statistics.median(rates[name]), default="")
            if side == "slmkit":
                ours_best = best
            elif ours_best and best:
                pairs = zip(rates[ours_best], rates[best])
                found[f"{what}: {ours_best} / {best}, each one's best"] = spread([a / b for a, b in pairs], 2)
    many = f"batch {BATCHES[-1]}"
    for name, rates_of_one in figures.get("batch 1", {}).items():
        if many in figures:
            pairs = zip(figures[many][name], rates_of_one)
            found[f"{many} / batch 1: {name}"] = spread([a / b for a, b in pairs], 2)
    return found


def growth(decoder: Decoder, new: int) -> dict[str, dict[str, dict[str, float]]]:
    """New tokens/s of slmkit over the length of the context, one sequence, and over the batch, behind short prompts."""
    return {
        "context": {str(context): spread(step_rates(decoder, 1, context, new), 1) for context in GROWTH["context"]},
        "batch": {str(batch): spread(step_rates(decoder, batch, PROMPT, new), 1) for batch in GROWTH["batch"]},
    }


def step_rates(decoder: Decoder, batch: int, context: int, new: int) -> list[float]:
    """Tokens/s of each of `new` steps of the engine after all prompts were read."""
    engine, begun, found = Engine(decoder, max_rows=batch), set[int](), list[float]()
    for row in prompts(decoder.architecture.vocab_size, batch, context).tolist():
        engine.insert(Request(row, new + 1 + batch, SamplingSettings(do_sample=False)))
    while len(begun) < batch:
        begun |= {event.handle for event in engine.step()}
    for _ in range(new):
        started = time.perf_counter()
        events = engine.step()
        found.append(len(events) / (time.perf_counter() - started))
    return found


def machine() -> dict[str, Any]:
    flags: list[str] = []
    if (info := Path("/proc/cpuinfo")).exists():
        line = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
        flags = [flag for flag in line.split() if flag.startswith(("avx", "amx", "fma", "f16c"))]
    packages = {name: version(name) for name in ("transformers", "xllamacpp", "gguf")}
    return environment() | find_device("cpu").describe() | {"peers": packages, "cpu_flags": flags}


# -- what is shown ----------------------------------------------------------------------------------------------------


def print_figures(result: Mapping[str, Any]) -> None:
    rates = result["tokens_per_second"]
    names = list(dict.fromkeys(name for of in rates.values() for name in of))
    print(f"\n{'tokens/s, median of rounds':<36}" + "".join(f"{what:>12}" for what in rates) + f"{'memory limit':>14}")
    for name in names:
        row = [f"{rates[what][name]['median']:,.1f}" for what in rates]
        limit = result["limit_of_memory"][" ".join(name.split()[:2])]
        print(f"{name:<36}" + "".join(f"{value:>12}" for value in row) + f"{limit:>14,.0f}")
    print(f"\n{'ratio':<88}median   least    most")
    for name, ratio in result["ratios"].items():
        print(f"{name:<88}{ratio['median']:>6.2f}{ratio['least']:>8.2f}{ratio['most']:>8.2f}")
    for what, curve in result.get("growth", {}).items():
        print(f"\nslmkit over {what}: " + ", ".join(f"{at}: {rate['median']:,.1f}" for at, rate in curve.items()))


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Bars of tokens/s for each batch and the prompt, and slmkit's curves over context and batch."""
    from matplotlib.figure import Figure

    rates, curves = result["tokens_per_second"], result.get("growth", {})
    colors = {"slmkit": "tab:blue", "transformers": "tab:orange", "llama.cpp": "tab:green"}
    rows = -(-(len(rates) + len(curves)) // 3)
    figure = Figure(figsize=(13, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    for plot, (what, of) in zip(axes, rates.items()):
        names = list(of)[::-1]
        medians = [of[name]["median"] for name in names]
        apart = [[of[n]["median"] - of[n]["least"] for n in names], [of[n]["most"] - of[n]["median"] for n in names]]
        plot.barh(names, medians, xerr=apart, color=[colors[name.split()[0]] for name in names], ecolor="grey")
        plot.set(title=what, xlabel="tokens/s")
        plot.tick_params(axis="y", labelsize=7)
    for plot, (what, curve) in zip(axes[len(rates) :], curves.items()):
        plot.plot([int(at) for at in curve], [rate["median"] for rate in curve.values()], marker="o")
        plot.set(title=f"slmkit {result['growth_of']}", xlabel=what, ylabel="tokens/s", xscale="log", ylim=(0, None))
    for plot in axes:
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(alpha=0.25)
    figure.savefig(path, dpi=80)


def measure(arguments: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    """Yields the whole result after each part that was added to it."""
    config = SLMConfig(**LLAMA_46M)
    save_decoder(scaled_decoder(config), config, directory)
    quick, new, rounds = arguments.quick, arguments.new, arguments.rounds
    prompt, batches = (PROMPT // 4, (BATCHES[0], BATCHES[-1])) if quick else (PROMPT, BATCHES)
    names = [name for name in (QUICK if quick else NAMES) if name.startswith(tuple(arguments.only or [""]))]
    peers = {name: open_peer(name, directory, max(batches), max(PROMPT + new, PREFILL) + 32) for name in names}
    if arguments.profile:
        for name, generate in peers.items():
            print(name)
            profile(generate, config.vocab_size, new)
        return
    result: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "seconds": f"of processor, {torch.get_num_threads()} thread" if quick else "of the clock",
        "what": f"46 M parameters, prompt {prompt}, {new} new tokens, {rounds} rounds in turn; prefill of {PREFILL}",
        "machine": machine(),
        "load_average": [[round(load, 2) for load in os.getloadavg()]],
        "same_tokens": expect_same_tokens(load_decoder(directory)[0], peers),
        "limit_of_memory": limits(names, directory),
    }
    figures: Figures = {}
    parts = {f"batch {batch}": (prompts(config.vocab_size, batch, prompt), new) for batch in batches}
    parts["prefill"] = prompts(config.vocab_size, 1, PREFILL), 0
    budget, clock = (8, time.process_time) if quick else (150, time.perf_counter)
    for what, (ids, count) in parts.items():
        print(f"{what} …", flush=True)
        figures[what] = in_turn(peers, ids, count, rounds, budget, clock)
        rates = {what: {name: spread(values, 1) for name, values in of.items()} for what, of in figures.items()}
        result["load_average"].append([round(load, 2) for load in os.getloadavg()])
        result |= {"tokens_per_second": rates, "ratios": ratios(figures)}
        yield result
    forms = [name.split()[1] for name in names if name.startswith("slmkit")]
    if forms and not quick:
        yield result | {"growth_of": forms[0], "growth": growth(slmkit_decoder(directory, forms[0]), 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="for a busy machine: processor time of one thread, few tokens"
    )
    parser.add_argument("--only", nargs="+", metavar="PEER", help="names as in the table, or how they begin")
    parser.add_argument("--new", type=int, help="new tokens; default: 64, with --quick 16")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="only print where the time goes, by function")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="only draw what was measured")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/decode.json, with --quick none")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads((arguments.out or RESULTS).read_text()), arguments.draw)
        return
    arguments.new = arguments.new or (16 if arguments.quick else 64)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    torch.set_num_threads(1 if arguments.quick else arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        for result in measure(arguments, Path(directory)):
            if path := arguments.out or (None if arguments.quick else RESULTS):
                path.write_text(json.dumps(result, indent=2) + "\n")
    if not arguments.profile:
        print_figures(result)


if __name__ == "__main__":
    main()
