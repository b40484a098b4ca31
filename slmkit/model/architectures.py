"""The decoder's choices, and the function from each family's config to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.families import FULL, SLIDING, family_of
from slmkit.model.rope import DynamicNTK, Rope, Yarn, rope_of, yarn_growth


@dataclass(frozen=True)
class Layer:
    """Choices that may differ between layers."""

    rope: Rope | None = None  # None: queries and keys are not rotated
    window: int | None = None  # how many positions a query sees, its own included; None: the whole past


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), in channels."""

    query_rank: int | None  # None: queries are not compressed
    kv_rank: int
    rope_dim: int  # rotary channels of a head; their keys are shared by all heads
    plain_dim: int  # channels of a head without RoPE
    value_dim: int
    neighbours_turn: bool  # channels 2i and 2i + 1 are rotated as a pair, instead of i and i + rope_dim / 2


@dataclass(frozen=True)
class Architecture:
    """Every choice of the decoder."""

    vocab_size: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    layers: tuple[Layer, ...]

    norm: Literal["rms", "rms+1", "layer"]  # rms+1: the weight is stored as an offset from one
    norm_eps: float
    norm_at: Literal["pre", "post", "both"]  # before a branch, after it, or both
    qk_norm: Literal["none", "head", "width"]  # over the channels of one head, or over all heads' together
    activation: str
    gated_mlp: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    attention_scale: float  # factor on q·k
    embedding_scale: float = 1.0
    attention_cap: float | None = None  # soft bounds: cap * tanh(x / cap)
    logit_cap: float | None = None
    learned_positions: bool = False
    latent: Latent | None = None  # None: plain attention
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    @property
    def depth(self) -> int:
        return len(self.layers)

    def expect(self, length: int) -> None:
        """Raises `UserError` for a text longer than the context."""
        if length > self.max_positions:
            raise UserError(
                f"{length} tokens are more than the model's context of {self.max_positions}: "
                "shorten the text, or raise max_position_embeddings and train on"
            )

    @property
    def cached_per_position(self) -> tuple[int, int, int]:
        """Sizes of a layer's KV cache per position: heads, channels of a key, channels of a value."""
        if self.latent is None:
            return self.kv_heads, self.head_dim, self.head_dim
        # One latent for all heads' keys and values, and the rotary key channels.
        return 1, self.latent.kv_rank + self.latent.rope_dim, 0


def architecture_of(config: SLMConfig) -> Architecture:
    """The decoder's choices for a config. Raises `UserError` for a family that is not supported."""
    family_of(config.model_type)
    return ARCHITECTURES[config.model_type](config)


def _layers(config: SLMConfig) -> tuple[Layer, ...]:
    """RoPE and window of each layer."""
    depth, positions = config.num_hidden_layers, config.max_position_embeddings
    kinds: Sequence[str] = config.layer_types or [SLIDING if config.sliding_window else FULL] * depth
    turns = config.no_rope_layers or [1] * depth  # 1: with RoPE
    return tuple(
        Layer(
            rope=rope_of(config.rope_parameters, kind, config.head_dim, positions) if turn else None,
            window=config.sliding_window if kind == SLIDING else None,
        )
        for kind, turn in zip(kinds, turns)
    )


def _positions(config: SLMConfig, layers: tuple[Layer, ...]) -> int:
    """The longest text in tokens: the config's, or with dynamic NTK that times its factor."""
    scalings = [layer.rope.scaling for layer in layers if layer.rope is not None]
    growth = max((scaling.factor for scaling in scalings if isinstance(scaling, DynamicNTK)), default=1.0)
    return round(config.max_position_embeddings * growth)


def llama(config: SLMConfig, **choices: Any) -> Architecture:
    """Llama 3.2, and the base of all families: `choices` replace its fields.

    Fields of the config that a family does not have are at their defaults. The family `slm` has all of them, for
    ablations.
    """
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
        "norm": config.norm,
        "norm_eps": config.rms_norm_eps,
        "norm_at": config.norm_at,
        "qk_norm": config.qk_norm,
        "activation": config.hidden_act,
        "gated_mlp": config.gated_mlp,
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tied": config.tie_word_embeddings,
        "attention_scale": config.head_dim**-0.5,
        "attention_cap": config.attn_logit_softcapping,
        "logit_cap": config.final_logit_softcapping,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
    }
    return Architecture(**common | choices)


def gpt2(config: SLMConfig) -> Architecture:
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    layers = (Layer(),) * config.num_hidden_layers
    return llama(config, layers=layers, learned_positions=True, norm="layer", gated_mlp=False, **biases)


def gemma(config: SLMConfig, **choices: Any) -> Architecture:
    scales = {"embedding_scale": config.hidden_size**0.5, "attention_scale": config.query_pre_attn_scalar**-0.5}
    return llama(config, norm="rms+1", norm_at="both", **scales, **choices)


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
    return llama(config, layers=(layer,) * config.num_hidden_layers, latent=latent, attention_scale=scale)


ARCHITECTURES: dict[str, Callable[[SLMConfig], Architecture]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "qwen2": partial(llama, qkv_bias=True),
    "qwen3": partial(llama, qk_norm="head"),
    "smollm3": llama,
    "olmo2": partial(llama, norm_at="post", qk_norm="width"),
    "olmo3": partial(llama, norm_at="post", qk_norm="width"),
    "gemma2": gemma,
    "gemma3_text": partial(gemma, qk_norm="head"),
    "deepseek_v3": deepseek,
    "slm": llama,
}
