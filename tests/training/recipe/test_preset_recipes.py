"""The recipes of the presets take real steps: their own optimizer, schedule and precision, on a smaller shape."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.model.sizes import parameter_count
from slmkit.training.recipe.recipe import find_recipe, load_recipe
from slmkit.workflows.train import train_recipe
from tests.test_life import Silent
from tests.training.helpers import TOKENIZER, config

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
# What the documents say, by the keys of the recipe: of `train` just what it marks with (document).
COSINE = {"train.lr_scheduler_type": "cosine"}
TINYSTORIES = {"data.sources.paths": ["roneneldan/TinyStories"], "tokenizer.path": "gpt2"}
ROWS = {"train.sequence_length": 128, "train.tokens_per_step": 32 * 32 * 128, "train.micro_batch_tokens": 32 * 128}
LLAMA = COSINE | {
    "train.sequence_length": 8_192, "train.tokens_per_step": 64 * 8_192, "train.learning_rate": 1e-3,
    "train.warmup_steps": 2_000, "train.max_grad_norm": 1.0, "train.optimizer": "adamw",
}  # fmt: skip
TALKS = {
    "objective": "sft",
    "data.sources.paths": ["HuggingFaceTB/smoltalk", "Open-Orca/SlimOrca", "allenai/tulu-3-sft-personas-code"],
}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "vector-slm": COSINE | {
        "tokenizer.vocab_size": 16_384, "tokenizer.documents_per_source": 20_000 // 4, "data.streaming": True,
        "data.sources.paths": ["HuggingFaceTB/cosmopedia", "HuggingFaceFW/fineweb-edu",
                               "mlfoundations/dclm-baseline-1.0", "nampdn-ai/tiny-codes"],
        "train.max_tokens": 3_000_000_000, "train.optimizer": "adamw_8bit",
    },
    "vector-clm-50m": COSINE | {
        "tokenizer.vocab_size": 16_384, "data.streaming": True,
        "data.sources.paths": ["HuggingFaceTB/cosmopedia", "HuggingFaceFW/fineweb-edu"],
        "train.max_tokens": 3_500_000_000, "train.optimizer": "muon",
    },
    "vector-slm-chat": TALKS,
    "vector-clm-chat": TALKS,
    "llama-3.2-1b": LLAMA | {"tokenizer.vocab_size": 128_256, "train.gradient_checkpointing": 1},
    "llama-3.2-1b-distill": LLAMA | {"distillation.alpha": 0.5, "distillation.temperature": 3.0},
    "gemma-3-270m": COSINE | TINYSTORIES | ROWS | {
        "train.max_steps": 150_000, "train.learning_rate": 1e-4, "train.warmup_steps": 10_000, "train.eval_steps": 500,
        "train.min_learning_rate_ratio": 5e-4 / 1e-4, "train.max_grad_norm": 0.5, "train.adam_beta2": 0.95,
        "train.precision": "bfloat16",
    },
    "smallm-60m": COSINE | TINYSTORIES | ROWS | {
        "train.max_steps": 20_000, "train.learning_rate": 1e-4, "train.warmup_steps": 1_000, "train.max_grad_norm": 0.5,
        "train.adam_beta2": 0.95, "train.weight_decay": 0.1, "train.optimizer": "adamw", "train.precision": "auto",
    },
}  # fmt: skip
NOT_MARKED = {"train.min_learning_rate_ratio", "train.gradient_checkpointing"}  # whose comments say more than that
PRESETS_OF = ("vector-slm", "vector-clm-50m", "llama-3.2-1b", "gemma-3-270m", "smallm-60m")
SHAPES: dict[str, dict[str, Any]] = {
    "vector-slm": {"vocab_size": 16_384, "tie_word_embeddings": True, "hidden_act": "silu"},
    "vector-clm-50m": {"vocab_size": 16_384, "tie_word_embeddings": True, "hidden_act": "silu"},
    "llama-3.2-1b": {
        "vocab_size": 128_256, "hidden_size": 2_048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8_192, "max_position_embeddings": 128 * 1024,
        "batch_size": 64, "sequence_length": 8_192, "gradient_clip_norm": 1.0, "warmup_steps": 2_000,
        "learning_rate": 1e-3, "use_distillation": None, "distillation_alpha": 0.5, "distillation_temperature": 3.0,
    },
    "gemma-3-270m": {
        "hidden_size": 640, "intermediate_size": 2_048, "num_hidden_layers": 18, "num_attention_heads": 4,
        "num_key_value_heads": 1, "sliding_window": 512, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 32 * 1024,
        "layer_types": ["full_attention" if i in (5, 11, 17) else "sliding_attention" for i in range(18)],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "smallm-60m": {
        "vocab_size": 50_257, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
        "max_position_embeddings": 128, "attention_dropout": 0.1, "hidden_dropout": 0.1, "tie_word_embeddings": True,
    },
}  # fmt: skip
RECIPES = sorted(path.stem for path in find_recipe("smallm-60m").parent.glob("*.yaml"))


@pytest.mark.parametrize("name", SHAPES)
def test_a_preset_has_the_shape_of_its_document(name: str) -> None:
    config = SLMConfig.from_preset(name)
    assert {key: getattr(config, key) for key in SHAPES[name]} == SHAPES[name]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_recipe_says_what_its_document_says(name: str) -> None:
    path = find_recipe(name)
    recipe, text = load_recipe(path), path.read_text(encoding="utf-8")
    assert 'From its document ("' in " ".join(line.strip("# \n") for line in text.splitlines())
    assert name not in PRESETS_OF or recipe.model.preset == name
    found = {key: functools.reduce(getattr, key.split("."), recipe) for key in DOCUMENTS[name] if "paths" not in key}
    paths = {"data.sources.paths": [source.path for source in recipe.data.sources]} if recipe.data.sources else {}
    assert found | paths == DOCUMENTS[name]
    marked = {
        f"train.{key}" for key in re.findall(r"^  (\w+): .*\(document\)", text[text.index("train:") :], re.MULTILINE)
    }
    assert marked == {key for key in DOCUMENTS[name] if key.startswith("train.")} - NOT_MARKED


def test_gemmas_rate_ends_where_its_document_says() -> None:
    train = load_recipe(find_recipe("gemma-3-270m")).train
    rate = [train.learning_rate * train.schedule(150_000)(step) for step in (0, 9_999, 80_000, 149_999)]
    assert rate == pytest.approx([1e-8, 1e-4, 3e-4, 5e-4], rel=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_read_and_counted(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    length = recipe.train.sequence_length or 512
    steps = recipe.train.total_steps(10**6, length)
    rates = [recipe.train.schedule(steps)(step) for step in (0, steps // 2, steps - 1)]
    assert steps > 0
    assert all(0 < rate <= max(1, recipe.train.min_learning_rate_ratio) for rate in rates)
    if recipe.model.path is None and recipe.objective == "pretrain":
        assert parameter_count(architecture_of(recipe.model.build_config())) > 10**6


@pytest.mark.parametrize("name", ["vector-slm-chat", "vector-clm-chat"])
def test_three_data_sets_of_talks_are_one_run(name: str, tmp_path: Path) -> None:
    shape = config(max_position_embeddings=128)
    save_decoder(build_decoder(shape, seed=1), shape, tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    rows = {
        "smoltalk": {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello. " * 9}]},
        "slimorca": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Good day. " * 9}]},
        "code": {
            "prompt": "p",
            "messages": [{"role": "user", "content": "f?"}, {"role": "assistant", "content": "f() " * 9}],
        },
    }
    keys = [f"model.path={tmp_path}/base", f"output_dir={tmp_path}/chat", "data.validation=null", "train.max_steps=2",
            "train.num_train_epochs=null", "train.tokens_per_step=128", "train.device=cpu", "train.sample_tokens=4",
            "data.validation_fraction=0.2"]  # fmt: skip
    for number, (source, row) in enumerate(rows.items()):
        line = json.dumps(row) + "\n"
        (tmp_path / f"{source}.jsonl").write_text("".join(line.replace("?", f" {n}?") for n in range(20)))
        keys += [f"data.sources.{number}.path={tmp_path}/{source}.jsonl", f"data.sources.{number}.config=null"]
    train_recipe(load_recipe(find_recipe(name), keys), Silent(), dry_run=True, force=True)


@pytest.mark.usefixtures("without_plan_and_pictures")
@pytest.mark.parametrize("name", PRESETS_OF)
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
