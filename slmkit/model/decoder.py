"""The decoder: token ids in, hidden states out.

    h = embedding(ids)
    h = h + attention(norm(h));  h = h + mlp(norm(h))      in every block
    h = norm(h);  logits = h @ head.T

Which norm, rotation and activation is decided once, in `__init__`, from an `Architecture`; `forward` is the formula.
The head is applied by whoever needs logits (`Decoder.logits`), since a loss rarely needs all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.config import UserError, did_you_mean
from slmkit.model.architecture import Architecture, Layer
from slmkit.model.attend import attend
from slmkit.model.cache import KVCache
from slmkit.model.rope import RotaryTable, rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,  # with the gate below: SwiGLU
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GeGLU
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key and a value head (GQA, arXiv:2305.13245)."""

    def __init__(self, a: Architecture, layer: Layer, index: int) -> None:
        super().__init__()
        self.index, self.rope, self.head_dim, self.dropout = index, layer.rope, a.head_dim, a.attention_dropout
        self.query = nn.Linear(a.width, a.heads * a.head_dim, bias=a.attention_bias)
        self.key = nn.Linear(a.width, a.kv_heads * a.head_dim, bias=a.attention_bias)
        self.value = nn.Linear(a.width, a.kv_heads * a.head_dim, bias=a.attention_bias)
        self.out = nn.Linear(a.heads * a.head_dim, a.width, bias=a.attention_bias)

    def forward(self, x: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        # x [batch, new, width] → [batch, heads or kv_heads, new, head_dim]
        q, k, v = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        cosines, sines = context.rotations[self.rope]
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)  # [batch, kv_heads, past + new, head_dim]
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, context.mask, context.is_causal, dropout)  # [batch, heads, new, head_dim]
        return self.out(y.transpose(1, 2).flatten(2))  # [batch, new, width]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        if a.activation not in ACTIVATIONS:
            raise UserError(f"unknown hidden_act {a.activation!r}; {did_you_mean(a.activation, ACTIVATIONS)}")
        self.activation = ACTIVATIONS[a.activation]
        self.gate = nn.Linear(a.width, a.mlp_width, bias=a.mlp_bias)
        self.up = nn.Linear(a.width, a.mlp_width, bias=a.mlp_bias)
        self.down = nn.Linear(a.mlp_width, a.width, bias=a.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention, then MLP, each behind a norm and added to the residual stream."""

    def __init__(self, a: Architecture, layer: Layer, index: int) -> None:
        super().__init__()
        self.attention_in, self.mlp_in = RMSNorm(a.width, a.norm_eps), RMSNorm(a.width, a.norm_eps)
        self.attention, self.mlp = Attention(a, layer, index), GatedMLP(a)
        self.dropout = nn.Dropout(a.hidden_dropout)

    def forward(self, x: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_in(x), context, cache))
        return x + self.dropout(self.mlp(self.mlp_in(x)))


class Context:
    """What depends on positions and not on weights: made once a forward, looked up by every layer."""

    def __init__(self, rotary: dict, past: int, new: int, device: torch.device) -> None:
        positions = torch.arange(past, past + new, device=device)
        self.rotations = {rope: table(positions) for rope, table in rotary.items()}
        # Nothing past: SDPA's own causal mask. One new token: it sees everything. Otherwise a mask has to say so.
        self.is_causal = past == 0 and new > 1
        self.mask: Tensor | None = None  # [new, past + new], True where a query may look
        if past and new > 1:
            self.mask = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)


class Decoder(nn.Module):
    """A stack of blocks between an embedding and a head, as an `Architecture` describes it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.embedding = nn.Embedding(a.vocab_size, a.width)
        self.dropout = nn.Dropout(a.hidden_dropout)
        self.blocks = nn.ModuleList(Block(a, layer, i) for i, layer in enumerate(a.layers))
        self.norm = RMSNorm(a.width, a.norm_eps)
        self.head = None if a.tied else nn.Linear(a.width, a.vocab_size, bias=False)
        self.ropes = sorted({layer.rope for layer in a.layers}, key=repr)
        self.rotary = nn.ModuleList(RotaryTable(rope, a.head_dim) for rope in self.ropes)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids [batch, new] → hidden states [batch, new, width]; with a cache, ids continue what it holds.

        Raises `UserError` when past and new tokens together are more than the model's positions.
        """
        past, new = cache.length if cache else 0, ids.size(1)
        if past + new > self.architecture.max_positions:
            raise UserError(
                f"{past + new} tokens are more than the model's context of {self.architecture.max_positions}: "
                "shorten the text, or raise max_position_embeddings and train on"
            )
        context = Context(dict(zip(self.ropes, self.rotary)), past, new, ids.device)
        x = self.dropout(self.embedding(ids))  # [batch, new, width]
        for block in self.blocks:
            x = block(x, context, cache)
        if cache is not None:
            cache.length += new
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden states [..., width] → logits [..., vocab_size]."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The matrix from hidden states to logits, tied or not.  [vocab_size, width]"""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of the decoder's own device and precision."""
        weight = self.embedding.weight
        return KVCache(self.architecture, batch_size, max_length, weight.device, weight.dtype)
