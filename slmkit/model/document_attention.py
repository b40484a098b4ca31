"""Attention within documents and windows: FlexAttention skips fully masked blocks (arXiv:2412.05496).

It is compiled for GPUs. Other devices use the same masks as tensors, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# `torch.nn.attention.flex_attention` imports the compiler, which takes seconds: imported only where it is used.
BLOCK = 128  # queries and keys of a block, its default
SMALLEST_HEAD = 16  # channels; the least that its kernels support


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


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, cap: float | None) -> Tensor:
    """As `attend`, without dropout. q [batch, heads, tokens, head_dim], k and v [batch, kv_heads, tokens, …] → as q."""
    score_mod = None if cap is None else _capped_at(cap)
    return _flex(q.device.type)(q, k, v, score_mod, mask, scale, q.size(1) != k.size(1))


@cache
def _capped_at(cap: float) -> Callable[..., Tensor]:
    return lambda score, *place: cap * torch.tanh(score / cap)


@cache
def _flex(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention
