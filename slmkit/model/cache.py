"""The KV cache: keys and values of the positions read so far, so that each new token costs one position.

A layer that sees the whole past has room for all of it; one with a window of w positions has room for w, and the
newest takes the place of the oldest (a ring). Rows of different lengths are padded on the left, so that their next
tokens stand in one column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slmkit.model.architecture import Architecture
from slmkit.model.rope import Rope
from slmkit.model.rotary import Rotation


class KVCache:
    """Room for `max_length` positions, allocated once; attention sees only what is filled.

    `padding` [batch] says how many columns at the left of each row are padding; None: none anywhere.
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
        self.length = 0  # positions read by every layer; moved on by the decoder after its last layer

    def expect(self, new: int) -> None:
        """Raises `ValueError` where so many new positions have no room."""
        if self.length + new > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} positions, not for {self.length + new}")

    def repeat(self, times: int) -> None:
        """Each row so many times, side by side: several texts that begin alike."""
        self.keys = [keys.repeat_interleave(times, dim=0) for keys in self.keys]
        self.values = [values.repeat_interleave(times, dim=0) for values in self.values]
        self.padding = None if self.padding is None else self.padding.repeat_interleave(times)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions [batch, kv_heads, new, dim]; returns those that can be seen, where `seen` says."""
        return self._extend(self.keys[layer], key), self._extend(self.values[layer], value)

    def _extend(self, held: Tensor, fresh: Tensor) -> Tensor:
        past, new, slots = self.length, fresh.size(2), held.size(2)
        end = past + new
        if end <= slots or new == 1:
            slot = past % slots
            held[:, :, slot : slot + new] = fresh
            return held[:, :, : min(end, slots)]
        # More than the ring holds: the new ones see the past in order, and the last of all take the ring.
        kept = torch.arange(max(0, past - slots), past, device=held.device) % slots
        seen = torch.cat((held[:, :, kept], fresh.to(held.dtype)), dim=2)
        last = torch.arange(end - slots, end, device=held.device) % slots
        held[:, :, last] = seen[:, :, -slots:]
        return seen

    def seen(self, window: int | None, new: int, device: torch.device) -> Tensor:
        """Which columns the keys that `extend` returns come from, in their order.  [seen]"""
        past, slots = self.length, min(window or self.max_length, self.max_length)
        if past + new <= slots:
            return torch.arange(past + new, device=device)
        if new == 1:  # slot s was last written at the newest column that falls on it
            return past - (past - torch.arange(slots, device=device)) % slots
        return torch.arange(max(0, past - slots), past + new, device=device)

    def starts(self, columns: Tensor) -> Tensor | None:
        """Where the text of each of `columns` [new] begins: after the padding, or in it at 0.  [batch, new]"""
        if self.padding is None:
            return None
        padding = self.padding[:, None]
        return torch.where(columns >= padding, padding, 0)
