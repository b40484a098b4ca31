"""Rotations and masks of a forward pass, computed once and shared by layers.

On GPUs, FlexAttention skips fully masked blocks of documents and windows (arXiv:2412.05496). Other devices use the same
masks as tensors, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slmkit.model.architectures import Layer
from slmkit.model.cache import KVCache
from slmkit.model.rope import Rope, Rotation

# A layer with a window attends in blocks of this many queries, each over the keys in reach: smaller blocks mask fewer
# keys, larger ones need fewer calls.
QUERIES_AT_ONCE = 256
# `torch.nn.attention.flex_attention` imports the compiler, which takes seconds: imported only where it is used.
BLOCK = 128  # queries and keys of a block, its default


@dataclass(frozen=True)
class Piece:
    """A block of consecutive queries, and the keys that its window reaches."""

    keys: tuple[int, int]  # start and end (exclusive) within the seen keys
    mask: Tensor  # [batch or 1, 1, queries, keys], as `AttentionInputs.mask`


@dataclass(frozen=True)
class AttentionInputs:
    """Mask and rotations (None: no RoPE) of one kind of layer."""

    rope_q: Rotation | None = None
    rope_k: Rotation | None = None  # keys before they are cached
    rope_seen: Rotation | None = None  # all seen keys, where their rotation depends on the text's length
    mask: Tensor | None = None  # [batch or 1, 1, new, seen], True: may attend; None: everywhere
    is_causal: bool = False  # instead of `mask`: a query attends to itself and earlier positions
    blocks: Any = None  # a `BlockMask` instead of `mask`, for FlexAttention
    pieces: tuple[Piece, ...] = ()  # instead of `mask`, if a window is shorter than the text


class Context:
    """The `AttentionInputs` of one forward pass, one for each kind of layer.

    With a cache, the new tokens of a row continue its text. Without, a text begins at the first column, or where the
    number in `documents` [batch, new] changes: positions are counted from there, and earlier columns are masked.
    Columns where `attention_mask` [batch, new] is False are masked too.
    """

    def __init__(
        self,
        kinds: Mapping[Layer, int],
        rotary: Mapping[Rope, nn.Module],
        ids: Tensor,
        cache: KVCache | None,
        documents: Tensor | None,
        attention_mask: Tensor | None = None,
    ) -> None:
        self.cache, self.rotary, self.attention_mask = cache, rotary, attention_mask
        self.columns = torch.arange(ids.size(1), device=ids.device)  # [new]
        self.starts = _starts(documents, self.columns)  # [batch, new] or None
        self.positions = self.columns[None] if self.starts is None else self.columns - self.starts  # [batch or 1, new]
        if cache is not None:
            past = cache.lengths[:1] if cache.is_even else cache.lengths
            self.positions = torch.tensor(past[:, None] + np.arange(ids.size(1))).to(ids.device)
        self.in_blocks = cache is None and attention_mask is None and skips_blocks(ids.device)
        self.inputs = [
            self._inputs(kind) if cache is None else self._cached(kind, cache, layer) for kind, layer in kinds.items()
        ]

    def _inputs(self, kind: Layer) -> AttentionInputs:
        rotation, new = self._rotation(kind.rope, self.positions), self.columns.numel()
        rotations = rotation, rotation
        if self.starts is None and self.attention_mask is None:
            if new == 1:
                return AttentionInputs(*rotations)
            if kind.window is None or new <= kind.window:
                return AttentionInputs(*rotations, is_causal=True)
        if self.in_blocks and self.starts is not None:
            return AttentionInputs(*rotations, blocks=block_mask(self.starts, kind.window))
        if kind.window is None or new <= QUERIES_AT_ONCE:
            return AttentionInputs(*rotations, mask=self._mask(kind.window))
        if self.in_blocks:
            return AttentionInputs(*rotations, blocks=window_mask(new, kind.window, self.columns.device))
        return AttentionInputs(*rotations, pieces=tuple(self._pieces(kind.window)))

    def _cached(self, kind: Layer, cache: KVCache, layer: int) -> AttentionInputs:
        """Inputs for new tokens that continue the texts of a cache; `layer`: the number of a layer of this kind."""
        new, rotation = self.columns.numel(), self._rotation(kind.rope, self.positions)
        keys = torch.tensor(cache.positions(layer, new)).to(self.positions.device)  # [batch or 1, seen]
        rotations: tuple[Rotation | None, Rotation | None, Rotation | None] = rotation, rotation, None
        if kind.rope is not None and kind.rope.depends_on_length:
            rotations = rotation, None, self._rotation(kind.rope, keys.clamp(min=0))
        if cache.is_even and (kind.window is None or cache.longest + new <= kind.window):
            if new == 1:
                return AttentionInputs(*rotations)  # all keys are seen
            if cache.longest == 0:
                return AttentionInputs(*rotations, is_causal=True)
        q, k = self.positions[:, :, None], keys[:, None]  # [batch or 1, new, 1], [batch or 1, 1, seen]
        mask = (k >= 0) & (k <= q) if kind.window is None else (k >= 0) & (k <= q) & (k > q - kind.window)
        return AttentionInputs(*rotations, mask=mask[:, None])

    def _rotation(self, rope: Rope | None, positions: Tensor) -> Rotation | None:
        """Cosines and sines at `positions` [batch or 1, tokens]."""
        if rope is None:
            return None
        table = self.cache.tables.get(rope) if self.cache else None
        if table is None:
            return self.rotary[rope](positions, self.positions.amax(1) + 1)
        cosines, sines = table
        return cosines[positions][:, None], sines[positions][:, None]

    def _pieces(self, window: int) -> Iterator[Piece]:
        """Blocks of queries; a block's keys go from the first that its first query sees to its last query's own."""
        new = self.columns.numel()
        for start in range(0, new, QUERIES_AT_ONCE):
            stop = min(start + QUERIES_AT_ONCE, new)
            keys = max(0, start + 1 - window), stop
            yield Piece(keys, self._mask(window, slice(start, stop), slice(*keys)))

    def _mask(self, window: int | None, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Mask in which query q attends to key k if k is not after q, in the same text and in the window.

        [batch or 1, 1, queries, keys]
        """
        q, k = self.columns[queries, None], self.columns[None, keys]  # [queries, 1], [1, keys]
        mask = (k <= q)[None]
        if window is not None:
            mask = mask & (k > q - window)
        if self.starts is not None:
            mask = mask & (k >= self.starts[:, queries, None])
        if self.attention_mask is not None:
            mask = mask & self.attention_mask[:, None, keys]
        return mask[:, None]


def _starts(documents: Tensor | None, columns: Tensor) -> Tensor | None:
    """The first column of each column's document, at the latest change of number.  [batch, new]"""
    if documents is None:
        return None
    changed = documents[:, 1:] != documents[:, :-1]
    begins = torch.where(changed, columns[1:], 0)
    return torch.cat((torch.zeros_like(begins[:, :1]), begins.cummax(1).values), dim=1)


def skips_blocks(device: torch.device) -> bool:
    """Whether this device uses block masks for documents and windows."""
    return device.type == "cuda"


def block_mask(starts: Tensor, window: int | None) -> Any:
    """`BlockMask` in which query q attends to key k if k is not after q, in the same document and in the window.

    `starts` [batch, tokens]: the column in which the document of each column begins.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, tokens = starts.shape
    reach = tokens if window is None else window

    def sees(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= starts[b, q]) & (k > q - reach)

    return create_block_mask(sees, batch, None, tokens, tokens, device=str(starts.device))


def window_mask(tokens: int, window: int, device: torch.device) -> Any:
    """`BlockMask` in which query q attends to key k if k is not after q, and in the window.

    Its blocks are computed from the window, while `create_block_mask` would compute every element first.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def sees(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k > q - window)

    firsts = torch.arange(0, tokens, BLOCK, device=device, dtype=torch.int32)  # [blocks]
    q, k = firsts[:, None], firsts[None]
    reached = (k <= q) & (k + BLOCK - 1 > q - window)  # [query blocks, key blocks]: their last key from the first query
    in_front = reached.int().argsort(dim=1, descending=True, stable=True).int()
    count = reached.sum(1, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        count[None, None], in_front[None, None], BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def dense_mask(mask: Any, device: torch.device) -> Tensor:
    """A `BlockMask` as a tensor.  [batch, 1, tokens, tokens]"""
    from torch.nn.attention.flex_attention import create_mask

    batch, _, tokens, seen = mask.shape
    return create_mask(mask.mask_mod, batch, 1, tokens, seen, device=str(device))
