"""The recipes of the presets take real steps: their own optimizer, schedule and precision, on a smaller shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmkit.api import train_recipe
from slmkit.model.presets import PRESETS
from slmkit.training.recipe import find_recipe, load_recipe
from tests.test_life import Silent

SMALLER = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.max_position_embeddings=64",
    "data={source: stories, documents: 60, validation_documents: 5}", "tokenizer={vocab_size: 400}",
    "train.sequence_length=32", "train.tokens_per_step=256", "train.max_steps=6", "train.max_tokens=null",
    "train.warmup_steps=2", "train.sample_tokens=4", "train.logging_steps=1", "train.device=cpu",
]  # fmt: skip
HEADS = {
    "gemma-3-270m": ["model.head_dim=16", "model.num_attention_heads=2", "model.sliding_window=16"],
    "smallm-60m": ["model.num_attention_heads=2"],
}
USUAL_HEADS = ["model.num_attention_heads=4", "model.num_key_value_heads=2", "model.intermediate_size=64"]
AS_PUBLISHED = {
    "vector-slm": {"optimizer": "adamw_8bit", "lr_scheduler_type": "cosine", "max_tokens": 3_000_000_000},
    "vector-clm-50m": {"optimizer": "muon", "lr_scheduler_type": "cosine", "max_tokens": 3_500_000_000},
    "llama-3.2-1b": {"gradient_checkpointing": 1},
    "gemma-3-270m": {
        "tokens_per_step": 32 * 32 * 128, "micro_batch_tokens": 32 * 128, "sequence_length": 128,
        "warmup_steps": 10_000, "max_grad_norm": 0.5, "adam_beta2": 0.95, "precision": "bfloat16",
    },
    "smallm-60m": {"max_steps": 20_000, "warmup_steps": 1_000, "weight_decay": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_a_recipe_says_what_was_published(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    assert recipe.model.preset == name
    assert name in PRESETS
    assert {key: getattr(recipe.train, key) for key in AS_PUBLISHED[name]} == AS_PUBLISHED[name]


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_it_takes_real_steps_on_a_smaller_shape(name: str, tmp_path: Path) -> None:
    if name == "vector-slm":
        pytest.importorskip("bitsandbytes")
    keys = [*SMALLER, *HEADS.get(name, USUAL_HEADS), f"output_dir={tmp_path / 'run'}"]
    run = train_recipe(load_recipe(find_recipe(name), keys), Silent())
    lines = [json.loads(line) for line in run.metrics.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (run.root / "latest" / "model.safetensors").exists()
    assert load_recipe(run.recipe).train.optimizer == load_recipe(find_recipe(name)).train.optimizer
