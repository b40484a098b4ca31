"""The families: for each one function from its config to an `Architecture`, and one table of weight names.

A table pairs our module's name with the reference implementation's, and serves both directions; `{}` is the layer's
number. Everything else that tells a family apart is data in its row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slmkit.config import UserError
from slmkit.model.architecture import Architecture, Layer
from slmkit.model.rope_settings import rope_of

if TYPE_CHECKING:
    from slmkit.model.config import SLMConfig

Names = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """What slmkit knows of a family.

    `fields` are those of `SLMConfig` that not all families have and this one reads. `defaults` are its own where
    `SLMConfig`'s would be wrong; a function gets the other fields.
    """

    class_name: str  # `architectures` in config.json
    architecture: Callable[[SLMConfig], Architecture]
    names: Names
    fields: frozenset[str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Of config.json: what a missing key means, our fields that are spelled otherwise, keys with one legal value, and
    # keys that follow from others (None: read and dropped, never written).
    absent: Mapping[str, Any] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Callable[[dict[str, Any]], Any] | None] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()  # endings of the names of matrices that are stored [in, out]


def family_of(model_type: str) -> Family:
    """Raises `UserError` for a family that is not held here."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not held here; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def architecture_of(config: SLMConfig) -> Architecture:
    """The decoder's choices for a config. Raises `UserError` for a family that is not held here."""
    return family_of(config.model_type).architecture(config)


def optional_fields() -> frozenset[str]:
    """The fields of `SLMConfig` that some families have and others do not."""
    return frozenset().union(*(family.fields for family in FAMILIES.values()))


def _layers(config: SLMConfig) -> tuple[Layer, ...]:
    """What the config says of each layer: its rotation, by kind where kinds differ in it, and its window."""
    depth, positions = config.num_hidden_layers, config.max_position_embeddings
    kinds = config.layer_types or ["sliding_attention" if config.sliding_window else "full_attention"] * depth
    turns = config.no_rope_layers or [1] * depth  # 1: does turn
    return tuple(
        Layer(
            rope=rope_of(config.rope_parameters, kind, config.head_dim, positions) if turn else None,
            window=config.sliding_window if kind == "sliding_attention" else None,
        )
        for kind, turn in zip(kinds, turns)
    )


def _llama(config: SLMConfig, **choices: Any) -> Architecture:
    """Llama 3.2, and what others have in common with it: `choices` are where they differ."""
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp_width": config.intermediate_size,
        "max_positions": config.max_position_embeddings,
        "layers": _layers(config),
        "norm": "rms",
        "norm_eps": config.rms_norm_eps,
        "norm_at": "pre",
        "qk_norm": "none",
        "activation": config.hidden_act,
        "gated_mlp": True,
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tied": config.tie_word_embeddings,
        "attention_scale": config.head_dim**-0.5,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
    }
    return Architecture(**common | choices)


def _qwen3(config: SLMConfig) -> Architecture:
    return _llama(config, qk_norm="head")


_ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_BLOCK = {
    "blocks.{}.attention.query": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.key": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attention.value": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attention.out": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
}
_QK_NORMS = {
    "blocks.{}.attention.query_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attention.key_norm": "model.layers.{}.self_attn.k_norm",
}
# The reference's `post_attention_layernorm` stands before the MLP where norms come first, elsewhere after attention.
_PRE_NORMS = {
    "blocks.{}.attention_in": "model.layers.{}.input_layernorm",
    "blocks.{}.mlp_in": "model.layers.{}.post_attention_layernorm",
}
_LLAMA_NAMES = _ENDS | _BLOCK | _PRE_NORMS
_QWEN3_NAMES = _LLAMA_NAMES | _QK_NORMS

_ROTARY = frozenset({"num_key_value_heads", "head_dim", "rope_parameters"})
_BIASES = frozenset({"attention_bias", "mlp_bias"})
_WINDOWS = frozenset({"sliding_window", "layer_types"})
_UNTIED = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}


def _layer_types(fields: dict[str, Any], full_every: int | None = None) -> list[str] | None:
    """Layers with the window, every so many of them one without; None where nothing has a window."""
    if not fields["sliding_window"]:
        return None
    layers = range(1, fields["num_hidden_layers"] + 1)
    return ["full_attention" if full_every and i % full_every == 0 else "sliding_attention" for i in layers]


def _first_sliding(fields: dict[str, Any]) -> int:
    """The first layer with a window, as Qwen's older configs say which layers have one; the depth where none has."""
    kinds = fields["layer_types"] or []
    return kinds.index("sliding_attention") if "sliding_attention" in kinds else fields["num_hidden_layers"]


_QWEN_WINDOWS = {
    "use_sliding_window": lambda fields: fields["sliding_window"] is not None,
    "max_window_layers": _first_sliding,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama, _LLAMA_NAMES, _ROTARY | _BIASES, absent=_UNTIED),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _qwen3,
        _QWEN3_NAMES,
        _ROTARY | _WINDOWS | {"attention_bias"},
        defaults={"layer_types": _layer_types},
        absent=_UNTIED | {"head_dim": 128},
        derived=_QWEN_WINDOWS,
    ),
}
