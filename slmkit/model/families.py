"""The families: for each one function from its config to an `Architecture`, and one table of weight names.

A table pairs our name with the reference implementation's, one to one, and serves both directions; `{}` is the
layer's number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slmkit.config import UserError, did_you_mean
from slmkit.model.architecture import Architecture, Layer, Rope
from slmkit.model.config import SLMConfig

NameTable = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Family:
    architecture: Callable[[SLMConfig], Architecture]
    names: NameTable


def architecture_of(config: SLMConfig) -> Architecture:
    """The decoder's choices for a config. Raises `UserError` for a family that is not held here."""
    return _family(config).architecture(config)


def published_names(config: SLMConfig) -> dict[str, str]:
    """Our parameter name → the name in `model.safetensors`, for every parameter the family may have."""
    depth = config.num_hidden_layers
    return {
        ours.format(i): theirs.format(i)
        for ours, theirs in _family(config).names
        for i in range(depth if "{}" in ours else 1)
    }


def _family(config: SLMConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model_type {config.model_type!r} is not held here; {did_you_mean(config.model_type, FAMILIES)}"
        )
    return FAMILIES[config.model_type]


def _rope(config: SLMConfig) -> Rope:
    rope = config.rope_parameters
    kind, theta = rope.get("rope_type", "default"), float(rope.get("rope_theta", 10_000.0))
    if kind == "default":
        return Rope(theta)
    if kind == "llama3":
        factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        return Rope(theta, (factor, low, high, int(rope["original_max_position_embeddings"])))
    raise UserError(f"rope_parameters.rope_type {kind!r} is not held here; known: default, llama3")


def _llama(config: SLMConfig) -> Architecture:
    return Architecture(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp_width=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        layers=(Layer(rope=_rope(config)),) * config.num_hidden_layers,
        activation=config.hidden_act,
        norm_eps=config.rms_norm_eps,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        tied=config.tie_word_embeddings,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
    )


def _linear(ours: str, theirs: str) -> NameTable:
    return tuple((f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias"))


_LLAMA_NAMES: NameTable = (
    ("embedding.weight", "model.embed_tokens.weight"),
    ("blocks.{}.attention_in.weight", "model.layers.{}.input_layernorm.weight"),
    *_linear("blocks.{}.attention.query", "model.layers.{}.self_attn.q_proj"),
    *_linear("blocks.{}.attention.key", "model.layers.{}.self_attn.k_proj"),
    *_linear("blocks.{}.attention.value", "model.layers.{}.self_attn.v_proj"),
    *_linear("blocks.{}.attention.out", "model.layers.{}.self_attn.o_proj"),
    ("blocks.{}.mlp_in.weight", "model.layers.{}.post_attention_layernorm.weight"),
    *_linear("blocks.{}.mlp.gate", "model.layers.{}.mlp.gate_proj"),
    *_linear("blocks.{}.mlp.up", "model.layers.{}.mlp.up_proj"),
    *_linear("blocks.{}.mlp.down", "model.layers.{}.mlp.down_proj"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
)

FAMILIES: dict[str, Family] = {"llama": Family(_llama, _LLAMA_NAMES)}
