"""Softmax attention of heads over heads: PyTorch's fused kernel, and the plain products where those are faster."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# On a CPU in bfloat16 the matrix units are so fast that the fused kernel, which works in float32 inside, takes three
# times as long as plain products over rows this short (two heads of 64, two rows of 512: 5.3 against 1.7 ms).
# Their scores are kept for the backward pass: 1 KiB a token and head at 512.
LONGEST_IN_PRODUCTS = 512  # tokens


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, each query over the keys that it may see.

    q [batch, heads, new, head_dim], k and v [batch, kv_heads, seen, head_dim], mask [new, seen] True where a query may
    look (or None) → [batch, heads, new, head_dim].
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    on_cpu_in_bfloat16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if on_cpu_in_bfloat16 and is_causal and q.requires_grad and q.size(2) <= LONGEST_IN_PRODUCTS and not dropout:
        return causal_products(q, k, v)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=grouped
    )


def causal_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as two batched products with a softmax between; scores are in the type of q.

    q [batch, heads, tokens, head_dim], k and v [batch, kv_heads, tokens, head_dim] → as q.
    """
    batch, heads, tokens, head_dim = q.shape
    if heads != k.size(1):
        k, v = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (k, v))
    q, k, v = ((q * head_dim**-0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # [batch * heads, tokens, ...]
    future = torch.full((tokens, tokens), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(future.expand(batch * heads, -1, -1), q, k.mT)  # [batch * heads, tokens, tokens]
    return (scores.softmax(-1) @ v).unflatten(0, (batch, heads))
