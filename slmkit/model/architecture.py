"""What a family's config says, reduced to the choices that the decoder makes: a frozen value, no branch in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slmkit.config import UserError
from slmkit.model.rope import Rope


@dataclass(frozen=True)
class Layer:
    """What one block does that its neighbours may not."""

    rope: Rope | None = None  # None: queries and keys are not turned
    window: int | None = None  # how many positions a query sees, its own included; None: the whole past


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): how wide its compressed and its turned parts are."""

    query_rank: int | None  # None: queries are not compressed
    kv_rank: int
    rope_dim: int  # channels of a head that turn, in keys shared by all heads
    plain_dim: int  # channels of a head that do not
    value_dim: int
    neighbours_turn: bool  # channels 2i and 2i + 1 turn together, instead of i and i + rope_dim / 2


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
    norm_at: Literal["pre", "post", "both"]  # of a branch: before it, after it, or at both ends
    qk_norm: Literal["none", "head", "width"]  # over the channels of one head, or over all heads' together
    activation: str
    gated_mlp: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    attention_scale: float  # what q·k is multiplied by
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
        """What a layer's KV cache holds of a position: heads, numbers of a key, numbers of a value."""
        if self.latent is None:
            return self.kv_heads, self.head_dim, self.head_dim
        # One latent for all heads, keys and values both, and the key channels that turn beside it.
        return 1, self.latent.kv_rank + self.latent.rope_dim, 0
