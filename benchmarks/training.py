"""Training by slmkit, transformers, litgpt and a plain loop: the same weights, batches and AdamW, in turn, in one run.

pip install litgpt                                            # in an environment of its own
python -m benchmarks.training --litgpt-python PATH            # a quarter of an hour on two idle cores
python -m benchmarks.training "Llama 46M" --rounds 1          # one of the works, a short run
python -m benchmarks.training --small                         # a minute: small shapes, nothing is stored
python -m benchmarks.training --add                           # further rounds beside those that are stored
python -m benchmarks.training --profile slmkit plain           # where the time of a step goes, by operation
python -m benchmarks.training --write                         # the chart and the tables of docs/performance.md

First the losses: ten steps of a few short rows must give every configuration the same losses, within a tolerance, or it
gets no figures. Then, in each round, each configuration takes some steps of the work in a fresh process, whose peak
memory is measured, too. The first step, which allocates and compiles, is left out of the speed and shown separately.
Ratios are of one round; the median and spread of all rounds are given.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.figures import PERFORMANCE, spread, write_tables
from slmkit.device import multiplies_in_bfloat16
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.model.sizes import parameter_count
from slmkit.training.logging.metrics_log import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "training.json"
OPTIMIZER = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
CHECKED_STEPS, CHECKED_ROWS, CHECKED_LENGTH = 10, 1, 32
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative differences of losses


@dataclass(frozen=True)
class Work:
    """A model and the batch of a step."""

    config: dict[str, Any]
    rows: int
    length: int

    def small(self) -> Work:
        tiny = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        if "intermediate_size" in self.config:
            tiny |= {"intermediate_size": 128, "num_key_value_heads": 1}
        return Work(self.config | tiny, 2, 64)


WORKS = {
    "Llama 46M": Work(
        {
            "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1_536, "num_hidden_layers": 12,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
        },
        8,
        512,
    ),
    "GPT 30M": Work(
        {
            "model_type": "gpt2", "vocab_size": 50_257, "hidden_size": 384, "num_hidden_layers": 6,
            "num_attention_heads": 6, "max_position_embeddings": 128,
        },
        32,
        128,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    peer: str
    compile: bool = False
    precision: str = "float32"

    @property
    def name(self) -> str:
        return self.peer + " compiled" * self.compile + " bfloat16" * (self.precision == "bfloat16")

    def why_not(self, work: Work, litgpt_python: str | None) -> str | None:
        """Why this configuration cannot be measured here; None if it can."""
        if self.precision == "bfloat16" and not multiplies_in_bfloat16(torch.device("cpu")):
            return "this processor has no bfloat16 units"
        if self.peer == "transformers" and find_spec("transformers") is None:
            return "transformers is not installed"
        if self.peer == "litgpt" and litgpt_python is None:
            return "no --litgpt-python"
        if self.peer == "litgpt" and work.config.get("model_type") == "gpt2":
            return "litgpt has no learned positions"
        return None


CONFIGURATIONS = {
    each.name: each
    for precision in ("float32", "bfloat16")
    for peer in ("slmkit", "transformers", "litgpt", "plain")
    for compiled in (False, True)
    for each in [Configuration(peer, compiled, precision)]
}
REFERENCE = "plain"  # whose losses the others must have


class Suite:
    """A work's model directory and batches on disk, and the processes that train it."""

    def __init__(self, work: Work, folder: Path, threads: int, litgpt_python: str | None) -> None:
        self.work, self.folder, self.threads, self.litgpt_python = work, folder, threads, litgpt_python
        config = SLMConfig(**work.config, attention_dropout=0.0, hidden_dropout=0.0)
        decoder = build_decoder(config, seed=0)
        self.parameters = parameter_count(decoder.architecture)
        save_decoder(decoder, config, folder)
        self.write_batches("whole", work.rows, work.length, 8)
        self.write_batches("short", CHECKED_ROWS, min(CHECKED_LENGTH, work.length), CHECKED_STEPS)

    def write_batches(self, name: str, rows: int, length: int, steps: int) -> None:
        """Token ids [steps, rows, length + 1], as often as words of a text are, so that there is something to learn."""
        frequencies = 1 / (1 + torch.arange(self.work.config["vocab_size"]))
        drawn = torch.Generator().manual_seed(1)
        ids: Tensor = frequencies.multinomial(steps * rows * (length + 1), replacement=True, generator=drawn)
        save_file({"ids": ids.view(steps, rows, length + 1)}, self.folder / f"{name}.safetensors")

    def run(self, configuration: Configuration, batches: str, steps: int, profile: bool = False) -> dict[str, Any]:
        """Losses, seconds of every step and peak memory of some steps in a process of its own."""
        spec = {
            "peer": configuration.peer, "compile": configuration.compile, "precision": configuration.precision,
            "model": str(self.folder), "batches": str(self.folder / f"{batches}.safetensors"), "steps": steps,
            "threads": self.threads, "device": "cpu", "optimizer": OPTIMIZER,
            # Peers take all rows at once unless they are told otherwise; slmkit chooses by itself.
            "micro_batch": None if configuration.peer == "slmkit" else self.work.rows,
            "max_grad_norm": 1.0, "profile": profile,
        }  # fmt: skip
        path = self.folder / "spec.json"
        path.write_text(json.dumps(spec))
        python = self.litgpt_python if configuration.peer == "litgpt" else sys.executable
        done = subprocess.run(
            [str(python), HERE / "training_worker.py", path], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{configuration.name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        return json.loads(done.stdout.splitlines()[-1])


def farthest(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def check(suite: Suite, chosen: list[Configuration]) -> dict[str, float]:
    """Differences of each configuration's ten losses from the plain loop's."""
    expected = suite.run(CONFIGURATIONS[REFERENCE], "short", CHECKED_STEPS)["losses"] if chosen else []
    found = {}
    for each in chosen:
        losses = suite.run(each, "short", CHECKED_STEPS)["losses"]
        found[each.name] = farthest(losses, expected)
        print(f"{each.name}: losses {losses[0]:.4f} … {losses[-1]:.4f}, differ by {found[each.name]:.1e}", flush=True)
    return found


def one_round(suite: Suite, chosen: list[Configuration], steps: int) -> dict[str, dict[str, Any]]:
    """Speed and memory of every configuration, in turn; their losses must be alike here, too."""
    found = dict[str, dict[str, Any]]()
    for each in chosen:
        measured = suite.run(each, "whole", 1 + steps)
        found[each.name] = {
            "seconds_per_step": round(statistics.median(measured["seconds"][1:]), 4),
            "first_step_seconds": round(measured["seconds"][0], 2),
            "peak_gib": round(measured["peak_bytes"] / 2**30, 3),
            "losses": measured["losses"],
        }
        difference = farthest(measured["losses"], next(iter(found.values()))["losses"])
        if difference > TOLERANCE[each.precision]:
            raise ValueError(f"{each.name}: losses differ by {difference:.1e} in the timed steps")
        print(each.name, {key: value for key, value in found[each.name].items() if key != "losses"}, flush=True)
    return found


def profiled(suite: Suite, name: str) -> dict[str, float]:
    """Shares of operations in two steps."""
    shares = suite.run(CONFIGURATIONS[name], "whole", 2, profile=True)["profile"]
    print(f"{name}:", *(f"{share:6.1%} {operation}" for operation, share in shares.items()), sep="\n  ", flush=True)
    return shares


def summary(rounds: list[dict[str, dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """Medians and spread of all rounds, and ratios to slmkit's best configuration of each round."""
    names = [name for name in CONFIGURATIONS if any(name in one for one in rounds)]
    figures: dict[str, Any] = {}
    for name in names:
        of_name = [one for one in rounds if name in one]
        ratios = [
            one[name]["seconds_per_step"] / min(s["seconds_per_step"] for n, s in one.items() if n.startswith("slmkit"))
            for one in of_name
            if any(n.startswith("slmkit") for n in one)
        ]
        figures[name] = {
            "tokens_per_second": spread([tokens / one[name]["seconds_per_step"] for one in of_name], 1),
            "peak_gib": spread([one[name]["peak_gib"] for one in of_name], 2),
            "first_step_seconds": spread([one[name]["first_step_seconds"] for one in of_name], 1),
            "slmkit_is_faster_by": spread(ratios, 2) if ratios else None,
        }
    return figures


def print_table(figures: dict[str, Any]) -> None:
    """Medians of every configuration."""
    for name, of_name in figures.items():
        rate, memory, ratio = (of_name[key] for key in ("tokens_per_second", "peak_gib", "slmkit_is_faster_by"))
        faster = "" if ratio is None else f", slmkit's best is {ratio['median']} times as fast"
        print(f"{name}: {rate['median']:,} tokens/s, {memory['median']} GiB{faster}")


def write(results: dict[str, Any]) -> None:
    """The tables of the page on performance, and its chart."""
    lines = list[str]()
    for name, work in results["works"].items():
        if not work.get("figures"):
            continue
        threads, count = work["threads"], len(work["rounds"])
        lines += [
            *[""] * bool(lines),
            f"{name}, {work['parameters']:,} parameters, {work['rows']} x {work['length']} tokens a step, "
            f"{threads} threads, rounds: {count}, timed steps in each: {work['steps_of_a_round']}, {results['date']}:",
            "",
            "| configuration | tokens/s | peak memory, GiB | first step, s | slmkit's best is faster by "
            "| ten losses differ by |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for each, found in work["figures"].items():
            rate, memory, first = (found[key] for key in ("tokens_per_second", "peak_gib", "first_step_seconds"))
            ratio, difference = found["slmkit_is_faster_by"], work["losses_differ_by"][each]
            lines.append(
                f"| {each} | {rate['median']:,.0f} ({rate['least']:,.0f} to {rate['most']:,.0f}) | {memory['median']} "
                f"| {first['median']} | {'' if ratio is None else ratio['median']} | {difference:.0e} |"
            )
    write_tables(PERFORMANCE, "training", lines)
    draw(results, PERFORMANCE.parent / "training-speed.png")


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens a second and peak memory of every configuration, a row of plots for each work."""
    from matplotlib.figure import Figure

    works = {name: work for name, work in results["works"].items() if work.get("figures")}
    figure = Figure(figsize=(9, 2.6 * len(works)), layout="constrained")
    for axes, (name, work) in zip(figure.subplots(len(works), 2, squeeze=False), works.items()):
        names = [*work["figures"]][::-1]
        colors = ["tab:blue" if each.startswith("slmkit") else "tab:gray" for each in names]
        for axis, key, unit in zip(axes, ("tokens_per_second", "peak_gib"), ("tokens/s", "peak memory, GiB")):
            measured = [work["figures"][each][key] for each in names]
            medians = [each["median"] for each in measured]
            errors = [[m["median"] - m["least"] for m in measured], [m["most"] - m["median"] for m in measured]]
            axis.barh(names, medians, color=colors, xerr=errors)
            axis.set(xlabel=unit, title=name)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)


def measure(name: str, work: Work, arguments: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    """The work's entry of the results; `before` is the one that stands."""
    chosen = []
    for each in (CONFIGURATIONS[wanted] for wanted in arguments.only):
        if (reason := each.why_not(work, arguments.litgpt_python)) is None:
            chosen.append(each)
        else:
            print(f"{each.name} is left out: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(work, Path(folder), arguments.threads, arguments.litgpt_python)
        print(f"{name}: {suite.parameters:,} parameters, {work.rows} x {work.length} tokens a step", flush=True)
        if arguments.profile:
            for each in arguments.profile:
                before = before | {"profiles": before.get("profiles", {}) | {each: profiled(suite, each)}}
            return before
        differences = dict(before.get("losses_differ_by", {}))
        differences |= check(suite, [each for each in chosen if each.name not in differences])
        for each in [one for one in chosen if not differences[one.name] <= TOLERANCE[one.precision]]:
            print(f"{each.name} gets no figures: its losses are not those of the plain loop")
            chosen.remove(each)
        rounds = [*before.get("rounds", [])]
        for _ in range(arguments.rounds):
            rounds.append(one_round(suite, chosen, arguments.steps))
    return before | {
        "parameters": suite.parameters, "rows": work.rows, "length": work.length, "threads": arguments.threads,
        "steps_of_a_round": arguments.steps, "losses_differ_by": differences, "rounds": rounds,
        "figures": summary(rounds, work.rows * work.length) if rounds else {},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", default=[*WORKS], help=", ".join(WORKS))
    parser.add_argument("--only", nargs="+", default=[*CONFIGURATIONS], choices=CONFIGURATIONS, metavar="NAME")
    parser.add_argument("--litgpt-python", metavar="PATH", help="the interpreter of an environment with litgpt")
    parser.add_argument("--rounds", type=int, default=3, help="0: only compare the losses")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a configuration in a round; at most 7")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--add", action="store_true", help="keep the rounds that are stored, and the losses compared")
    parser.add_argument("--profile", nargs="+", choices=CONFIGURATIONS, metavar="NAME")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="no run: the chart and the tables of what was measured")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"works": {}}
    if arguments.write:
        write(known)
        return
    for name in arguments.works:
        work = WORKS[name].small() if arguments.small else WORKS[name]
        entry = measure(
            name, work, arguments, known["works"].get(name, {}) if arguments.add or arguments.profile else {}
        )
        print_table(entry.get("figures", {}))
        if not arguments.small:
            known = {
                "date": datetime.date.today().isoformat(), "environment": environment(),
                "works": known["works"] | {name: entry},
            }  # fmt: skip
            arguments.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
