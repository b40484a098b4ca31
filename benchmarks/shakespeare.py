"""nanoGPT's CPU example and the recipe shakespeare-char: validation loss over seconds on one machine, in turn.

python -m benchmarks.shakespeare --text input.txt              # three seeds of both: a quarter of an hour
python -m benchmarks.shakespeare --text input.txt --seeds 2 --add    # another seed beside those that are stored
python -m benchmarks.shakespeare --write    # the chart and the table of docs/performance.md, of what was measured

`input.txt` is tinyshakespeare, 1,115,394 characters. The plain loop (`benchmarks/plain_loop.py`) has the settings that
nanoGPT documents for a CPU: 4 layers, 4 heads, 128 wide, rows of 64 characters, 12 rows a step, 2,000 steps of AdamW;
its published validation loss is 1.88 nats per character. The recipe is trained by `slm train`, as a user does. Both are
evaluated on the last tenth of the text, on every character of it once, in rows of their own length. Seconds are those
of training steps, without evaluation; the seconds of the whole command are stored besides.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.figures import PERFORMANCE, spread, write_tables
from benchmarks.plain_loop import GPT, adamw, warm_up_and_cosine
from slmkit.training.logging.metrics_log import environment

RESULTS = Path(__file__).parent / "results" / "shakespeare.json"
LENGTH, ROWS, STEPS, WARM_UP = 64, 12, 2_000, 100
RATES = {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
LEAST_RATE, EVALUATED_AT_ONCE, LOOKS = 1e-4, 64, 20
GOAL = 1.65  # nats per character, in the plain loop's time
Curve = list[tuple[float, float]]  # seconds of training, validation loss


def plain_run(text: str, seed: int, steps: int = STEPS) -> tuple[Curve, int]:
    """Curve and number of parameters of the plain loop."""
    torch.manual_seed(seed)
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    ids = torch.tensor([numbers[character] for character in text])
    train, validation = ids.split([int(0.9 * len(ids)), len(ids) - int(0.9 * len(ids))])
    model = GPT(len(characters), 128, 4, 4, LENGTH, bias=False, approximate="none")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = (2 * 4) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
            nn.init.normal_(parameter, std=0.02 * scale)
    optimizer, seconds, curve = adamw(model.parameters(), RATES), 0.0, Curve()
    for step in range(steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = warm_up_and_cosine(step, STEPS, WARM_UP, RATES["lr"], LEAST_RATE)
        starts = torch.randint(len(train) - LENGTH, (ROWS,)).tolist()
        inputs = torch.stack([train[start : start + LENGTH] for start in starts])
        labels = torch.stack([train[start + 1 : start + LENGTH + 1] for start in starts])
        loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - began
        if (step + 1) % (STEPS // LOOKS) == 0 or step + 1 == steps:
            curve.append((seconds, evaluated(model, validation)))
    return curve, sum(p.numel() for p in model.parameters())


@torch.no_grad()
def evaluated(model: nn.Module, ids: Tensor) -> float:
    """Nats per character over all ids but the first, each predicted once, in rows of `LENGTH`."""
    total, last = 0.0, len(ids) - 1
    whole = last - last % LENGTH
    rows, labels = ids[:whole].view(-1, LENGTH), ids[1 : whole + 1].view(-1, LENGTH)
    parts = [*zip(rows.split(EVALUATED_AT_ONCE), labels.split(EVALUATED_AT_ONCE))]
    for inputs, wanted in [*parts, (ids[None, whole:last], ids[None, whole + 1 :])]:
        total += F.cross_entropy(model(inputs).flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return total / last


def recipe_run(path: Path, seed: int, threads: int, overrides: list[str]) -> tuple[Curve, dict[str, Any]]:
    """Curve of `slm train`, with figures of the run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        began = time.perf_counter()
        subprocess.run(
            [
                sys.executable, "-m", "slmkit", "train", "shakespeare-char", f"data.source={path}",
                f"output_dir={run}", f"seed={seed}", "train.logging_steps=1", *overrides,
            ],
            check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        whole = time.perf_counter() - began
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve, seconds, tokens = Curve(), 0.0, 0
    for line in lines:
        seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
        tokens = line["tokens"]
        if "validation_loss" in line:
            curve.append((seconds, line["validation_loss"]))
    return curve, {"tokens": tokens, "steps": lines[-1]["step"], "seconds_of_the_command": round(whole, 1)}


def reached(curve: Curve, loss: float) -> float | None:
    """Seconds to the first evaluation with at most this loss."""
    return next((seconds for seconds, found in curve if found <= loss), None)


def compared(plain: Curve, ours: Curve) -> dict[str, float | None]:
    """Seconds and losses of one seed. Of the recipe only what it reached within the plain loop's seconds counts."""
    seconds, loss = plain[-1]
    there = reached(ours, loss)
    within = [found for at, found in ours if at <= seconds]
    return {
        "plain_seconds": round(seconds, 1), "plain_loss": round(loss, 4),
        "recipe_seconds": round(ours[-1][0], 1), "recipe_loss": round(ours[-1][1], 4),
        "seconds_to_the_plain_loss": None if there is None else round(there, 1),
        "share_of_the_plain_seconds": None if there is None else round(there / seconds, 3),
        "recipe_loss_in_the_plain_seconds": round(within[-1], 4) if within else None,
    }  # fmt: skip


def write(results: dict[str, Any]) -> None:
    """The table of the page on performance, and its chart."""
    lines = [
        "| seed | plain loop: seconds | its loss | recipe: seconds | its loss "
        "| share of the plain loop's seconds until its loss | loss within its seconds |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for seed, run in results["seeds"].items():
        c = run["compared"]
        share = c["share_of_the_plain_seconds"]
        reached = "not reached" if share is None else f"{share:.0%}"
        figures = (
            f"{c['plain_seconds']:.0f} | {c['plain_loss']:.3f} | {c['recipe_seconds']:.0f} | {c['recipe_loss']:.3f}"
        )
        lines.append(f"| {seed} | {figures} | {reached} | {c['recipe_loss_in_the_plain_seconds']:.3f} |")
    write_tables(PERFORMANCE, "shakespeare", lines)
    draw(results, PERFORMANCE.parent / "shakespeare.png")


def draw(results: dict[str, Any], path: Path) -> None:
    """Validation loss over seconds of training: every seed of both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, label, color in (
        ("plain", "plain loop, nanoGPT's settings", "tab:orange"),
        ("recipe", "shakespeare-char", "tab:blue"),
    ):
        for number, run in enumerate(results["seeds"].values()):
            seconds, losses = zip(*run["curves"][name])
            axes.plot(seconds, losses, color=color, linewidth=1, label=None if number else label)
    axes.axhline(GOAL, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="seconds of training", ylabel="validation loss (nats per character)", ylim=(1.5, 2.6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)


def summary(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of every figure over the seeds."""
    names = ("plain_seconds", "plain_loss", "recipe_seconds", "recipe_loss", "share_of_the_plain_seconds")
    names += ("recipe_loss_in_the_plain_seconds",)
    found = {name: [run["compared"][name] for run in seeds.values()] for name in names}
    return {name: None if None in values else spread(values, 4) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="tinyshakespeare's input.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--add", action="store_true", help="keep the seeds that are stored")
    parser.add_argument("--plain-steps", type=int, default=STEPS, help="fewer: to see that it runs; nothing is stored")
    parser.add_argument("--write", action="store_true", help="no run: the chart and the table of what was measured")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    arguments = parser.parse_intermixed_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"seeds": {}}
    if arguments.write:
        write(known)
        return
    if arguments.text is None:
        parser.error("--text FILE is needed: tinyshakespeare's input.txt")
    torch.set_num_threads(arguments.threads)
    seeds: dict[str, Any] = known["seeds"] if arguments.add else {}
    for seed in arguments.seeds:
        plain, parameters = plain_run(arguments.text.read_text(), seed, arguments.plain_steps)
        print(f"seed {seed}: the plain loop, {parameters:,} parameters: {plain[-1]}", flush=True)
        ours, figures = recipe_run(arguments.text, seed, arguments.threads, arguments.overrides)
        found = compared(plain, ours)
        print(f"seed {seed}:", json.dumps(found | figures), flush=True)
        curves = {name: [[round(s, 2), round(loss, 4)] for s, loss in curve]
                  for name, curve in (("plain", plain), ("recipe", ours))}  # fmt: skip
        seeds[str(seed)] = {"compared": found, "recipe": figures, "curves": curves, "threads": arguments.threads}
        if arguments.plain_steps == STEPS:
            content = {
                "date": datetime.date.today().isoformat(), "environment": environment(), "summary": summary(seeds),
                "seeds": seeds,
            }  # fmt: skip
            RESULTS.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
