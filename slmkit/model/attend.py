"""Softmax attention: PyTorch's fused kernels, or plain products where those are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.model.context import AttentionInputs, Piece, dense_mask

# In training on a CPU, products beat the fused kernel over rows this short, forward and backward together: two heads of
# 64, two rows of 512: 11 against 16 ms in float32, 1.7 against 5.3 in bfloat16. At 1,024 they take as long, and keep
# more: a number per token, head and seen key.
LONGEST_IN_PRODUCTS = 512  # tokens
SMALLEST_HEAD = 16  # channels; the least that FlexAttention's kernels support


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
