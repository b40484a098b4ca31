"""Presets: the published sizes, and slmkit's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.find import find_config_directory

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8_192,
}

PRESETS: dict[str, dict[str, Any]] = {
    # 1.4 M parameters: learns the built-in stories in minutes on two CPU cores. With 4,096 tokens nearly every word
    # is one token, and heads of 64 channels take a fifth less time than heads of 32.
    "quickstart": {
        "vocab_size": 4_096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 2, "max_position_embeddings": 512,
    },
    "vector-slm": {
        "vocab_size": 16_384, "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 16,
        "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 1_024,
    },
    "vector-clm-50m": {
        "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1_408, "num_hidden_layers": 14,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1_024,
    },
    "smollm2-135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8_192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "llama-3.2-1b": {
        "vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
        "rope_parameters": _LLAMA3_ROPE, "bos_token_id": 128_000, "eos_token_id": 128_001,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1_024, "intermediate_size": 3_072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "bos_token_id": 151_643, "eos_token_id": 151_645,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50_257, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 1_024,
        "attention_dropout": 0.1, "hidden_dropout": 0.1, "bos_token_id": 50_256, "eos_token_id": 50_256,
    },
    # 30.0 M parameters, 19.3 M of them in the tied embedding.
    "smallm-60m": {
        "model_type": "gpt2", "vocab_size": 50_257, "hidden_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 6, "max_position_embeddings": 128,
        "attention_dropout": 0.1, "hidden_dropout": 0.1, "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2_048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "max_position_embeddings": 32_768, "sliding_window": 512,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
}  # fmt: skip


def find_model_or_preset(name: str | Path) -> Path | str:
    """A directory with the config of a model (from the hub: without its weights), or the name of a preset.

    Raises `UserError` for neither.
    """
    preset = str(name).lower()
    if preset in PRESETS and not Path(name).exists():
        return preset
    if Path(name).exists() or "/" in str(name):
        return find_config_directory(name)
    bare = {"".join(filter(str.isalnum, one)): one for one in PRESETS}
    meant = bare.get("".join(filter(str.isalnum, preset)))
    hint = f"did you mean {meant!r}?" if meant else f"presets: {', '.join(sorted(PRESETS))}"
    raise UserError(f"{name}: neither a preset nor a directory; {hint}")
