"""KV cache: keys and values of the positions read so far, one text a slot.

Texts of different lengths share a forward pass: each is continued at its own length, and masks (`context.py`) tell
their positions apart. A layer with full attention stores all positions. One with a window stores as many as its window
and one forward pass need, and the newest replace the oldest: position p is in column p % columns (a ring buffer).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slmkit.model.architectures import Architecture
from slmkit.model.rope import Rope, Rotation

AT_ONCE = 256  # new positions in one forward pass, at most


class KVCache:
    """`slots` texts of up to `max_length` positions, allocated once; a forward pass appends at most `at_once` to each.

    `cache[start:stop]` is a cache of consecutive slots that shares the storage.
    """

    def __init__(
        self,
        architecture: Architecture,
        slots: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
        at_once: int = AT_ONCE,
    ) -> None:
        heads, key_dim, value_dim = architecture.cached_per_position
        columns = cached_columns(architecture, max_length, at_once)
        self.max_length, self.at_once = max_length, at_once
        self.keys, self.values = (  # of each layer: [slots, kv_heads, columns, dim]
            [torch.zeros(slots, heads, count, dim, device=device, dtype=dtype) for count in columns]
            for dim in (key_dim, value_dim)
        )
        self.lengths = np.zeros(slots, np.int64)  # positions that a slot's text has
        # Positions ever written since the slot was empty: of a ring, they replaced those `columns` before them.
        self.written = np.zeros(slots, np.int64)
        self.tables: dict[Rope, Rotation] = {}  # cosines and sines of every position, each [max_length, dim]

    def __getitem__(self, slots: slice) -> KVCache:
        part = object.__new__(KVCache)
        part.max_length, part.at_once, part.tables = self.max_length, self.at_once, self.tables
        part.keys, part.values = [keys[slots] for keys in self.keys], [values[slots] for values in self.values]
        part.lengths, part.written = self.lengths[slots], self.written[slots]
        return part

    def expect(self, new: int) -> None:
        """Raises `ValueError` if `new` positions do not fit into every slot, or are too many for one forward pass."""
        if self.longest + new > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} positions, not for {self.longest + new}")
        if new > self.at_once:
            raise ValueError(f"{new} new positions, where this cache takes {self.at_once} at once: read them in pieces")

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions [slots, kv_heads, new, dim]; returns keys and values [slots, kv_heads, seen, dim]."""
        return self._extend(self.keys[layer], key), self._extend(self.values[layer], value)

    def _extend(self, held: Tensor, fresh: Tensor) -> Tensor:
        new, columns, end = fresh.size(2), held.size(2), self.longest + fresh.size(2)
        if self.is_even and end <= columns:
            held[:, :, end - new : end] = fresh
        else:
            places = torch.tensor((self.lengths[:, None] + np.arange(new)) % columns).to(held.device)
            held[torch.arange(held.size(0), device=held.device)[:, None], :, places] = fresh.transpose(1, 2)
        return held[:, :, : min(end, columns)]

    def advance(self, new: int) -> None:
        """Count `new` positions in every slot, after the last layer has stored them."""
        self.lengths += new
        np.maximum(self.written, self.lengths, out=self.written)

    def is_read_by_few(self, new: int) -> bool:
        """Whether `new` positions are so few that latent attention is faster without expanding what is cached."""
        return new == 1

    def positions(self, layer: int, new: int) -> np.ndarray:
        """The position of each key that `extend` returns: [slots, seen], or [1, seen] if all slots have one length.

        Negative where nothing was written yet.
        """
        columns = self.keys[layer].size(2)
        last = (self.lengths[:1] if self.is_even else self.lengths)[:, None] + new - 1
        return last - (last - np.arange(min(self.longest + new, columns))) % columns

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def is_even(self) -> bool:
        """Whether all slots have the same length."""
        return bool((self.lengths == self.lengths[0]).all())

    def copy_slot(self, slot: int, other: KVCache, source: int, length: int) -> None:
        """Let `slot` begin with the first `length` positions of slot `source` of a cache of the same architecture.

        Raises `ValueError` if the other slot does not hold them.
        """
        if not other.holds(source, length):
            raise ValueError(f"slot {source} no longer holds what follows its first {length} positions")
        written = int(other.written[source])
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values)):
            to, of = mine.size(2), theirs.size(2)
            if max(length, written) <= min(to, of):  # a slice is copied in a tenth of the time
                mine[slot, :, :length] = theirs[source, :, :length]
            else:
                kept = np.arange(max(0, length - to, written - of), length)
                mine[slot][:, kept % to] = theirs[source][:, kept % of]
        self.lengths[slot] = length
        self.written[slot] = max(length, written) if written > other.shortest else length

    def swap(self, a: int, b: int) -> None:
        """Exchange what two slots hold."""
        if a == b:
            return
        longest = max(self.length(a), self.length(b))
        for held in (*self.keys, *self.values):
            first, second = held[a, :, :longest], held[b, :, :longest]
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)
        for counts in (self.lengths, self.written):
            counts[[a, b]] = counts[[b, a]]

    def length(self, slot: int) -> int:
        """How many positions a slot's text has."""
        return int(self.lengths[slot])

    def truncate(self, slot: int, length: int) -> None:
        """Forget what a slot holds behind its first `length` positions."""
        self.lengths[slot] = length
        if length == 0:
            self.written[slot] = 0

    def erase(self, slot: int) -> None:
        """Empty a slot, and overwrite what it holds: NaN there would reach others through masked products."""
        for held in (*self.keys, *self.values):
            held[slot] = 0
        self.truncate(slot, 0)

    def holds(self, slot: int, length: int) -> bool:
        """Whether a text can go on behind the first `length` positions of a slot: its windows are not overwritten."""
        written = int(self.written[slot])
        return length <= self.lengths[slot] and (written - length <= self.at_once or written <= self.shortest)

    @property
    def shortest(self) -> int:
        """Columns of the layer that has the fewest: up to there no position was overwritten."""
        return min(keys.size(2) for keys in self.keys)


def cache_bytes(architecture: Architecture, slots: int, max_length: int, at_once: int, itemsize: int) -> int:
    """Size of the keys and values of a `KVCache` with `itemsize` bytes a number."""
    heads, key_dim, value_dim = architecture.cached_per_position
    return slots * sum(cached_columns(architecture, max_length, at_once)) * heads * (key_dim + value_dim) * itemsize


def cached_columns(architecture: Architecture, max_length: int, at_once: int = AT_ONCE) -> list[int]:
    """Positions that each layer stores, for texts of up to `max_length`."""
    return [
        min(layer.window - 1 + at_once if layer.window else max_length, max_length) for layer in architecture.layers
    ]
