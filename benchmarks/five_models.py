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
import time
from pathlib import Path
from typing import Any

from slmkit.config import load_settings
from slmkit.data.sources import open_source
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.stories import tell_many
from slmkit.device import keep_freed_memory
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import SILENCE
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
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 44, "sliding_window": 64,
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
        source = open_source(SourceSettings(path=str(tinystories)), seed=0)
        texts += [document.text for document, _ in source.read()][:2_000]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("act", choices=["train", "evaluate"])
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are")
    parser.add_argument("--tokens", type=int, default=300_000, help="that each variant is trained on")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tinystories", type=Path, help="a file of TinyStories to train on, besides the built-in ones")
    options = parser.parse_args()
    keep_freed_memory()
    train_all(options.folder, options.tokens, options.seeds, options.tinystories)


if __name__ == "__main__":
    main()
