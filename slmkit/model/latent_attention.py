"""Multi-head latent attention: the cache holds one short latent per position instead of every head's key and value.

    latent, rotary key = latent(x)                                      cached: kv_rank + rope_dim numbers
    plain key, value of each head = key_value(norm(latent))
    score = plain query · plain key + rotary query · rotary key

DeepSeek-V2 (arXiv:2405.04434), section 2.1. RoPE does not commute with the projection from the latent, so it is applied
to separate channels, whose key all heads share.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from slmkit.model.architectures import Architecture, Latent
from slmkit.model.attend import AttentionInputs, attend
from slmkit.model.cache import KVCache
from slmkit.model.norms import RMSNorm
from slmkit.model.rope import rotate

EPS = 1e-6  # of the norms on latents, independent of `rms_norm_eps`


class LatentAttention(nn.Module):
    """Causal self-attention over latents, which decoding does not expand.  [batch, new, width] → same"""

    def __init__(self, a: Architecture, latent: Latent, index: int) -> None:
        super().__init__()
        self.index, self.heads, self.sizes = index, a.heads, latent
        self.scale, self.cap, self.dropout = a.attention_scale, a.attention_cap, a.attention_dropout
        query_dim = a.heads * (latent.plain_dim + latent.rope_dim)
        self.query: nn.Module = nn.Linear(a.width, query_dim, bias=False)
        if latent.query_rank is not None:
            down = nn.Linear(a.width, latent.query_rank, bias=a.qkv_bias)
            norm = RMSNorm(latent.query_rank, eps=EPS)
            up = nn.Linear(latent.query_rank, query_dim, bias=False)
            self.query = nn.Sequential(OrderedDict(down=down, norm=norm, up=up))
        self.latent = nn.Linear(a.width, latent.kv_rank + latent.rope_dim, bias=a.qkv_bias)
        self.latent_norm = RMSNorm(latent.kv_rank, eps=EPS)
        self.key_value = nn.Linear(latent.kv_rank, a.heads * (latent.plain_dim + latent.value_dim), bias=False)
        self.out = nn.Linear(a.heads * latent.value_dim, a.width, bias=a.out_bias)

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None) -> Tensor:
        q_plain, q_rope, latent, k_rope = self._latents(x, inputs, cache)
        if cache is not None and cache.is_read_by_few(x.size(1)):
            y = self._absorbed(q_plain, q_rope, latent, k_rope, inputs)
        else:
            q, k, v = self._expanded(q_plain, q_rope, latent, k_rope)
            y = attend(q, k, v, inputs, self.scale, self.cap, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))  # y [batch, heads, new, value_dim] → [batch, new, width]

    def queries_keys_values(self, x: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `attend`: q, k [batch, heads, new, plain_dim + rope_dim], v [batch, heads, new, value_dim]."""
        return self._expanded(*self._latents(x, inputs, None))

    def _latents(
        self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries' plain and rotary channels [batch, heads, new, …], latents and rotary keys [batch, 1, seen, …]."""
        sizes = self.sizes
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, new, plain_dim + rope_dim]
        q_plain, q_rope = q.split([sizes.plain_dim, sizes.rope_dim], dim=-1)
        latent, k_rope = self.latent(x)[:, None].split([sizes.kv_rank, sizes.rope_dim], dim=-1)  # [batch, 1, new, …]
        latent = self.latent_norm(latent)
        q_rope = rotate(self._halves(q_rope), inputs.rope_q)
        k_rope = rotate(self._halves(k_rope), inputs.rope_k)
        if cache is not None:
            seen, _ = cache.extend(self.index, torch.cat((latent, k_rope), dim=-1), latent[..., :0])
            latent, k_rope = seen.split([sizes.kv_rank, sizes.rope_dim], dim=-1)  # [batch, 1, seen, …]
        return q_plain, q_rope, latent, rotate(k_rope, inputs.rope_seen)

    def _expanded(
        self, q_plain: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every head's queries, keys and values: fewest FLOPs when many positions are read at once."""
        expanded = self.key_value(latent[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_plain, v = expanded.split([self.sizes.plain_dim, self.sizes.value_dim], dim=-1)  # [batch, heads, seen, …]
        k = torch.cat((k_plain, k_rope.to(k_plain.dtype).expand(-1, self.heads, -1, -1)), dim=-1)
        return torch.cat((q_plain, q_rope), dim=-1), k, v

    def _absorbed(
        self, q_plain: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, inputs: AttentionInputs
    ) -> Tensor:
        """q · (W_k latent) = (W_k^T q) · latent: attention over the latents, which are one key for all heads."""
        weight = self.key_value.weight.unflatten(0, (self.heads, -1))  # [heads, plain_dim + value_dim, kv_rank]
        to_key, to_value = weight.split([self.sizes.plain_dim, self.sizes.value_dim], dim=1)
        q = torch.cat((q_plain @ to_key, q_rope), dim=-1)  # [batch, heads, 1, kv_rank + rope_dim]
        k = torch.cat((latent, k_rope), dim=-1)  # [batch, 1, seen, kv_rank + rope_dim]
        return attend(q, k, latent, inputs, self.scale, self.cap, 0.0) @ to_value.mT

    def _halves(self, x: Tensor) -> Tensor:
        """x [..., rope_dim] with channels in the order in which `rotate` pairs them."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.sizes.neighbours_turn else x
