"""Parameters, FLOPs per token and KV cache bytes of a model, from its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from slmkit.model.architecture import Architecture, Layer
from slmkit.model.context import QUERIES_AT_ONCE
from slmkit.model.decoder import Decoder

# Positions whose logits are computed at once outside of training: 512 MiB of float32 with 262,144 tokens.
LOGITS_AT_ONCE = 512


def parameters_by_module(a: Architecture) -> dict[str, int]:
    """Parameters of each kind of module, summed over layers. A tied head counts as 0."""
    norm = 2 * a.width if a.norm == "layer" else a.width  # LayerNorm has a bias
    norms_of_a_block = 4 if a.norm_at == "both" else 2
    sizes = {
        "embedding": a.vocab_size * a.width,
        "positions": a.max_positions * a.width if a.learned_positions else 0,
        "attention": a.depth * sum(_attention(a).values()),
        "mlp": a.depth * _mlp(a),
        "norms": a.depth * norms_of_a_block * norm + norm,
        "head": 0 if a.tied else a.vocab_size * a.width,
    }
    return {name: count for name, count in sizes.items() if count}


def parameter_count(a: Architecture) -> int:
    return sum(parameters_by_module(a).values())


def _linear(inputs: int, outputs: int, bias: bool = False) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _attention(a: Architecture) -> dict[str, int]:
    """Parameters of one attention."""
    if a.latent is not None:
        return _latent_attention(a)
    wide = 2 if a.norm == "layer" else 1
    groups = {"none": (0, 0), "head": (1, 1), "width": (a.heads, a.kv_heads)}[a.qk_norm]
    return {
        "query": _linear(a.width, a.heads * a.head_dim, a.qkv_bias),
        "key and value": 2 * _linear(a.width, a.kv_heads * a.head_dim, a.qkv_bias),
        "out": _linear(a.heads * a.head_dim, a.width, a.out_bias),
        "QK-norms": wide * sum(groups) * a.head_dim,
    }


def _latent_attention(a: Architecture) -> dict[str, int]:
    latent = a.latent
    assert latent is not None
    query_dim = a.heads * (latent.plain_dim + latent.rope_dim)
    rank = latent.query_rank
    direct = _linear(a.width, query_dim)
    return {
        "query": direct if rank is None else _linear(a.width, rank, a.qkv_bias) + rank + _linear(rank, query_dim),
        "latent": _linear(a.width, latent.kv_rank + latent.rope_dim, a.qkv_bias) + latent.kv_rank,
        "key and value": _linear(latent.kv_rank, a.heads * (latent.plain_dim + latent.value_dim)),
        "out": _linear(a.heads * latent.value_dim, a.width, a.out_bias),
    }


def _mlp(a: Architecture) -> int:
    ups = 2 if a.gated_mlp else 1
    return ups * _linear(a.width, a.mlp_width, a.mlp_bias) + _linear(a.mlp_width, a.width, a.mlp_bias)


@dataclass(frozen=True)
class Flops:
    """FLOPs per token when `length` tokens are read at once: two per multiply-add of a matrix product.

    Norms, activations, softmax and rotations are less than 1 % at any useful size, and not counted. Attention is
    counted over the whole row for every query, as its products are computed; with a window, over the keys that a block
    of queries reaches.
    """

    matrices: int
    attention: int

    @property
    def forward(self) -> int:
        return self.matrices + self.attention

    @property
    def backward(self) -> int:
        """FLOPs of the backward pass: two products for each one of the forward pass."""
        return 2 * self.forward


def flops_per_token(a: Architecture, length: int) -> Flops:
    """Forward FLOPs per token in rows of `length` tokens, with the head, without the embedding (a look-up)."""
    weights = {name: n for name, n in parameters_by_module(a).items() if name in ("attention", "mlp")}
    biases_and_norms = a.depth * (_biases(a) + _norms_in_attention(a))
    matrices = 2 * (sum(weights.values()) - biases_and_norms + a.vocab_size * a.width)
    key_dim, value_dim = a.head_dim, a.head_dim
    if a.latent is not None:
        key_dim, value_dim = a.latent.plain_dim + a.latent.rope_dim, a.latent.value_dim
    seen = sum(min(length, layer.window + QUERIES_AT_ONCE) if layer.window else length for layer in a.layers)
    return Flops(matrices, 2 * a.heads * (key_dim + value_dim) * seen)


def _biases(a: Architecture) -> int:
    """Number of a block's bias parameters."""
    mlp = (2 if a.gated_mlp else 1) * a.mlp_width + a.width if a.mlp_bias else 0
    out = a.width if a.out_bias else 0
    if a.latent is not None:
        down = (a.latent.query_rank or 0) + a.latent.kv_rank + a.latent.rope_dim
        return mlp + out + (down if a.qkv_bias else 0)
    return mlp + out + ((a.heads + 2 * a.kv_heads) * a.head_dim if a.qkv_bias else 0)


def _norms_in_attention(a: Architecture) -> int:
    if a.latent is not None:
        return (a.latent.query_rank or 0) + a.latent.kv_rank
    return _attention(a)["QK-norms"]


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the KV cache of one row: per further token, and of full windows."""

    per_token: int
    of_windows: int
    at_length: int  # of all layers, at the given length


def cache_size(a: Architecture, length: int, bytes_per_number: int = 2) -> CacheSize:
    """Bytes of the keys and values of one row of `length` tokens."""
    heads, key_dim, value_dim = a.cached_per_position
    per_layer = heads * (key_dim + value_dim) * bytes_per_number
    windows = [layer.window for layer in a.layers if layer.window is not None]
    per_token = (a.depth - len(windows)) * per_layer
    held = sum(min(window, length) for window in windows) * per_layer
    return CacheSize(per_token, sum(windows) * per_layer, per_token * length + held)


def cache_variants(a: Architecture) -> Mapping[str, Architecture]:
    """The architecture with other numbers of KV heads, and without windows, to compare cache sizes."""
    open_layers = tuple(Layer(rope=layer.rope) for layer in a.layers)
    head_dim = a.head_dim if a.latent is None else a.latent.plain_dim
    plain = replace(a, latent=None, head_dim=head_dim, layers=open_layers)
    variants = {"multi-head": replace(plain, kv_heads=a.heads)}
    for share in (2, 4, 8):
        if a.heads % share == 0 and a.heads > share:
            variants[f"grouped, {share} queries a key"] = replace(plain, kv_heads=a.heads // share)
    return variants | {"multi-query": replace(plain, kv_heads=1)}


def count_parameters(a: Architecture) -> int:
    """Parameters counted on the modules of a meta model; `parameter_count` computes them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(a).parameters())
