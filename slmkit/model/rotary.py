"""Application of RoPE: cosines and sines of a `Rope`, and rotation of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slmkit.model.rope import DynamicNTK, Rope, Yarn, channels

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [batch or 1, 1, sequence, dim]


class Rotary(nn.Module):
    """Cosines and sines of one `Rope`, computed from positions and shared by its layers."""

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        self.frequencies: Tensor
        self.register_buffer("frequencies", rope.frequencies(), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Rotary:
        """Recompute the frequencies in float32 after `to_empty`, `to` or `half`: they are in no file."""
        super()._apply(*args, **kwargs)
        self._compute(self.frequencies.device)
        return self

    def _compute(self, device: torch.device) -> None:
        with torch.device("cpu"):
            self.frequencies = self.rope.frequencies().to(device)

    def forward(self, positions: Tensor, length: Tensor) -> Rotation:
        """positions [batch or 1, sequence], length [batch or 1] of the whole text → `Rotation`, in float32."""
        if self.frequencies.is_meta and not positions.is_meta:  # built on meta, then weights assigned
            self._compute(positions.device)
        frequencies = self.frequencies  # [dim / 2]
        if isinstance(self.rope.scaling, DynamicNTK):
            theta = self.rope.scaling.theta(self.rope.theta, self.rope.dim, length)  # [batch or 1]
            pairs = channels(self.rope.dim).to(length.device)
            frequencies = 1.0 / theta[:, None, None] ** (pairs / self.rope.dim)  # [batch or 1, 1, dim / 2]
        angles = positions[:, :, None] * frequencies  # [batch or 1, sequence, dim / 2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [batch or 1, 1, sequence, dim]
        growth = self.rope.scaling.length if isinstance(self.rope.scaling, Yarn) else 1.0
        return angles.cos() * growth, angles.sin() * growth


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotate channels i and i + dim / 2 as a pair, as Hugging Face's weights expect; None: x unchanged.

    x [batch, heads, sequence, dim] → the same shape and precision.
    """
    if rotation is None:
        return x
    cosines, sines = rotation
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cosines + turned * sines).to(x.dtype)
