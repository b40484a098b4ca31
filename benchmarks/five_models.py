"""The small variants of five documents, trained alike and compared in one table with intervals.

python -m benchmarks.five_models train --folder FOLDER [--tinystories train.txt.gz]      # resumes where it was stopped
python -m benchmarks.five_models evaluate --folder FOLDER [--tinystories-valid valid.txt.gz]

Each variant keeps the choices of its document (see recipes/): architecture, optimizer, betas, gradient clipping,
distillation. The same for all: the tokenizer, the text, the number of tokens, the length of a row, the size (1.2
million parameters, within 4 %), the schedule, and AdamW's learning rate, since the documents' rates are for models and
runs that are hundreds of times as large.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slmkit.adapt.load import load_model
from slmkit.config import load_settings
from slmkit.data.sources import open_source
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.stories import tell_many
from slmkit.device import keep_freed_memory
from slmkit.evaluation.intervals import estimate
from slmkit.evaluation.perplexity import text_result
from slmkit.evaluation.results import Item, TaskResult
from slmkit.files.find import find_model_directory
from slmkit.generation.ensemble import LanguageModel
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.logging.metrics_log import environment
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import SILENCE
from slmkit.workflows.evaluation.compare import compare_results
from slmkit.workflows.train import train_recipe

RESULTS = Path(__file__).parent / "results" / "five_models.json"
VOCABULARY, LENGTH, TOKENS_PER_STEP = 2_048, 256, 1_024
TEACHER = "vector-clm"  # of the distilled variant: the teacher has the student's tokenizer and seed
# Each document's shape, scaled down: its ratio of query to key-value heads and of the feed-forward width, its window.
SHAPES: dict[str, dict[str, Any]] = {
    "vector-slm": {
        "hidden_size": 120, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "vector-clm": {
        "hidden_size": 120, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama-3.2": {
        "hidden_size": 112, "intermediate_size": 448, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 1,
        # The preset's scaling: 16 times the length that it is trained on.
        "max_position_embeddings": 16 * LENGTH,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": LENGTH},
    },
    "gemma-3": {
        "model_type": "gemma3_text", "hidden_size": 112, "intermediate_size": 358, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 44, "query_pre_attn_scalar": 44,
        "sliding_window": 64,
    },
    "smallm": {
        "model_type": "gpt2", "hidden_size": 114, "num_hidden_layers": 6, "num_attention_heads": 6,
        "attention_dropout": 0.1, "hidden_dropout": 0.1,
    },
}  # fmt: skip
TRAINING: dict[str, dict[str, Any]] = {
    "vector-slm": {"optimizer": "adamw_8bit"},
    "vector-clm": {"optimizer": "muon"},
    "llama-3.2": {},
    "gemma-3": {"max_grad_norm": 0.5},
    "smallm": {"max_grad_norm": 0.5},
}
DISTILLATION = {"alpha": 0.5, "temperature": 3.0}  # of the Llama 3.2 document


def recipe_of(name: str, seed: int, folder: Path, tokens: int, tinystories: Path | None) -> Recipe:
    """The recipe of a variant; its run is `folder`/NAME-SEED."""
    sources = [{"path": "stories", "name": "stories", "weight": 1.0}]
    if tinystories is not None:
        sources.append({"path": str(tinystories), "name": "tinystories", "weight": 1.0})
    content: dict[str, Any] = {
        "objective": "pretrain",
        "output_dir": str(folder / f"{name}-{seed}"),
        "seed": seed,
        "model": {"max_position_embeddings": LENGTH, **SHAPES[name]},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"sources": sources, "documents": 1_500, "validation_documents": 50, "validation_fraction": 0.02},
        "train": {
            "max_tokens": tokens,
            "tokens_per_step": TOKENS_PER_STEP,
            "micro_batch_tokens": TOKENS_PER_STEP,
            "sequence_length": LENGTH,
            "eval_steps": max(1, tokens // TOKENS_PER_STEP // 2),
            "learning_rate": 3e-3,
            "min_learning_rate_ratio": 0.05,
            "sample_prompts": [],
            "save_total_limit": 1,
            "device": "cpu",
            **TRAINING[name],
        },
    }
    if name == "llama-3.2":
        content["objective"] = "distill"
        content["distillation"] = {"teacher": str(folder / f"{TEACHER}-{seed}"), **DISTILLATION}
        content["tokenizer"] = {}
    return load_settings(Recipe, content, origin=name)


def make_tokenizer(folder: Path, tinystories: Path | None) -> None:
    """One tokenizer for all, from equal parts of both texts."""
    texts = [story.text for story in tell_many(0, 2_000)]
    if tinystories is not None:
        texts += _documents(tinystories)[:2_000]
    tokenizer = SLMTokenizer(VOCABULARY)
    tokenizer.train(texts)
    tokenizer.save_pretrained(folder / "tokenizer")


def train_all(folder: Path, tokens: int, seeds: int, tinystories: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        make_tokenizer(folder, tinystories)
    for seed in range(seeds):
        for name in sorted(SHAPES, key=lambda name: name != TEACHER):
            recipe = recipe_of(name, seed, folder, tokens, tinystories)
            if (Path(recipe.output_dir) / "done").exists():
                continue
            started = time.perf_counter()
            run = train_recipe(recipe, SILENCE)
            (run.root / "done").write_text(f"{time.perf_counter() - started:.0f} seconds\n")
            print(f"{run.root}: {time.perf_counter() - started:.0f} s, {run.metrics.read()[-1]}", flush=True)


MEASURED_SEED = 88_888  # of the stories that the models are measured on
METRICS = ("bits_per_byte", "above_perfect")  # of the built-in stories; TinyStories have the first


class Measure:
    """The same held-out texts for every model; each story is an item."""

    def __init__(self, tokenizer: SLMTokenizer, count: int, tinystories: Path | None) -> None:
        self.tokenizer, self.told = tokenizer, [*tell_many(MEASURED_SEED, count)]
        self.texts = {"stories": [story.text for story in self.told]}
        if tinystories is not None:
            self.texts["tinystories"] = _documents(tinystories)[:count]

    def results(self, decoder: LanguageModel) -> Iterator[TaskResult]:
        for name, texts in self.texts.items():
            result = text_result(decoder, self.tokenizer, texts, name=name, window=LENGTH, stride=LENGTH // 2)
            yield self.with_distance(result) if name == "stories" else result

    def with_distance(self, result: TaskResult) -> TaskResult:
        """With the bits per byte beyond those of the generator, which knows the probability of its stories."""
        items = []
        for item, story in zip(result.items, self.told, strict=True):
            bits, length = item.values["bits_per_byte"]
            beyond = bits + story.log_probability / math.log(2)
            items.append(Item(item.id, {**item.values, "above_perfect": (beyond, length)}, item.text))
        metrics = {**result.metrics, "above_perfect": "loss"}
        return TaskResult(result.task, result.recipe, metrics, tuple(items), result.errors)


def _documents(path: Path) -> list[str]:
    source = open_source(SourceSettings(path=str(path)), seed=0)
    return [document.text for document, _ in source.read()]


def mean_of(results: Sequence[TaskResult]) -> TaskResult:
    """The mean of several seeds, item by item."""
    first, items = results[0], []
    for its in zip(*(one.items for one in results), strict=True):
        values = {
            name: (sum(item.values[name][0] for item in its) / len(its), its[0].values[name][1])
            for name in its[0].values
        }
        items.append(Item(its[0].id, values, its[0].text))
    return TaskResult(first.task, first.recipe, first.metrics, tuple(items), first.errors)


def evaluate_all(folder: Path, seeds: int, count: int, tinystories: Path | None) -> dict[str, Any]:
    """Figures of every variant and seed, and each variant (the mean of its seeds) compared with the best one."""
    measure = Measure(SLMTokenizer.from_pretrained(folder / "tokenizer"), count, tinystories)
    found: dict[str, list[list[TaskResult]]] = {}  # variant → seed → text
    rows: dict[str, dict[str, Any]] = {}
    for name in SHAPES:
        found[name] = []
        for seed in range(seeds):
            decoder, _ = load_model(find_model_directory(folder / f"{name}-{seed}"))
            found[name].append([*measure.results(decoder)])
        rows[name] = {"parameters": sum(p.numel() for p in decoder.parameters()), "figures": {}}
        for task, of_seeds in enumerate(zip(*found[name], strict=True)):
            for metric in (metric for metric in METRICS if metric in of_seeds[0].metrics):
                rows[name]["figures"][f"{of_seeds[0].task}/{metric}"] = {
                    "mean": asdict(estimate(mean_of([one[task] for one in found[name]]), metric)),
                    "seeds": [one.score(metric).value for one in of_seeds],
                }
        print(json.dumps({name: rows[name]}), flush=True)
    means = {name: [mean_of(of_seeds) for of_seeds in zip(*its, strict=True)] for name, its in found.items()}
    best = min(SHAPES, key=lambda name: means[name][0].score("bits_per_byte").value)
    names = [best, *(name for name in SHAPES if name != best)]
    comparison = compare_results(names, [means[name] for name in names])
    return {"recipe": means[best][0].recipe, "variants": rows, "comparison": comparison.to_json()}


COLUMNS = {
    "stories/bits_per_byte": "stories, bits per byte",
    "stories/above_perfect": "above a perfect model",
    "tinystories/bits_per_byte": "TinyStories, bits per byte",
}


def table(content: dict[str, Any]) -> str:
    """The table of docs/evaluation.md."""
    comparison = content["comparison"]
    names = comparison["models"]
    lines = [
        "| variant | parameters | " + " | ".join(COLUMNS.values()) + " | stories, difference to the best | p |",
        "| --- | --- | " + "--- | " * len(COLUMNS) + "--- | --- |",
    ]
    for name in names:
        cells = [f"`{name}`", f"{content['variants'][name]['parameters'] / 1e6:.2f} M"]
        for key in COLUMNS:
            figure = content["variants"][name]["figures"][key]
            seeds = ", ".join(f"{value:.3f}" for value in figure["seeds"])
            cells.append(f"{figure['mean']['value']:.3f} ± {figure['mean']['standard_error']:.3f} ({seeds})")
        row = next(
            (one for one in comparison["rows"] if names[one["model"]] == name and one["task"] == "stories"), None
        )
        if row is None:
            cells += ["", ""]
        else:
            its = row["difference"]
            cells.append(f"{its['value']:+.3f} ({its['low']:+.3f} to {its['high']:+.3f})")
            cells.append("< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("act", choices=["train", "evaluate"])
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are")
    parser.add_argument("--tokens", type=int, default=300_000, help="that each variant is trained on")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tinystories", type=Path, help="a file of TinyStories to train on, besides the built-in ones")
    parser.add_argument("--tinystories-valid", type=Path, help="a file of TinyStories to measure on")
    parser.add_argument("--stories", type=int, default=150, help="that the models are measured on, of each kind")
    options = parser.parse_args()
    keep_freed_memory()
    if options.act == "train":
        train_all(options.folder, options.tokens, options.seeds, options.tinystories)
        return
    content = {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "options": {"tokens": options.tokens, "seeds": options.seeds, "stories": options.stories},
        "shapes": SHAPES,
        "training": TRAINING,
        **evaluate_all(options.folder, options.seeds, options.stories, options.tinystories_valid),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


if __name__ == "__main__":
    main()
