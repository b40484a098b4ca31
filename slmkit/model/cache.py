"""The KV cache: keys and values of the positions read so far, so that each new token costs one position."""

from __future__ import annotations

import torch
from torch import Tensor

from slmkit.model.architecture import Architecture


class KVCache:
    """Room for `max_length` positions in every layer, allocated once; attention sees only what is filled.

    Raises `ValueError` when more positions are written than there is room for.
    """

    def __init__(
        self, architecture: Architecture, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (len(architecture.layers), batch_size, architecture.kv_heads, max_length, architecture.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled in every layer; moved on by the decoder after its last layer

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions [batch, kv_heads, new, head_dim]; returns all of them, the past first."""
        end = self.length + key.size(2)
        if end > self.keys.size(3):
            raise ValueError(f"the cache has room for {self.keys.size(3)} positions, position {end} was asked for")
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]  # [batch, kv_heads, end, head_dim]
