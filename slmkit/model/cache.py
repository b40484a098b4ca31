"""KV cache: keys and values of the positions read so far.

A layer with full attention stores all positions; one with a window of w positions stores w, and the newest replaces
the oldest (a ring buffer). Rows of different lengths are padded on the left, so that their next tokens are in one
column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slmkit.model.architectures import Architecture
from slmkit.model.rope import Rope, Rotation


class KVCache:
    """Cache for `max_length` positions, allocated once; attention reads only the filled part.

    `padding` [batch]: number of padding columns at the left of each row; None: no padding.
    """

    def __init__(
        self,
        architecture: Architecture,
        batch_size: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
        padding: Tensor | None = None,
    ) -> None:
        heads, key_dim, value_dim = architecture.cached_per_position
        self.max_length, self.padding = max_length, padding
        self.slots = [min(layer.window or max_length, max_length) for layer in architecture.layers]
        self.keys, self.values = (
            [torch.zeros(batch_size, heads, slots, dim, device=device, dtype=dtype) for slots in self.slots]
            for dim in (key_dim, value_dim)
        )
        self.tables: dict[Rope, Rotation] = {}  # cosines and sines of every position, each [max_length, dim]
        self.length = 0  # positions read by every layer; increased by the decoder after its last layer

    def expect(self, new: int) -> None:
        """Raises `ValueError` if `new` positions do not fit."""
        if self.length + new > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} positions, not for {self.length + new}")

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, adjacent: for several continuations of one prompt."""
        self.keys = [keys.repeat_interleave(times, dim=0) for keys in self.keys]
        self.values = [values.repeat_interleave(times, dim=0) for values in self.values]
        self.padding = None if self.padding is None else self.padding.repeat_interleave(times)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions [batch, kv_heads, new, dim]; returns keys and values [batch, kv_heads, seen, dim]."""
        return self._extend(self.keys[layer], key), self._extend(self.values[layer], value)

    def _extend(self, held: Tensor, fresh: Tensor) -> Tensor:
        past, new, slots = self.length, fresh.size(2), held.size(2)
        end = past + new
        if end <= slots or new == 1:
            slot = past % slots
            held[:, :, slot : slot + new] = fresh
            return held[:, :, : min(end, slots)]
        # More than the ring holds: return the past in order and the new ones, and keep the last of all.
        kept = torch.arange(max(0, past - slots), past, device=held.device) % slots
        seen = torch.cat((held[:, :, kept], fresh.to(held.dtype)), dim=2)
        last = torch.arange(end - slots, end, device=held.device) % slots
        held[:, :, last] = seen[:, :, -slots:]
        return seen

    def seen(self, window: int | None, new: int, device: torch.device) -> Tensor:
        """The columns of the keys that `extend` returns, in their order.  [seen]"""
        past, slots = self.length, min(window or self.max_length, self.max_length)
        if past + new <= slots:
            return torch.arange(past + new, device=device)
        if new == 1:  # slot s holds the newest column that maps to it
            return past - (past - torch.arange(slots, device=device)) % slots
        return torch.arange(max(0, past - slots), past + new, device=device)

    def starts(self, columns: Tensor) -> Tensor | None:
        """The first column of the text of each of `columns` [new]: after the padding, or 0 within it.  [batch, new]"""
        if self.padding is None:
            return None
        padding = self.padding[:, None]
        return torch.where(columns >= padding, padding, 0)
