"""What a user writes is checked, and what is published is what transformers reads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmkit.config import UserError
from slmkit.model.config import PRESETS, TRAINING_FIELDS, SLMConfig
from slmkit.model.families import FAMILIES


def test_heads_follow_from_each_other_where_they_are_not_given() -> None:
    config = SLMConfig(hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple"),
        ({"hidden_size": 30, "num_attention_heads": 6}, "even"),
        ({"vocab_size": 0}, "more than 0"),
        ({"sequence_length": 4096, "max_position_embeddings": 128}, "longer"),
        ({"hiden_size": 3}, "unknown key"),
        ({"qk_norm": "head"}, "qk_norm is 'head', which model_type 'llama' does not have; those that do: slm"),
        ({"model_type": "deepseek_v3", "qk_rope_head_dim": 5}, "qk_rope_head_dim must be even for RoPE, found 5"),
        ({"layer_types": ["full_attention"], "model_type": "qwen3"}, "layer_types names 1 layers"),
        ({"layer_types": ["sliding_attention"] * 8, "model_type": "qwen3"}, "sliding_window is not set"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SLMConfig(**changes)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'llama-3.2-1b'"):
        SLMConfig.from_preset("llama-3-1b")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_disk(name: str, tmp_path: Path) -> None:
    config = SLMConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    assert SLMConfig.from_pretrained(tmp_path) == config


def test_training_fields_never_reach_the_models_config(tmp_path: Path) -> None:
    SLMConfig(learning_rate=0.5).save_pretrained(tmp_path)
    assert not TRAINING_FIELDS & json.loads((tmp_path / "config.json").read_text()).keys()


def test_rope_is_written_both_ways_and_read_in_either(tmp_path: Path) -> None:
    config = SLMConfig.from_preset("llama-3.2-1b")
    content = config.published()
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 500_000
    assert content["rope_scaling"]["factor"] == 32
    for older in (["rope_theta", "rope_scaling"], ["rope_parameters"]):
        spelled = {k: v for k, v in content.items() if k in older or not k.startswith("rope")}
        (tmp_path / "config.json").write_text(json.dumps(spelled))
        assert SLMConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_a_window_of_a_family_without_windows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "sliding_window": 512}))
    with pytest.raises(UserError, match="sliding_window is 512, which model_type 'llama' does not have"):
        SLMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_missing_or_broken_config_is_one_line_with_its_path(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        SLMConfig.from_pretrained(tmp_path)


COMMON = {
    "architectures": ["…"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16", "transformers_version": "4.50.0",
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
}  # fmt: skip
# The keys that published models of each family come with, at small sizes; and what is to be read from them.
PUBLISHED = {
    "gpt2": (
        {
            "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1,
            "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 64, "n_embd": 32,
            "n_head": 4, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0.1, "summary_activation": None,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True}},
            "vocab_size": 300,
        },
        {"hidden_size": 32, "intermediate_size": 128, "hidden_dropout": 0.1, "max_position_embeddings": 64},
    ),
    "llama": (
        COMMON
        | {
            "hidden_act": "silu", "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
            "rope_scaling": None, "rope_theta": 100000, "transformers.js_config": {"dtype": "q4"},
        },
        {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 100000}},
    ),
    "qwen2": (
        COMMON | {"hidden_act": "silu", "max_window_layers": 2, "sliding_window": 32, "use_sliding_window": True},
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2, "sliding_window": 32},
    ),
    "qwen3": (
        COMMON
        | {
            "hidden_act": "silu", "head_dim": 16, "max_window_layers": 4, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": 32, "use_sliding_window": False, "tie_word_embeddings": True,
        },
        {"head_dim": 16, "sliding_window": None, "tie_word_embeddings": True},
    ),
    "gemma3_text": (
        COMMON
        | {
            "_sliding_window_pattern": 2, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "query_pre_attn_scalar": 16,
            "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 8,
            "use_bidirectional_attention": False,
        },
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "smollm3": (
        COMMON
        | {
            "hidden_act": "silu", "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 2,
            "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
            "use_sliding_window": False,
        },
        {"no_rope_layers": [1, 0, 1, 0]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_config_is_read_with_all_its_keys(family: str, tmp_path: Path) -> None:
    content, expected = PUBLISHED[family]
    (tmp_path / "config.json").write_text(json.dumps(content | {"model_type": family}))
    config = SLMConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_interleaved": True}, "rope_interleaved is True: only False is supported"),
        ({"is_causal": False}, "is_causal is False: only True is supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}: only com"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: only 1.0"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5: only",
        ),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"attention_chunk_size": 8}, "attention_chunk_size"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"model_type": "deepseek_v3"}, "first_k_dense_replace is 3: only 4 is supported"),
        ({"model_type": "deepseek_v3", "num_hidden_layers": None}, "first_k_dense_replace is 3: only None"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
    ],
)
def test_what_a_published_config_says_and_is_not_held_is_refused_by_name(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    content = COMMON | {"model_type": "llama", "hidden_act": "silu"} | changes
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        SLMConfig.from_pretrained(tmp_path)


def test_a_number_of_layers_may_be_one_of_numpy() -> None:
    assert SLMConfig(model_type="smollm3", num_hidden_layers=np.int64(4)).no_rope_layers == [1, 1, 1, 0]


@pytest.mark.parametrize("layers", [1_001, 10**12, 10**30, 1e12, 2.5, "4", [4]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "smollm3"])
def test_what_is_no_number_of_layers_is_refused_before_anything_is_made_of_them(
    family: str, layers: object, tmp_path: Path
) -> None:
    content = SLMConfig(model_type=family).published()
    for key in ("layer_types", "no_rope_layers", "n_layer"):
        content.pop(key, None)
    content |= {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(content))
    start = time.process_time()
    for make in (
        lambda: SLMConfig.from_pretrained(tmp_path),
        lambda: SLMConfig(model_type=family, num_hidden_layers=layers),
    ):
        with pytest.raises(
            UserError, match="num_hidden_layers: expected a whole number of at most 1,000, found"
        ) as caught:
            make()
        assert "\n" not in str(caught.value)
    assert time.process_time() - start < 20  # hours, where a list has one entry of each


# Keys of public files that no code of any family reads, and some that only this project's scripts would.
FOREIGN = {
    "_num_labels": 1, "_attn_implementation_autoset": True, "output_past": True, "unsloth_fixed": True,
    "unsloth_version": "2025.1", "n_special": 1, "predict_special_tokens": True, "bad_words_ids": [[3]],
    "finetuning_task": "chat", "max_length": 20, "do_sample": True, "attention_multiplier": 2, "learning_rate": 9.0,
    "sequence_length": 10**9, "something_new": {"a": [1]},
}  # fmt: skip
SILENT = {
    "gradient_checkpointing": False, "tokenizer_class": "GPT2Tokenizer", "quantization_config": None,
    "rope_interleaved": None, "other": None, "another": False, "layer_types": ["full_attention"] * 4,
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_keys_that_no_code_of_the_family_reads_are_named_once_and_change_nothing(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = SLMConfig(model_type=family, num_hidden_layers=4).published()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    plain = SLMConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps(SILENT | content))
    assert SLMConfig.from_pretrained(tmp_path) == plain
    assert not caplog.messages
    path.write_text(json.dumps(content | FOREIGN))
    for _ in range(3):
        assert SLMConfig.from_pretrained(tmp_path) == plain
    (line,) = caplog.messages
    assert line == f"{path}: ignored, since no {family} reads it: {', '.join(sorted(FOREIGN))}"


@pytest.mark.parametrize("beyond", [0, 1, 57])
def test_a_deepseek_whose_layers_are_all_dense_is_read(beyond: int, tmp_path: Path) -> None:
    content = SLMConfig(model_type="deepseek_v3", num_hidden_layers=4).published()
    (tmp_path / "config.json").write_text(json.dumps(content | {"first_k_dense_replace": 4 + beyond}))
    assert SLMConfig.from_pretrained(tmp_path).num_hidden_layers == 4
