"""The decoder's choices, derived from a family's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slmkit.config import UserError
from slmkit.model.rope import Rope


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
