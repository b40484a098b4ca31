"""Attention: the rotations and masks of a forward pass, computed once and shared by layers; and softmax attention under
such a mask, by PyTorch's fused kernels, or by plain products where those are faster.

On GPUs, FlexAttention skips fully masked blocks of documents and windows (arXiv:2412.05496). Other devices use the same
masks as tensors, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.model.architectures import Layer
from slmkit.model.cache import KVCache
from slmkit.model.rope import Rope, Rotation

# A layer with a window attends in blocks of this many queries, each over the keys in reach: smaller blocks mask fewer
# keys, larger ones need fewer calls.
QUERIES_AT_ONCE = 256
# `torch.nn.attention.flex_attention` imports the compiler, which takes seconds: imported only where it is used.
BLOCK = 128  # queries and keys of a block, its default
SMALLEST_HEAD = 16  # channels; the least that FlexAttention's kernels support
# In training on a CPU, products beat the fused kernel over rows this short, forward and backward together: two heads of
# 64, two rows of 512: 11 against 16 ms in float32, 1.7 against 5.3 in bfloat16. At 1,024 they take as long, and keep
# more: a number per token, head and seen key.
LONGEST_IN_PRODUCTS = 512  # tokens


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


def attend(
    q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, scale: float, cap: float | None, dropout: float
) -> Tensor:
    """softmax(scale q·k) v over the keys that `inputs` unmasks; with a cap, softmax(cap tanh(scale q·k / cap)) v.

    q [batch, heads, new, head_dim], k and v [batch, kv_heads, seen, head_dim or another] → [batch, heads, new, v's].
    """
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):  # the meta device has no autocast
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if inputs.pieces:
        return _in_pieces(q, k, v, inputs.pieces, scale, cap, dropout)
    if inputs.blocks is not None:
        if not dropout and min(q.size(-1), v.size(-1)) >= SMALLEST_HEAD:
            return attend_in_blocks(q, k, v, inputs.blocks, scale, cap)
        inputs = replace(inputs, mask=dense_mask(inputs.blocks, q.device), blocks=None)
    if cap is not None:
        return _capped(q, k, v, inputs, scale, cap, dropout)
    trains_on_cpu = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and q.requires_grad
    if trains_on_cpu and inputs.is_causal and q.size(2) <= LONGEST_IN_PRODUCTS and not dropout:
        return causal_products(q, k, v, scale)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=inputs.mask, is_causal=inputs.is_causal, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def _in_pieces(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, cap: float | None, dropout: float
) -> Tensor:
    queries = q.split([piece.mask.size(-2) for piece in pieces], dim=2)
    keys, values = (_Slices.apply(x, *(bound for piece in pieces for bound in piece.keys)) for x in (k, v))
    rows = zip(queries, keys, values, pieces, strict=True)
    return torch.cat(
        [attend(a, b, c, AttentionInputs(mask=piece.mask), scale, cap, dropout) for a, b, c, piece in rows], dim=2
    )


class _Slices(torch.autograd.Function):
    """Slices of [batch, heads, seen, dim] from `bounds[0]` to `bounds[1]`, from `bounds[2]` to `bounds[3]`, ….

    Autograd would allocate the gradient of each slice in full size: quadratic cost for many slices.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *bounds: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.bounds = x.shape, list(zip(bounds[::2], bounds[1::2]))
        return tuple(x[:, :, start:stop] for start, stop in ctx.bounds)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole = gradients[0].new_zeros(ctx.shape)
        for (start, stop), gradient in zip(ctx.bounds, gradients, strict=True):
            whole[:, :, start:stop] += gradient
        return whole, *[None] * 2 * len(ctx.bounds)


def causal_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by batched products with a softmax between; scores are in the type of q.

    q [batch, heads, tokens, head_dim], k and v [batch, kv_heads, tokens, head_dim or another] → as q.
    """
    return _CausalProducts.apply(q * scale, *(_for_every_head(x, q.size(1)) for x in (k, v)))


class _CausalProducts(torch.autograd.Function):
    """Blocks of queries, each over the keys up to its last query: about half of all scores are never computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, _ = q.shape
        block = min(max(tokens // 4, 32), 128)  # queries; measured at 64 to 1,024 tokens
        ctx.blocks = [slice(start, min(start + block, tokens)) for start in range(0, tokens, block)]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [batch * heads, tokens, head_dim]
        future = torch.full((block, block), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        y, kept = v.new_empty(batch, tokens, heads, v.size(-1)).transpose(1, 2), []
        for rows in ctx.blocks:
            scores = q[:, rows] @ k[:, : rows.stop].mT  # [batch * heads, queries, keys]
            scores[:, :, rows] += future[: scores.size(1), : scores.size(1)]
            kept.append(torch.softmax(scores, -1, out=scores))
            y[:, :, rows] = (scores @ v[:, : rows.stop]).unflatten(0, (batch, heads))
        ctx.save_for_backward(q, k, v, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (q, k, v, *kept), y_grad = ctx.saved_tensors, gradients[0].flatten(0, 1)
        q_grad, k_grad, v_grad = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, weights in zip(ctx.blocks, kept):
            to, seen = y_grad[:, rows], slice(rows.stop)
            v_grad[:, seen].baddbmm_(weights.mT, to)
            slopes = torch._softmax_backward_data(to @ v[:, seen].mT, weights, -1, weights.dtype)
            q_grad[:, rows] = slopes @ k[:, seen]
            k_grad[:, seen].baddbmm_(slopes.mT, q[:, rows])
        return tuple(x.unflatten(0, gradients[0].shape[:2]) for x in (q_grad, k_grad, v_grad))


def _capped(
    q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, scale: float, cap: float, dropout: float
) -> Tensor:
    """Attention with a cap on scores, as plain products: no fused kernel supports it on all devices."""
    k, v = (_for_every_head(x, q.size(1)) for x in (k, v))
    scores = (cap * torch.tanh(q @ k.mT * (scale / cap))).float()  # [batch, heads, new, seen]
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if inputs.is_causal else inputs.mask
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if inputs.mask is not None:
        weights = weights * inputs.mask  # padding without any key reads 0, as in the fused kernels
    return F.dropout(weights.to(v.dtype), dropout) @ v


def _for_every_head(x: Tensor, heads: int) -> Tensor:
    """[batch, kv_heads, ...] → [batch, heads, ...]: each key and value head repeated for its query heads."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


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
