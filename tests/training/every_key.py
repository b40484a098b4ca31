"""Every key of a recipe, found in the classes of its settings, and for each another value and a recipe that reads it.

A new key has no line here, and the tests that go through all keys fail until it has one.
"""

from __future__ import annotations

import copy
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slmkit.api.causal_lm import SLMForCausalLM
from slmkit.config import Settings, load_settings
from slmkit.model.config import TRAINING_FIELDS, SLMConfig
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.loop import RunStopped, StopRequested
from slmkit.training.recipe.recipe import ModelSettings, Recipe
from slmkit.workflows.context import Reporter
from slmkit.workflows.train import train_recipe

SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "hidden_dropout": 0.1,
}  # fmt: skip
TRAIN = {
    "sequence_length": 32, "tokens_per_step": 128, "micro_batch_tokens": 64, "max_steps": 3, "device": "cpu",
    "precision": "float32", "sample_tokens": 3, "logging_steps": 1, "eval_steps": 2, "learning_rate": 0.01,
    "warmup_steps": 1, "compile": False,
}  # fmt: skip
SENTENCE = "the fox ran over a hill and sang to an owl in the tree while rain fell on every roof of town"
WORDS = SENTENCE.split()


def make_world(folder: Path) -> None:
    """Text, conversations, pairs and questions, a tokenizer, and a model to start from."""
    text = [" ".join(WORDS[n % 7 :] + WORDS[: n % 5]) + f" {n}" for n in range(40)]
    rows = [{"text": line, "body": line.upper()} for line in text]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": line[::-1]}) + "\n" for line in text[:9]))
    (folder / "more.txt").write_text(text[5])
    (folder / "lines.txt").write_text("|".join(text))
    (folder / "bad.jsonl").write_text((folder / "text.jsonl").read_text() + '{"text": 7}\n')
    copies = [*text, *text[:20], *(line + " or so" for line in text), *("яблоко и " * 8 + line for line in text)]
    (folder / "copies.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in copies))

    def chat(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    chats = [{"messages": chat(f"say {n}", line), "talk": chat("again", str(n))} for n, line in enumerate(text)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    pairs = [{"prompt": f"say {n}", "chosen": f"{n} {n}", "rejected": "no no"} for n in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    judged = [{"prompt": f"say {n}", "completion": f"{n} {n}", "label": n % 2 == 0} for n in range(40)]
    (folder / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    tokenizer = SLMTokenizer(260)
    for name, width, seed in (("base", 16, 1), ("teacher", 24, 2)):
        shape = SLMConfig(**SHAPE | {"hidden_size": width, "vocab_size": len(tokenizer), "hidden_dropout": 0.0})
        torch.manual_seed(seed)
        SLMForCausalLM(shape).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def scenario(name: str, folder: Path) -> dict[str, Any]:
    """The content of a recipe that reads the keys of this name."""
    model, base = {"model": SHAPE}, {"model": {"path": str(folder / "base")}}
    own = {"tokenizer": {"path": str(folder / "base")}}
    text = {"data": {"source": str(folder / "text.jsonl")}}
    stories = {"data": {"source": "stories", "documents": 12, "validation_documents": 4}}
    of_stories = base | stories | {"train": TRAIN | {"sequence_length": 48, "max_steps": 2}}
    two = [{"path": str(folder / file), "name": file[:4]} for file in ("text.jsonl", "more.jsonl")]
    content = {
        "text": model | own | text,
        "new tokenizer": model | text | {"tokenizer": {"vocab_size": 270}},
        "stories": model | own | stories,
        "chat": base | {"objective": "sft", "data": {"source": str(folder / "chats.jsonl")}},
        "pairs": base | {"objective": "dpo", "data": {"source": str(folder / "pairs.jsonl")}},
        "judged": base | {"objective": "kto", "data": {"source": str(folder / "judged.jsonl")}},
        "questions": of_stories | {"objective": "grpo", "grpo": {"prompts_per_step": 2, "num_generations": 2,
                                   "max_new_tokens": 4}},
        "lora": base | text | {"lora": {"r": 2}},
        "distill": model | own | text | {"objective": "distill", "distillation": {"teacher": str(folder / "teacher"),
                                         "temperature": 2.0}},
        "two": model | own | {"data": {"sources": two}},
        "stream": model | own | {"data": {"sources": two[:1], "streaming": True, "shuffle_buffer": 4,
                                          "validation_documents": 2}},
        "bad rows": model | own | {"data": {"sources": [{"path": str(folder / "bad.jsonl")}]}},
        "copies": model | own | {"data": {"source": str(folder / "copies.jsonl")}},
        "phases": model | own | {"data": {"sources": two, "phases": [
            {"until_tokens": 200, "weights": {"text": 1.0}}, {"weights": {"text": 1.0, "more": 1.0}}]}},
        "validation": model | own | {"data": {"source": str(folder / "text.jsonl"),
                                              "validation": {"path": str(folder / "more.jsonl"), "name": "v"}}},
        "base": base | text,
    }[name]  # fmt: skip
    return {"train": TRAIN, "output_dir": str(folder / "runs" / name), "seed": 1} | content


PATHS = (
    "model.path", "tokenizer.path", "distillation.teacher", "distillation.cache", "data.source", "data.sources.*.path",
    "data.validation.path", "data.cleaning.evaluation",
)  # fmt: skip


def changed(content: dict[str, Any], changes: dict[str, Any], world: Path | None = None) -> dict[str, Any]:
    """A copy with other values; names of files are those in `world`, and None drops a key."""
    content = copy.deepcopy(content)
    for key, value in changes.items():
        if key in PATHS and world is not None and value is not None:
            value = [str(world / one) for one in value] if isinstance(value, list) else str(world / value)
        *parents, leaf = key.replace("*", "0").split(".")
        place: Any = content
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        if value is None:
            place.pop(leaf, None)
        else:
            place[leaf] = value
    return content


def keys_of(kind: type[Settings], place: str = "") -> Iterator[str]:
    """Every dotted key of a class of settings; `*` stands for the number in a list."""
    for name, field in kind.model_fields.items():
        inner, is_list = _settings_in(field.annotation)
        if inner is None:
            yield f"{place}{name}"
        else:
            yield from keys_of(inner, f"{place}{name}.*." if is_list else f"{place}{name}.")
    if kind is ModelSettings:
        yield from (f"{place}{name}" for name in SLMConfig.model_fields if name not in TRAINING_FIELDS)


def _settings_in(annotation: Any, is_list: bool = False) -> tuple[type[Settings] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation, is_list
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, typing.Annotated):
        for part in typing.get_args(annotation):
            found, in_list = _settings_in(part, is_list or typing.get_origin(annotation) is list)
            if found is not None:
                return found, in_list
    return None, False


KEYS = list(keys_of(Recipe))

# Key → the recipe that reads it, what else that must say, and another value.
MUON, WSD = {"train.optimizer": "muon"}, {"train.lr_scheduler_type": "warmup_stable_decay", "train.max_steps": 6}
SLM, GEMMA = {"model.model_type": "slm"}, {"model.model_type": "gemma2"}
DEEPSEEK = {"model.model_type": "deepseek_v3"}
EVERY: dict[str, tuple[str, dict[str, Any], Any]] = {
    "objective": ("chat", {}, "pretrain"),
    "output_dir": ("text", {}, "elsewhere"),
    "seed": ("text", {}, 2),
    "model.preset": ("text", {"model.vocab_size": None}, "gpt2"),
    "model.path": ("base", {}, "teacher"),
    "model.initialization": ("text", {}, "copying"),
    "model.model_type": ("text", {}, "qwen3"),
    "model.vocab_size": ("text", {}, 300),
    "model.hidden_size": ("text", {}, 32),
    "model.intermediate_size": ("text", {}, 48),
    "model.num_hidden_layers": ("text", {}, 1),
    "model.num_attention_heads": ("text", {}, 4),
    "model.num_key_value_heads": ("text", {}, 1),
    "model.head_dim": ("text", {}, 4),
    "model.max_position_embeddings": ("text", {"train.sequence_length": None}, 48),
    "model.hidden_act": ("text", {}, "gelu_pytorch_tanh"),
    "model.rms_norm_eps": ("text", {}, 0.1),
    "model.rope_parameters": ("text", {}, {"rope_type": "default", "rope_theta": 10.0}),
    "model.sliding_window": ("text", SLM | {"model.layer_types": ["sliding_attention"] * 2}, 2),
    "model.layer_types": ("text", SLM | {"model.sliding_window": 2}, ["full_attention"] * 2),
    "model.no_rope_layers": ("text", {"model.model_type": "smollm3"}, [0, 1]),
    "model.query_pre_attn_scalar": ("text", GEMMA, 4),
    "model.attn_logit_softcapping": ("text", GEMMA, 0.01),
    "model.final_logit_softcapping": ("text", GEMMA, 0.01),
    "model.q_lora_rank": ("text", DEEPSEEK, 4),
    "model.kv_lora_rank": ("text", DEEPSEEK, 4),
    "model.qk_rope_head_dim": ("text", DEEPSEEK, 4),
    "model.qk_nope_head_dim": ("text", DEEPSEEK, 4),
    "model.v_head_dim": ("text", DEEPSEEK, 4),
    "model.rope_interleave": ("text", DEEPSEEK, False),
    "model.norm": ("text", SLM, "layer"),
    "model.norm_at": ("text", SLM, "post"),
    "model.qk_norm": ("text", SLM, "head"),
    "model.gated_mlp": ("text", SLM, False),
    "model.attention_bias": ("text", {}, True),
    "model.mlp_bias": ("text", {}, True),
    "model.tie_word_embeddings": ("text", {}, False),
    "model.attention_dropout": ("text", {}, 0.3),
    "model.hidden_dropout": ("text", {}, 0.3),
    "model.initializer_range": ("text", {}, 0.3),
    "model.bos_token_id": ("text", {}, 7),
    "model.eos_token_id": ("text", {}, 7),
    "model.pad_token_id": ("text", {}, 7),
    "lora.r": ("lora", {}, 3),
    "lora.lora_alpha": ("lora", {}, 64.0),
    "lora.lora_dropout": ("lora", {}, 0.3),
    "lora.target_modules": ("lora", {}, ["query"]),
    "lora.use_rslora": ("lora", {}, True),
    "lora.use_dora": ("lora", {}, True),
    "lora.modules_to_save": ("lora", {}, ["head"]),
    "lora.base_weights": ("lora", {}, "bfloat16"),
    "tokenizer.path": ("new tokenizer", {"tokenizer.vocab_size": None}, "base"),
    "tokenizer.vocab_size": ("new tokenizer", {}, 280),
    "tokenizer.documents_per_source": ("new tokenizer", {}, 2),
    "tokenizer.chat_template": ("chat", {}, "gemma"),
    "tokenizer.added_tokens": ("text", {}, ["fox"]),
    "tokenizer.additional_special_tokens": ("text", {}, ["<a>"]),
    "data.source": ("text", {}, "more.jsonl"),
    "data.sources.*.path": ("two", {}, "more.jsonl"),
    "data.sources.*.name": ("two", {}, "other"),
    "data.sources.*.weight": ("two", {}, 5.0),
    "data.sources.*.config": ("two", {}, "a"),
    "data.sources.*.revision": ("two", {}, "a"),
    "data.sources.*.split": ("two", {}, "test"),
    "data.sources.*.text_column": ("two", {}, "body"),
    "data.sources.*.messages_column": ("two", {}, "talk"),
    "data.sources.*.columns": ("two", {}, {"text": "body"}),
    "data.sources.*.separator": ("two", {"data.sources.*.path": "lines.txt"}, "|"),
    "data.sources.*.row_format": ("two", {}, "nonsense"),
    "data.sources.*.streaming": ("two", {}, True),
    "data.sources.*.documents": ("two", {}, 20),
    "data.sources.*.on_bad_row": ("bad rows", {}, "skip"),
    "data.sources.*.retry_for": ("two", {}, 1.0),
    "data.phases.*.until_tokens": ("phases", {}, 64),
    "data.phases.*.weights": ("phases", {}, {"more": 1.0}),
    "data.when_exhausted": ("two", {"train.max_steps": 40}, "stop"),
    "data.streaming": ("text", {}, True),
    "data.shuffle_buffer": ("stream", {}, 0),
    "data.cleaning.exact_duplicates": ("copies", {}, True),
    "data.cleaning.near_duplicates": ("copies", {}, 0.8),
    "data.cleaning.min_characters": ("text", {}, 85),
    "data.cleaning.max_characters": ("text", {}, 60),
    "data.cleaning.min_words": ("text", {}, 20),
    "data.cleaning.max_words": ("text", {}, 15),
    "data.cleaning.scripts": ("copies", {}, ["Latin"]),
    "data.cleaning.min_script_share": ("copies", {"data.cleaning.scripts": ["Latin"]}, 0.1),
    "data.cleaning.min_letter_share": ("text", {}, 0.98),
    "data.cleaning.evaluation": ("text", {}, ["more.txt"]),
    "data.cleaning.evaluation_words": ("text", {"data.cleaning.evaluation": ["more.txt"]}, 40),
    "data.text_column": ("text", {}, "body"),
    "data.messages_column": ("chat", {}, "talk"),
    "data.columns": ("text", {}, {"text": "body"}),
    "data.separator": ("text", {"data.source": "lines.txt"}, "|"),
    "data.on_bad_row": ("text", {"data.source": "bad.jsonl"}, "skip"),
    "data.on_long_conversation": ("chat", {}, "skip"),
    "data.validation.path": ("validation", {}, "text.jsonl"),
    "data.validation.name": ("validation", {}, "w"),
    "data.validation.weight": ("validation", {}, 2.0),
    "data.validation.config": ("validation", {}, "a"),
    "data.validation.revision": ("validation", {}, "a"),
    "data.validation.split": ("validation", {}, "test"),
    "data.validation.text_column": ("validation", {"data.validation.path": "text.jsonl"}, "body"),
    "data.validation.messages_column": ("validation", {}, "talk"),
    "data.validation.columns": ("validation", {"data.validation.path": "text.jsonl"}, {"text": "body"}),
    "data.validation.separator": ("validation", {"data.validation.path": "lines.txt"}, "|"),
    "data.validation.row_format": ("validation", {}, "nonsense"),
    "data.validation.streaming": ("validation", {}, True),
    "data.validation.documents": ("validation", {}, 3),
    "data.validation.on_bad_row": ("validation", {"data.validation.path": "bad.jsonl"}, "skip"),
    "data.validation.retry_for": ("validation", {}, 1.0),
    "data.validation_fraction": ("text", {}, 0.3),
    "data.separate_documents": ("text", {}, True),
    "data.documents": ("stories", {}, 9),
    "data.primer_documents": ("stories", {}, 5),
    "data.validation_documents": ("stories", {}, 3),
    "train.sequence_length": ("text", {}, 16),
    "train.tokens_per_step": ("text", {}, 64),
    "train.micro_batch_tokens": ("text", {}, 32),
    "train.max_tokens": ("text", {"train.max_steps": None}, 256),
    "train.max_steps": ("text", {}, 4),
    "train.num_train_epochs": ("text", {"train.max_steps": None}, 0.2),
    "train.optimizer": ("text", {}, "lion"),
    "train.learning_rate": ("text", {}, 0.02),
    "train.muon_learning_rate": ("text", MUON, 0.05),
    "train.muon_momentum": ("text", MUON, 0.5),
    "train.muon_beta2": ("text", MUON, 0.5),
    "train.lr_scheduler_type": ("text", {"train.max_steps": 6}, "linear"),
    "train.min_learning_rate_ratio": ("text", {}, 0.5),
    "train.warmup_steps": ("text", {}, 3),
    "train.warmup_ratio": ("text", {"train.warmup_steps": None}, 0.9),
    "train.lr_schedule_steps": ("text", {}, 6),
    "train.lr_decay_ratio": ("text", WSD, 0.7),
    "train.weight_decay": ("text", {}, 0.5),
    "train.adam_beta1": ("text", {}, 0.5),
    "train.adam_beta2": ("text", {}, 0.5),
    "train.adam_epsilon": ("text", {}, 0.1),
    "train.max_grad_norm": ("text", {}, 0.01),
    "train.logging_steps": ("text", {}, 3),
    "train.eval_steps": ("text", {}, 1),
    "train.save_steps": ("text", {"train.save_total_limit": 9}, 1),
    "train.save_total_limit": ("text", {"train.eval_steps": 1}, 1),
    "train.early_stopping_patience": ("text", {"train.eval_steps": 1, "train.learning_rate": 9.0,
                                               "train.max_steps": 8}, 1),
    "train.sample_prompts": ("text", {}, ["fox"]),
    "train.sample_tokens": ("text", {}, 9),
    "train.report_to": ("text", {}, ["tensorboard"]),
    "train.device": ("text", {}, "cuda:77"),
    "train.precision": ("text", {}, "bfloat16"),
    "distillation.teacher": ("distill", {}, "base"),
    "distillation.cache": ("distill", {}, "no-cache"),
    "distillation.reads": ("distill", {}, "conversations"),
    "distillation.alpha": ("distill", {}, 0.9),
    "distillation.temperature": ("distill", {}, 1.0),
    "distillation.divergence": ("distill", {}, "js"),
    "distillation.top_k": ("distill", {}, 3),
    "distillation.hidden_weight": ("distill", {}, 1.0),
    "guard.max_skipped": ("text", {"guard.max_spike": 1.0001, "train.max_steps": 40}, 1),
    "guard.on_divergence": ("text", {"guard.max_spike": 1.0001, "guard.max_skipped": 1, "train.max_steps": 40},
                            "rollback"),
    "guard.max_spike": ("text", {"train.max_steps": 40}, 1.0001),
    "guard.window": ("text", {"guard.max_spike": 1.05, "train.max_steps": 60, "guard.max_skipped": 99}, 16),
    "guard.rollback_learning_rate_ratio": ("text", {}, 0.9),
    "guard.max_idle": ("text", {"train.learning_rate": 1e-40, "train.max_steps": 12}, 2),
    "guard.max_rollbacks": ("text", {}, 9),
    "preference.loss": ("pairs", {}, "simpo"),
    "preference.beta": ("pairs", {}, 3.0),
    "preference.simpo_gamma": ("pairs", {"preference.loss": "simpo"}, 3.0),
    "preference.rpo_alpha": ("pairs", {}, 3.0),
    "preference.label_smoothing": ("pairs", {}, 0.3),
    # As many steps as the divergence, which one of both losses subtracts, needs to be above 0.
    "kto.loss": ("judged", {"train.max_steps": 6, "train.learning_rate": 0.05}, "apo_zero_unpaired"),
    "kto.beta": ("judged", {}, 3.0),
    "kto.desirable_weight": ("judged", {}, 3.0),
    "kto.undesirable_weight": ("judged", {}, 3.0),
    "grpo.prompts_per_step": ("questions", {}, 3),
    "grpo.num_generations": ("questions", {}, 3),
    "grpo.max_new_tokens": ("questions", {}, 3),
    "grpo.temperature": ("questions", {}, 9.0),
    "grpo.reward": ("questions", {}, "nonsense"),
    "grpo.loss": ("questions", {}, "grpo"),
    "grpo.beta": ("questions", {}, 0.5),
}  # fmt: skip
# Keys whose effect is the same model by another way, or needs several processes: where that is shown.
ELSEWHERE = {
    "license": "tests/workflows/test_model_card.py",
    "train.gradient_checkpointing": "tests/test_families_life.py",
    "train.compile": "tests/training/test_compilation.py",
    "train.parallel": "tests/training/test_distributed.py",
    "train.ddp_timeout": "tests/hosts/test_hosts.py",
    **dict.fromkeys(
        (
            "train.eval_tasks",
            "train.eval_tasks_steps",
            "train.eval_task_data",
            "train.eval_limit",
            "train.eval_max_new_tokens",
            "train.metric_for_best_model",
        ),
        "tests/workflows/evaluation/test_during_training.py",
    ),
}


def train_until(content: dict[str, Any], stop_at: int | None, reporter: Reporter) -> None:
    """A run of a recipe; with `stop_at` it is asked to stop after that step."""
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(range(1, 1000))
        if stop_at is not None:
            is_set = property(lambda stop: next(steps) >= stop_at, lambda stop, value: None)
            patch.setattr(StopRequested, "is_set", is_set, raising=False)
        try:
            train_recipe(load_settings(Recipe, content), reporter, force=True)
        except RunStopped:
            assert stop_at is not None
