"""What depends on positions and not on weights: rotations and masks, made once a forward, shared by layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.model.architecture import Layer
from slmkit.model.cache import KVCache
from slmkit.model.document_attention import block_mask, skips_blocks
from slmkit.model.rope import Rope
from slmkit.model.rotary import Rotation


@dataclass(frozen=True)
class View:
    """What a layer sees of the text, and how it turns queries and keys (None: not)."""

    turn_query: Rotation | None
    turn_new: Rotation | None  # keys before they are cached
    turn_seen: Rotation | None  # all keys that are seen, where their rotation depends on the length of the text
    mask: Tensor | None  # [batch or 1, 1, new, seen], True where a query may look; None: everywhere, or `is_causal`
    is_causal: bool
    blocks: Any = None  # a `BlockMask` in the place of `mask`, where FlexAttention is used


class Context:
    """The views of one forward, one for each kind of layer.

    A text begins at the first column, after the padding of the cache, or where the number in `documents` [batch,
    new] changes: positions are counted from there, and nothing before it is seen. No token sees one where
    `attention_mask` [batch, new] is False.
    """

    def __init__(
        self,
        kinds: Sequence[Layer],
        rotary: Mapping[Rope, nn.Module],
        ids: Tensor,
        cache: KVCache | None,
        documents: Tensor | None,
        attention_mask: Tensor | None = None,
    ) -> None:
        self.cache, self.rotary, self.attention_mask = cache, rotary, attention_mask
        past = cache.length if cache else 0
        self.columns = torch.arange(past, past + ids.size(1), device=ids.device)  # [new]
        self.starts = cache.starts(self.columns) if cache else _starts(documents, self.columns)  # [batch, new] or None
        self.positions = self.columns[None] if self.starts is None else self.columns - self.starts  # [batch or 1, new]
        self.in_blocks = documents is not None and attention_mask is None and skips_blocks(ids.device)
        self.views = [self._view(kind) for kind in kinds]

    def _view(self, kind: Layer) -> View:
        if self.in_blocks and self.starts is not None:
            turn = None if kind.rope is None else self._rotation(kind.rope, self.positions)
            return View(turn, turn, None, None, False, block_mask(self.starts, kind.window))
        mask, is_causal = self._mask(kind)
        if kind.rope is None:
            return View(None, None, None, mask, is_causal)
        rotation = self._rotation(kind.rope, self.positions)
        if self.cache is None or not kind.rope.depends_on_length:
            return View(rotation, rotation, None, mask, is_causal)
        seen = self.cache.seen(kind.window, self.columns.numel(), self.columns.device)
        start = 0 if self.starts is None else self.starts[:, -1:]
        return View(rotation, None, self._rotation(kind.rope, seen[None] - start), mask, is_causal)

    def _rotation(self, rope: Rope, positions: Tensor) -> Rotation:
        table = self.cache.tables.get(rope) if self.cache else None
        if table is None:
            return self.rotary[rope](positions, self.positions.amax(1) + 1)
        cosines, sines = table
        return cosines[positions][:, None], sines[positions][:, None]

    def _mask(self, kind: Layer) -> tuple[Tensor | None, bool]:
        """Column k is seen from column q if it is not after q, of the same text, and in the window."""
        new = self.columns.numel()
        past = self.cache.length if self.cache else 0
        if self.starts is None and self.attention_mask is None:
            if new == 1:
                return None, False  # the cache holds no more than is seen
            if past == 0 and (kind.window is None or new <= kind.window):
                return None, True
        seen = self.cache.seen(kind.window, new, self.columns.device) if self.cache else self.columns
        q, k = self.columns[:, None], seen[None, :]  # [new, 1], [1, seen]
        mask = (k <= q)[None]
        if kind.window is not None:
            mask = mask & (k > q - kind.window)
        if self.starts is not None:
            mask = mask & (k >= self.starts[:, :, None])
        if self.attention_mask is not None:
            mask = mask & self.attention_mask[:, None, :]
        return mask[:, None], False  # [batch or 1, 1, new, seen]


def _starts(documents: Tensor | None, columns: Tensor) -> Tensor | None:
    """Where the document of each column begins: at the newest change of number.  [batch, new]"""
    if documents is None:
        return None
    changed = documents[:, 1:] != documents[:, :-1]
    begins = torch.where(changed, columns[1:], 0)
    return torch.cat((torch.zeros_like(begins[:, :1]), begins.cummax(1).values), dim=1)
