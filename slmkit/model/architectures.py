"""From a config to an `Architecture`: one function for each kind of decoder, and the one of each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slmkit.model.architecture import Architecture, Latent, Layer
from slmkit.model.config import SLMConfig
from slmkit.model.families import FULL, family_of
from slmkit.model.rope import DynamicNTK, Yarn, rope_of, yarn_growth


def architecture_of(config: SLMConfig) -> Architecture:
    """The decoder's choices for a config. Raises `UserError` for a family that is not supported."""
    family_of(config.model_type)
    return ARCHITECTURES[config.model_type](config)


def _layers(config: SLMConfig) -> tuple[Layer, ...]:
    """RoPE and window of each layer."""
    depth, positions = config.num_hidden_layers, config.max_position_embeddings
    kinds = config.layer_types or ["sliding_attention" if config.sliding_window else "full_attention"] * depth
    turns = config.no_rope_layers or [1] * depth  # 1: with RoPE
    return tuple(
        Layer(
            rope=rope_of(config.rope_parameters, kind, config.head_dim, positions) if turn else None,
            window=config.sliding_window if kind == "sliding_attention" else None,
        )
        for kind, turn in zip(kinds, turns)
    )


def _positions(config: SLMConfig, layers: tuple[Layer, ...]) -> int:
    """The longest text in tokens: the config's, or with dynamic NTK that times its factor."""
    scalings = [layer.rope.scaling for layer in layers if layer.rope is not None]
    growth = max((scaling.factor for scaling in scalings if isinstance(scaling, DynamicNTK)), default=1.0)
    return round(config.max_position_embeddings * growth)


def llama(config: SLMConfig, **choices: Any) -> Architecture:
    """Llama 3.2, and the base of similar families: `choices` replace its fields."""
    layers = choices.get("layers") or _layers(config)
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp_width": config.intermediate_size,
        "max_positions": _positions(config, layers),
        "layers": layers,
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


def gpt2(config: SLMConfig) -> Architecture:
    return llama(
        config,
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        layers=(Layer(),) * config.num_hidden_layers,
        learned_positions=True,
        norm="layer",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def qwen3(config: SLMConfig) -> Architecture:
    return llama(config, qk_norm="head")


def qwen2(config: SLMConfig) -> Architecture:
    return llama(config, qkv_bias=True)


def olmo2(config: SLMConfig) -> Architecture:
    return llama(config, norm_at="post", qk_norm="width")


def gemma2(config: SLMConfig, **choices: Any) -> Architecture:
    common: dict[str, Any] = {
        "norm": "rms+1",
        "norm_at": "both",
        "embedding_scale": config.hidden_size**0.5,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_cap": config.attn_logit_softcapping,
        "logit_cap": config.final_logit_softcapping,
    }
    return llama(config, **common | choices)


def gemma3(config: SLMConfig) -> Architecture:
    return gemma2(config, qk_norm="head")


def deepseek(config: SLMConfig) -> Architecture:
    latent = Latent(
        query_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        plain_dim=config.qk_nope_head_dim,
        value_dim=config.v_head_dim,
        neighbours_turn=config.rope_interleave,
    )
    layer = Layer(rope_of(config.rope_parameters, FULL, latent.rope_dim, config.max_position_embeddings))
    scale, scaling = (latent.plain_dim + latent.rope_dim) ** -0.5, layer.rope and layer.rope.scaling
    if isinstance(scaling, Yarn) and scaling.mscale_all_dim:  # larger, as for the rotary channels
        scale *= yarn_growth(scaling.factor, scaling.mscale_all_dim) ** 2
    layers = (layer,) * config.num_hidden_layers
    return llama(config, layers=layers, kv_heads=config.num_attention_heads, latent=latent, attention_scale=scale)


def slm(config: SLMConfig) -> Architecture:
    """slmkit's own family: every choice is a config field, for ablations."""
    return llama(
        config,
        norm=config.norm,
        norm_at=config.norm_at,
        qk_norm=config.qk_norm,
        gated_mlp=config.gated_mlp,
        attention_cap=config.attn_logit_softcapping,
        logit_cap=config.final_logit_softcapping,
    )


ARCHITECTURES: dict[str, Callable[[SLMConfig], Architecture]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": llama,
    "olmo2": olmo2,
    "olmo3": olmo2,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "deepseek_v3": deepseek,
    "slm": slm,
}
