"""What a family's config says, reduced to the choices that the decoder makes: a frozen value, no branch in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer.

    `scaling` is None, or Llama 3's stretch: (factor, low_freq_factor, high_freq_factor, original positions).
    """

    theta: float
    scaling: tuple[float, float, float, int] | None = None


@dataclass(frozen=True)
class Layer:
    """What one block does that its neighbours may not."""

    rope: Rope


@dataclass(frozen=True)
class Architecture:
    """Every choice of the decoder. Its depth is the length of `layers`."""

    vocab_size: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    layers: tuple[Layer, ...]
    activation: str
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    attention_dropout: float
    hidden_dropout: float
