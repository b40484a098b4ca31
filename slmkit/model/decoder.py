"""The decoder: token ids in, hidden states out.

    h = embedding(ids)
    h = h + attention(norm(h));  h = h + mlp(norm(h))      in every block
    h = norm(h);  logits = h @ head.T

Norms, RoPE, windows and latent attention are chosen in `__init__`, from an `Architecture`; `forward` is the formula.
The head is applied by the caller (`Decoder.logits`), since a loss rarely needs all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from slmkit.config import UserError, did_you_mean
from slmkit.model.architectures import Architecture
from slmkit.model.attend import AttentionInputs, Context, attend
from slmkit.model.cache import AT_ONCE, KVCache, cache_bytes
from slmkit.model.latent_attention import LatentAttention
from slmkit.model.norms import make_norm
from slmkit.model.rope import Rotary, rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,  # with a gate: SwiGLU
    "gelu": F.gelu,  # with a gate: GeGLU
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's name for gelu_pytorch_tanh
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # ReLU², Primer (arXiv:2109.08668)
}


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads (GQA, arXiv:2305.13245).  [batch, new, width] → same"""

    def __init__(self, a: Architecture, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, a.head_dim
        self.scale, self.cap, self.dropout = a.attention_scale, a.attention_cap, a.attention_dropout
        self.query = nn.Linear(a.width, a.heads * a.head_dim, bias=a.qkv_bias)
        self.key = nn.Linear(a.width, a.kv_heads * a.head_dim, bias=a.qkv_bias)
        self.value = nn.Linear(a.width, a.kv_heads * a.head_dim, bias=a.qkv_bias)
        self.out = nn.Linear(a.heads * a.head_dim, a.width, bias=a.out_bias)
        per_head, there = a.qk_norm == "head", a.qk_norm != "none"
        self.query_norm = make_norm(a, *(() if per_head else (a.heads,)), a.head_dim, present=there)
        self.key_norm = make_norm(a, *(() if per_head else (a.kv_heads,)), a.head_dim, present=there)

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None) -> Tensor:
        q, k, v = self.queries_keys_values(x, inputs, cache)
        y = attend(q, k, v, inputs, self.scale, self.cap, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))  # [batch, new, width]

    def queries_keys_values(
        self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `attend`: q [batch, heads, new, head_dim], k and v [batch, kv_heads, seen, head_dim]."""
        # x [batch, new, width] → [batch, new, heads or kv_heads, head_dim]
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.query, self.key, self.value))
        q, k, v = self.query_norm(q).transpose(1, 2), self.key_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, inputs.rope_q), rotate(k, inputs.rope_k)  # [batch, heads or kv_heads, new, head_dim]
        if cache is not None:
            k, v = cache.extend(self.index, k, v)  # [batch, kv_heads, seen, head_dim]
        return q, rotate(k, inputs.rope_seen), v


class MLP(nn.Module):
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)) (arXiv:2002.05202).  [..., width] → same

    Raises `UserError` for an unknown activation.
    """

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        if a.activation not in ACTIVATIONS:
            raise UserError(f"unknown hidden_act {a.activation!r}; {did_you_mean(a.activation, ACTIVATIONS)}")
        self.activation = ACTIVATIONS[a.activation]
        self.gate = nn.Linear(a.width, a.mlp_width, bias=a.mlp_bias) if a.gated_mlp else None
        self.up = nn.Linear(a.width, a.mlp_width, bias=a.mlp_bias)
        self.down = nn.Linear(a.mlp_width, a.width, bias=a.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention and MLP with their norms, each added to the residual stream.  [batch, new, width]"""

    def __init__(self, a: Architecture, index: int) -> None:
        super().__init__()
        before, after = a.norm_at in ("pre", "both"), a.norm_at in ("post", "both")
        self.attention_in, self.mlp_in = (make_norm(a, a.width, present=before) for _ in range(2))
        self.attention = Attention(a, index) if a.latent is None else LatentAttention(a, a.latent, index)
        self.mlp = MLP(a)
        self.attention_out, self.mlp_out = (make_norm(a, a.width, present=after) for _ in range(2))
        self.dropout = nn.Dropout(a.hidden_dropout)

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.attention_out(self.attention(self.attention_in(x), inputs, cache)))
        return x + self.dropout(self.mlp_out(self.mlp(self.mlp_in(x))))


class Embedding(nn.Embedding):
    """Without initial values on the meta device, where drawing them would import the compiler, which takes seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., width] → logits [..., vocab_size] of a tied head."""
        return F.linear(hidden, self.weight)


class Decoder(nn.Module):
    """A stack of blocks between an embedding and a head, as an `Architecture` describes it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.embedding = Embedding(a.vocab_size, a.width)
        self.place = Embedding(a.max_positions, a.width) if a.learned_positions else None
        self.dropout = nn.Dropout(a.hidden_dropout)
        self.blocks = nn.ModuleList(Block(a, i) for i in range(len(a.layers)))
        self.norm = make_norm(a, a.width)
        self.head = None if a.tied else nn.Linear(a.width, a.vocab_size, bias=False)
        # Layers of one kind share rotations and masks: each kind, and the first of its layers.
        self.kinds = {layer: a.layers.index(layer) for layer in a.layers}
        self.kind_of_block = [list(self.kinds).index(layer) for layer in a.layers]
        self.ropes = list(dict.fromkeys(kind.rope for kind in self.kinds if kind.rope is not None))
        self.rotary = nn.ModuleList(Rotary(rope) for rope in self.ropes)
        # Every n-th block keeps only its input for the backward pass, and is recomputed there (activation
        # checkpointing, arXiv:1604.06174); 0: none.
        self.recompute_every = 0

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """ids [batch, new] → hidden states [batch, new, width]; with a cache, a row's ids continue its slot's text.

        `documents` [batch, new], without a cache: the number of each token's document. Attention stays inside a
        document, and positions start at 0 in each. `attention_mask` [batch, new], bool, without a cache: False for
        tokens that no other token may attend to, such as padding; positions count all columns, as in transformers.
        Raises `UserError` when past and new tokens together exceed the model's positions, and `ValueError` for
        `documents` or `attention_mask` with a cache, and as
        `KVCache.expect`.
        """
        past, new = cache.longest if cache else 0, ids.size(1)
        self.architecture.expect(past + new)
        if cache is not None:
            if not (documents is attention_mask is None):
                raise ValueError("documents and attention_mask are for whole rows, without a cache")
            cache.expect(new)
        context = Context(self.kinds, dict(zip(self.ropes, self.rotary)), ids, cache, documents, attention_mask)
        hidden = self.hidden_states(ids, context.positions, context.inputs, cache)
        if cache is not None:
            cache.advance(new)
        return hidden

    def hidden_states(
        self, ids: Tensor, positions: Tensor, inputs: Sequence[AttentionInputs], cache: KVCache | None
    ) -> Tensor:
        """`forward` for given `positions` [batch or 1, new] and the `inputs` of each kind of layer.

        ids [batch, new] → hidden states [batch, new, width].
        """
        x = self.embedding(ids)  # [batch, new, width]
        if self.architecture.embedding_scale != 1:
            x = x * self.architecture.embedding_scale
        if self.place is not None:
            x = x + self.place(positions)
        x = self.dropout(x)
        for index, (block, kind) in enumerate(zip(self.blocks, self.kind_of_block)):
            if self.training and self.recompute_every and index % self.recompute_every == 0:
                x = checkpoint(block, x, inputs[kind], cache, use_reentrant=False)
            else:
                x = block(x, inputs[kind], cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden states [..., width] → logits [..., vocab_size]."""
        logits = self.embedding.project(hidden) if self.head is None else self.head(hidden)
        cap = self.architecture.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def vocab_size(self) -> int:
        return self.architecture.vocab_size

    @property
    def max_positions(self) -> int:
        """The longest text, in tokens."""
        return self.architecture.max_positions

    @property
    def device(self) -> torch.device:
        """Device of the weights, on which the ids must be."""
        return next(self.norm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the hidden states."""
        return next(self.norm.parameters()).dtype

    @property
    def head_weight(self) -> Tensor:
        """The matrix from hidden states to logits, tied or not.  [vocab_size, width]"""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, slots: int, max_length: int, at_once: int = AT_ONCE) -> KVCache:
        """An empty cache for texts of up to `max_length` positions, on the decoder's device and in its precision."""
        cache = KVCache(self.architecture, slots, max_length, self.device, self.dtype, at_once)
        positions = torch.arange(max_length, device=self.device)[None]
        for rope, rotary in zip(self.ropes, self.rotary):
            if not rope.depends_on_length:
                cosines, sines = rotary(positions, positions.amax(1))  # [1, 1, max_length, dim]
                cache.tables[rope] = cosines[0, 0], sines[0, 0]
        return cache

    def cache_bytes(self, slots: int, max_length: int, at_once: int) -> int:
        """Size of the keys and values of such a cache."""
        return cache_bytes(self.architecture, slots, max_length, at_once, self.dtype.itemsize)
