"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and Llama 3's stretch of it to long contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slmkit.model.architecture import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """How far each pair of channels turns per position, in radians: theta^(-2i / head_dim).  [head_dim / 2]"""
    frequencies = rope.theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return frequencies if rope.scaling is None else _llama3_stretch(frequencies, *rope.scaling)


def _llama3_stretch(frequencies: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """Slow channels turn `factor` times slower, fast ones as before, those between by a smooth mixture of both.

    Slow and fast are told by how many whole turns a channel makes within the original context: fewer than `low`
    or more than `high` (Llama 3.1's reference implementation).
    """
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as before, 0: stretched in full
    return kept * frequencies + (1 - kept) * frequencies / factor


class RotaryTable(torch.nn.Module):
    """Cosines and sines of one `Rope`, computed from positions once a forward and shared by its layers."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", inverse_frequencies(rope, head_dim), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [sequence] → cosines and sines, each [sequence, head_dim], float32 under autocast too."""
        angles = positions[:, None] * self.frequencies[None, :]  # [sequence, head_dim / 2]
        angles = torch.cat((angles, angles), dim=-1)  # [sequence, head_dim]
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn channel i together with channel i + head_dim / 2, as Hugging Face's weights expect.

    x [batch, heads, sequence, head_dim]; cosines and sines [sequence, head_dim].
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cosines + turned * sines).to(x.dtype)
