"""Parameters, FLOPs per token and KV cache bytes of a model, from its architecture."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from slmkit.model.architectures import Architecture, Layer
from slmkit.model.attend import QUERIES_AT_ONCE
from slmkit.model.decoder import Decoder

# Positions whose logits are computed at once outside of training: 512 MiB of float32 with 262,144 tokens.
LOGITS_AT_ONCE = 512
# Module of the decoder or of a block → its kind; the others are norms.
KINDS = {"embedding": "embedding", "place": "positions", "attention": "attention", "mlp": "mlp", "head": "head"}


@functools.lru_cache(maxsize=64)
def _parameters(a: Architecture) -> list[tuple[str, str, int]]:
    """Kind of module, name and size of each parameter, from a decoder without memory."""
    with torch.device("meta"):
        return [(_kind(name), name, parameter.numel()) for name, parameter in Decoder(a).named_parameters()]


def _kind(name: str) -> str:
    parts = name.split(".")  # such as blocks, 0, attention, query, weight
    return KINDS.get(parts[2] if parts[0] == "blocks" else parts[0], "norms")


def parameters_by_module(a: Architecture) -> dict[str, int]:
    """Parameters of each kind of module, summed over layers. A tied head counts as 0."""
    sizes = dict.fromkeys(("embedding", "positions", "attention", "mlp", "norms", "head"), 0)
    for kind, _, size in _parameters(a):
        sizes[kind] += size
    return {kind: size for kind, size in sizes.items() if size}


def parameter_count(a: Architecture) -> int:
    return sum(size for _, _, size in _parameters(a))


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
    matrices = sum(
        size
        for kind, name, size in _parameters(a)
        if kind in ("attention", "mlp") and name.endswith("weight") and "norm" not in name
    )
    key_dim, value_dim = a.head_dim, a.head_dim
    if a.latent is not None:
        key_dim, value_dim = a.latent.plain_dim + a.latent.rope_dim, a.latent.value_dim
    seen = sum(min(length, layer.window + QUERIES_AT_ONCE) if layer.window else length for layer in a.layers)
    return Flops(2 * (matrices + a.vocab_size * a.width), 2 * a.heads * (key_dim + value_dim) * seen)


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
