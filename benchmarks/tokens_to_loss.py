"""Tokens to one loss: techniques, each alone, beside a tuned AdamW, on the same model, text and order of rows.

python -m benchmarks.tokens_to_loss --text wikitext-2=FILE              # 5.6 M parameters, five seeds, all techniques
python -m benchmarks.tokens_to_loss --text … --seeds 2 --only muon      # some of it first
python -m benchmarks.tokens_to_loss --text … --small --steps 160        # 1.1 M parameters
python -m benchmarks.tokens_to_loss --draw docs/tokens_to_loss.png      # only the table and plot, of what was measured

AdamW's warm-up, learning rate and beta 2 are the best of those tried one after another on the first text, in runs of
their own (seed 100). All settings that a technique does not change are these; Muon's rate is the recipes'. A
technique's figure is the tokens at which its validation loss first is that at which AdamW's run of the same seed ended,
on a straight line between two looks, as a share of AdamW's tokens. In the second half of every run an exponential
average of the weights is looked at besides: `averaged`. Results are written after each run, and a run that was made is
not made again: a second start goes on.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.runs import First, Quiet
from slmkit.data.batch import Batch
from slmkit.data.prepare.corpus import Corpus, DataSettings, TokenizerSettings, build_corpus
from slmkit.data.stream import DocumentRows, PretrainRows, Stream, shuffled
from slmkit.device import find_device, keep_freed_memory
from slmkit.evaluation import validation_loss
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.fit import make_plan
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import Every, Plan, Report, State, train
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import make_optimizers
from slmkit.training.recipe.recipe import TrainSettings

LENGTH, VOCABULARY, TOKENS_PER_STEP = 128, 2_048, 1_024
LOOKS, VALIDATION_ROWS, AVERAGE = 10, 24, 0.9
SHAPES = {
    "5.6 M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4},
    "1.1 M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2},
}
TUNING_SEED = 100
DEFAULTS = TrainSettings().model_dump()
Changes = dict[str, Any]  # keys of the section train; others are this file's own, below
TUNED: dict[str, tuple[float | None, ...]] = {  # of AdamW, in this order
    "warmup_ratio": (None, 0.2), "learning_rate": (1e-3, 2e-3, 5e-4), "adam_beta2": (0.95, 0.99),
}  # fmt: skip
MUON: Changes = {"optimizer": "muon"}
TO_ZERO: Changes = {"lr_scheduler_type": "linear", "min_learning_rate_ratio": 0.0}
STABLE: Changes = {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.5, "min_learning_rate_ratio": 0.0}
TECHNIQUES: dict[str, Changes] = {
    "adamw": {},
    "muon": MUON,
    "muon, row variance": MUON | {"muon_beta2": 0.95},
    "stable, then to zero": STABLE,
    "linear to zero": TO_ZERO,
    "batch ramp": {"batch_ramp": True},
    "zero outputs": {"zero_outputs": True},
    "cautious decay": {"cautious_decay": True},
}
COLORS = {
    "adamw": "tab:orange", "muon": "tab:blue", "muon, row variance": "tab:green", "batch ramp": "tab:purple",
    "linear to zero": "tab:brown", "stable, then to zero": "tab:gray", "zero outputs": "tab:red",
    "cautious decay": "tab:cyan", "muon, linear to zero": "tab:olive",
}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "tokens_to_loss.json"
Curve = list[tuple[int, float, float]]  # tokens, validation loss, that of the averaged weights


def one_run(corpus: Corpus, size: str, steps: int, seed: int, changes: Changes) -> Curve:
    """Train once from fresh weights, and look at the validation loss now and then."""
    device = find_device("cpu")
    keys = {key: value for key, value in changes.items() if key in DEFAULTS}
    settings = TrainSettings(sequence_length=LENGTH, tokens_per_step=TOKENS_PER_STEP, max_steps=steps, **keys)
    vocabulary = {"vocab_size": len(corpus.tokenizer), "eos_token_id": corpus.tokenizer.eos_token_id}
    config = SLMConfig(max_position_embeddings=LENGTH, **vocabulary, **SHAPES[size])
    model = build_decoder(config, seed)
    if "zero_outputs" in changes:
        zero_outputs(model)
    rows = PretrainRows(corpus.train[0], LENGTH)
    validation = First(DocumentRows(corpus.validation, LENGTH), VALIDATION_ROWS)
    plan = make_plan(settings, rows.rows_in_epoch, LENGTH, device)
    stream = Stream(rows, settings.rows_per_step(LENGTH), seed)
    first_rows = [step * stream.rows_per_step for step in range(steps + 1)]  # of each step; at last, all rows
    if "batch_ramp" in changes:
        stream = RampedStream(rows, stream.rows_per_step, seed, steps)
        first_rows, plan = stream.first_rows, stream.plan(plan)
    optimizers: list[Any] = make_optimizers(model, settings, device)
    if "cautious_decay" in changes:
        optimizers = [*map(CautiousDecay, optimizers)]
    state = State(model, optimizers, seed=seed)
    averaged = copy.deepcopy(model)
    curve: Curve = []

    def average_and_look(state: State, report: Report) -> None:
        with torch.no_grad():
            torch._foreach_lerp_([*averaged.parameters()], [*model.parameters()], 1 - AVERAGE)
        done, total = first_rows[state.step], first_rows[-1]
        if done * LOOKS // total > len(curve):
            loss = validation_loss(model, validation, device).loss
            of_averaged = validation_loss(averaged, validation, device).loss if 2 * done >= total else loss
            curve.append((state.tokens, round(loss, 4), round(of_averaged, 4)))

    train(state, next_token, stream, plan, [Every(1, average_and_look)])
    return curve


# -- Techniques that the package does not have -------------------------------------------------------------------------


@torch.no_grad()
def zero_outputs(model: Decoder) -> None:
    """The last matrix of each attention and each MLP becomes zero: every block begins as the identity.

    Zhang et al. 2019, "Fixup Initialization", arXiv:1901.09321.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            parameter.zero_()


class CautiousDecay:
    """An optimizer, with weight decay only where the step itself brings a weight nearer to zero.

    Chen et al. 2025, "Cautious Weight Decay", arXiv:2510.12402.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0

    @torch.no_grad()
    def step(self) -> None:
        before = [[p.clone() for p in group["params"]] for group in self.param_groups]
        self.optimizer.step()
        for group, decay, olds in zip(self.param_groups, self.decays, before):
            for p, old in zip(group["params"], olds):
                shrinks = (p - old) * old < 0
                p.sub_(old * shrinks, alpha=group["lr"] * decay)


class RampedStream(Stream):
    """The rows of `steps` steps of a stream, in their order, in steps that grow.

    The first quarter of them is in steps of a quarter of the rows, the second in steps of half, the rest in whole ones.
    """

    def __init__(self, rows: PretrainRows, rows_per_step: int, seed: int, steps: int) -> None:
        super().__init__(rows, rows_per_step, seed)
        self.first_rows, total = [0], rows_per_step * steps
        while (first := self.first_rows[-1]) < total:
            part = 4 if first < total // 4 else 2 if first < total // 2 else 1
            self.first_rows.append(min(total, first + max(1, rows_per_step // part)))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        positions = np.arange(self.first_rows[step], self.first_rows[step + 1])
        return self.source.batch(shuffled(positions, self.source.rows_in_epoch, self.seed))

    def plan(self, plan: Plan) -> Plan:
        """The plan with the same rate at the same row, times the root of a step's share of the rows of a whole one."""

        def schedule(step: int) -> float:
            share = (self.first_rows[step + 1] - self.first_rows[step]) / self.rows_per_step
            return plan.schedule(self.first_rows[step] // self.rows_per_step) * share**0.5

        return replace(plan, steps=len(self.first_rows) - 1, schedule=schedule)


def share(curve: Curve, end_of_adamw: tuple[int, float, float], column: int = 1) -> float | None:
    """Tokens to AdamW's last loss as a share of AdamW's tokens; None if it was not reached."""
    tokens, loss, _ = end_of_adamw
    for before, after in itertools.pairwise(curve):
        if after[column] <= loss < before[column]:
            part = (before[column] - loss) / (before[column] - after[column])
            return round((before[0] + part * (after[0] - before[0])) / tokens, 4)
    return None


class Measured:
    """The runs on one text that are known, and those that are made and written down as they are asked for."""

    def __init__(self, name: str, size: str, steps: int, corpus: Corpus | None, first: Measured | None) -> None:
        self.size, self.steps, self.corpus, self.first = size, steps, corpus, first or self
        self.entry = f"{name}, {size} parameters, {steps} steps of {TOKENS_PER_STEP:,}"
        self.runs: dict[str, Curve] = read()["texts"].get(self.entry, {}).get("runs", {})

    def run(self, changes: Changes, seed: int) -> Curve:
        """The curve of this run."""
        key = key_of(changes, seed)
        if key not in self.runs:
            assert self.corpus is not None
            self.runs[key] = one_run(self.corpus, self.size, self.steps, seed, changes)
            print(self.entry, key, self.runs[key][-1], flush=True)
            content = read()  # other texts' may have been added in the meantime
            content["texts"][self.entry] = {"runs": self.runs, "techniques": self.summary()}
            content |= {"date": datetime.date.today().isoformat(), "environment": environment()}
            RESULTS.write_text(json.dumps(content) + "\n")
        return self.runs[key]

    def settings(self, technique: str) -> Changes:
        """A technique's settings, on top of the best of AdamW, which are found for one key after another."""
        best: Changes = {}
        for key, values in TUNED.items():
            losses = {value: self.first.run(best | {key: value}, TUNING_SEED)[-1][1] for value in values}
            best[key] = min(losses, key=losses.__getitem__)
        return best | TECHNIQUES[technique]

    def summary(self) -> dict[str, Any]:
        """Of each technique: last losses and shares of AdamW's tokens, by seed. Empty until the tuning is complete."""
        corpus, self.corpus = self.corpus, None
        try:
            found = {}
            for technique in TECHNIQUES:
                changes, baseline = self.settings(technique), self.settings("adamw")
                seeds = [s for s in range(99) if {key_of(changes, s), key_of(baseline, s)} <= self.runs.keys()]
                curves, ends = [self.run(changes, s) for s in seeds], [self.run(baseline, s)[-1] for s in seeds]
                if seeds:
                    found[technique] = {
                        "settings": changes,
                        "seeds": seeds,
                        "loss": [curve[-1][1] for curve in curves],
                        "averaged_loss": [curve[-1][2] for curve in curves],
                        "share": [share(curve, end) for curve, end in zip(curves, ends)],
                        "averaged_share": [share(curve, end, 2) for curve, end in zip(curves, ends)],
                    }
            return found
        except AssertionError:
            return {}
        finally:
            self.corpus = corpus


def key_of(changes: Changes, seed: int) -> str:
    """What names a run: its seed, and the settings that are not the recipes' default."""
    return json.dumps({"seed": seed} | {k: v for k, v in sorted(changes.items()) if v != DEFAULTS.get(k)})


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"texts": {}}


def table(found: dict[str, dict]) -> Iterator[str]:
    """Lines of Markdown: of each text and technique the seeds, the loss, and the share of AdamW's tokens."""
    yield "| text | technique | seeds | last loss | share of AdamW's tokens | averaged: last loss | share |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for text, result in found.items():
        for technique, each in result["techniques"].items():
            columns = [spread(each.get(key, [])) for key in ("loss", "share", "averaged_loss", "averaged_share")]
            yield f"| {text} | {technique} | {len(each['seeds'])} | {' | '.join(columns)} |"


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"reached by {len(known)} of {len(values)}"
    if not known:
        return ""
    return f"{statistics.mean(known):.3f}" + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def draw(found: dict[str, dict], path: Path) -> None:
    """Validation loss over tokens: a plot for each text, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.6 * -(-len(found) // 2)), layout="constrained")
    for axes, (text, result) in zip(figure.subplots(-(-len(found) // 2), 2, squeeze=False).flat, found.items()):
        for technique, each in result["techniques"].items():
            for number, seed in enumerate(each["seeds"]):
                curve = result["runs"][key_of(each["settings"], seed)]
                points = [(tokens / 1000, loss) for tokens, loss, _ in curve]
                label = None if number else technique
                axes.plot(*zip(*points), color=COLORS.get(technique), linewidth=1, label=label)
        axes.set(xlabel="thousand trained tokens", ylabel="validation loss (nats per token)", title=text)
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", metavar="NAME=FILE", help="default: the built-in stories")
    parser.add_argument("--small", action="store_true", help="1.1 M parameters instead of 5.6 M")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=TECHNIQUES, default=[*TECHNIQUES], help="in this order")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--draw", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    if not arguments.draw:
        torch.set_num_threads(arguments.threads)
        keep_freed_memory()
        measure(arguments)
    found = {text: result for text, result in read()["texts"].items() if result["techniques"]}
    print("\n".join(table(found)))
    if arguments.draw:
        draw(found, arguments.draw)


def measure(arguments: argparse.Namespace) -> None:
    """The tuning of each text, then seed after seed of the techniques."""
    size = "1.1 M" if arguments.small else "5.6 M"
    with tempfile.TemporaryDirectory() as folder:
        measured: list[Measured] = []
        for name, source in (text.split("=", 1) for text in arguments.text or ["stories=stories"]):
            data = DataSettings(source=source, documents=2_000, validation_documents=200, validation_fraction=0.05)
            tokenizer = TokenizerSettings(vocab_size=VOCABULARY)
            corpus = build_corpus("text", data, tokenizer, 0, Path(folder) / name, None, Quiet())
            first = measured[0] if measured else None
            measured.append(Measured(name, size, arguments.steps, corpus, first))
        for seed, technique, text in itertools.product(range(arguments.seeds), arguments.only, measured):
            text.run(text.settings("adamw"), seed)
            text.run(text.settings(technique), seed)


if __name__ == "__main__":
    main()
