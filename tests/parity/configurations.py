"""Legal configurations of each family, drawn at random: small, odd, different in whatever may differ."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

VOCAB, LENGTH, CONTEXT = 67, 24, 128  # tokens known, tokens read at once, positions
PER_FAMILY = 10
Settings = dict[str, Any]

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 16}


def rope(rng: random.Random) -> Settings:
    """One of the scalings, or none, at one of the bases. Dynamic NTK, which a cache cannot follow, is tested apart."""
    factor = rng.choice([1.5, 2.0, 8.0])
    kind: Settings = rng.choice(
        [
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": factor},
            LLAMA3 | {"factor": factor},
            YARN | {"factor": factor},
            YARN | {"factor": factor, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
            YARN | {"factor": factor, "attention_factor": 1.3},
        ]
    )
    return kind | {"rope_theta": rng.choice([100.0, 10_000.0, 500_000.0, 1e6])}


def common(rng: random.Random, divides: bool = True) -> Settings:
    """Sizes. `divides`: hidden_size must be a multiple of the heads."""
    heads = rng.choice([1, 3, 4, 5, 6])
    head_dim = rng.choice([4, 6, 8, 16])
    return {
        "vocab_size": VOCAB,
        "hidden_size": heads * rng.choice([4, 8, 10]) if divides else rng.choice([20, 24, 33]),
        "intermediate_size": rng.choice([24, 35, 48]),
        "num_hidden_layers": rng.choice([2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-2]),
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_parameters": rope(rng),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def window(rng: random.Random) -> int:
    """Shorter than the text that is read, or longer."""
    return rng.choice([1, 2, 5, LENGTH - 1, LENGTH, LENGTH + 20])


def layer_types(rng: random.Random, depth: int) -> list[str]:
    kinds = ["full_attention", "sliding_attention"]
    return [*kinds, *(rng.choice(kinds) for _ in range(depth))][:depth]


def llama(rng: random.Random) -> Settings:
    return common(rng) | {
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "hidden_act": rng.choice(["silu", "gelu_pytorch_tanh", "gelu", "relu2"]),
    }


def qwen3(rng: random.Random) -> Settings:
    settings = common(rng, divides=False) | {"attention_bias": rng.random() < 0.5}
    if rng.random() < 0.5:
        kinds = layer_types(rng, settings["num_hidden_layers"])
        settings |= {"use_sliding_window": True, "sliding_window": window(rng), "layer_types": kinds}
    return settings


def gpt2(rng: random.Random) -> Settings:
    heads = rng.choice([1, 3, 4, 5])
    return {
        "vocab_size": VOCAB,
        "n_embd": heads * rng.choice([3, 5, 8]),
        "n_layer": rng.choice([2, 3]),
        "n_head": heads,
        "n_inner": rng.choice([None, 24, 35]),
        "n_positions": CONTEXT,
        "activation_function": rng.choice(["gelu_new", "gelu", "relu"]),
        "layer_norm_epsilon": rng.choice([1e-5, 1e-2]),
        "tie_word_embeddings": rng.random() < 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def mistral(rng: random.Random) -> Settings:
    return common(rng) | {"sliding_window": rng.choice([None, window(rng), window(rng)])}


def smollm3(rng: random.Random) -> Settings:
    settings = common(rng) | {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    settings |= {"pad_token_id": None, "use_sliding_window": False, "sliding_window": None}
    if rng.random() < 0.5:
        settings["no_rope_layers"] = [rng.randint(0, 1) for _ in range(settings["num_hidden_layers"])]
    if rng.random() < 0.5:
        kinds = layer_types(rng, settings["num_hidden_layers"])
        settings |= {"use_sliding_window": True, "sliding_window": window(rng), "layer_types": kinds}
    return settings


def qwen2(rng: random.Random) -> Settings:
    settings = common(rng)
    del settings["head_dim"]
    if rng.random() < 0.5:
        first = rng.randint(0, settings["num_hidden_layers"])
        settings |= {"use_sliding_window": True, "sliding_window": window(rng), "max_window_layers": first}
    return settings


def olmo2(rng: random.Random) -> Settings:
    return common(rng) | {"attention_bias": rng.random() < 0.5}


def rope_by_kind(rng: random.Random) -> Settings:
    """One for each kind of layer; the reference does not look for `truncate` there."""
    return {
        kind: {key: value for key, value in rope(rng).items() if key != "truncate"}
        for kind in ("full_attention", "sliding_attention")
    }


def olmo3(rng: random.Random) -> Settings:
    kinds = layer_types(rng, 4)
    return common(rng) | {
        "num_hidden_layers": 4,
        "sliding_window": window(rng),
        "layer_types": rng.choice([None, kinds]),
        "rope_parameters": rope_by_kind(rng),
    }


def gemma2(rng: random.Random) -> Settings:
    settings = common(rng)
    return settings | {
        "attention_bias": rng.random() < 0.5,
        "query_pre_attn_scalar": rng.choice([7, 16, 256]),
        "sliding_window": window(rng),
        "layer_types": rng.choice([None, layer_types(rng, settings["num_hidden_layers"])]),
        "attn_logit_softcapping": rng.choice([None, 0.7, 5.0]),
        "final_logit_softcapping": rng.choice([None, 0.7, 5.0]),
        "hidden_activation": rng.choice(["gelu_pytorch_tanh", "silu"]),
    }


def gemma3(rng: random.Random) -> Settings:
    return gemma2(rng) | {"rope_parameters": rope_by_kind(rng), "attn_logit_softcapping": None}


def deepseek(rng: random.Random) -> Settings:
    settings = common(rng)
    del settings["head_dim"]
    settings["num_key_value_heads"] = settings["num_attention_heads"]
    scaled = settings["rope_parameters"]
    if scaled["rope_type"] == "yarn" and "attention_factor" not in scaled:
        scaled |= {"mscale": rng.choice([0.7, 1.0]), "mscale_all_dim": rng.choice([0.8, 1.0])}
    return settings | {
        "q_lora_rank": rng.choice([None, 5, 12]),
        "kv_lora_rank": rng.choice([3, 7, 16]),
        "qk_rope_head_dim": rng.choice([2, 4, 6]),
        "qk_nope_head_dim": rng.choice([1, 5, 8]),
        "v_head_dim": rng.choice([3, 4, 9]),
        "rope_interleave": rng.random() < 0.7,
        "attention_bias": rng.random() < 0.5,
        "first_k_dense_replace": settings["num_hidden_layers"],
    }


# Family → the name of its classes in transformers, and what draws a configuration.
DRAW: dict[str, tuple[str, Callable[[random.Random], Settings]]] = {
    "llama": ("Llama", llama),
    "gpt2": ("GPT2", gpt2),
    "mistral": ("Mistral", mistral),
    "qwen2": ("Qwen2", qwen2),
    "qwen3": ("Qwen3", qwen3),
    "smollm3": ("SmolLM3", smollm3),
    "olmo2": ("Olmo2", olmo2),
    "olmo3": ("Olmo3", olmo3),
    "gemma2": ("Gemma2", gemma2),
    "gemma3_text": ("Gemma3", gemma3),
    "deepseek_v3": ("DeepseekV3", deepseek),
}
