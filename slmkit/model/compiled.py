"""Forward passes over few tokens in compiled kernels: decoding on a CPU.

`CompiledDecoder` hands a decoder's weights to `kernels.cpp`, which computes what `decoder.py` does, in one call for all
layers: on a small model PyTorch would spend more time between its operations than in them. Longer texts, and
what the kernels do not know (latent attention, rotations that depend on the text's length, adapters), are left to the
decoder itself. The residual stream stays in float32, whatever the weights' precision.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.model.cache import KVCache
from slmkit.model.decoder import Attention, Decoder
from slmkit.model.kernels import MOST_ROWS, Kind, Matrix, MatrixFields, library
from slmkit.model.norms import RMSNorm

# In the order of kernels.cpp.
NORMS: tuple[type, ...] = (nn.Identity, RMSNorm, nn.LayerNorm)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")
SAME = {"gelu_new": "gelu_pytorch_tanh"}
LINEARS = ("query", "key", "value", "out", "gate", "up", "down")


def fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class NormFields(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "weight", "bias"),
        *fields(ctypes.c_int64, "kind", "size"),
        *fields(ctypes.c_double, "eps"),
    ]


class BlockFields(ctypes.Structure):
    _fields_ = [
        *fields(NormFields, "attention_in", "query_norm", "key_norm", "attention_out", "mlp_in", "mlp_out"),
        *fields(MatrixFields, *LINEARS),
        *fields(ctypes.c_void_p, "keys", "values", "cosines", "sines"),
        *fields(ctypes.c_int64, "heads", "kv_heads", "head_dim", "window", "columns"),
        *fields(ctypes.c_int64, "cache_is_bfloat16", "activation"),
        *fields(ctypes.c_double, "scale", "cap"),
    ]


class UnsupportedError(Exception):
    """What the kernels do not know."""


def for_decoding(decoder: Any) -> Any:
    """`decoder` with compiled passes over few tokens; itself where that is not possible.

    The weights are read where they are: changes in place count, but replaced ones and new adapters do not.
    """
    if not isinstance(decoder, Decoder) or decoder.device.type != "cpu" or library() is None:
        return decoder
    try:
        return CompiledDecoder(decoder)
    except UnsupportedError:
        return decoder


class CompiledDecoder:
    """A decoder with a compiled forward pass for up to `MOST_ROWS` tokens without gradients; else as `decoder`.

    Raises `UnsupportedError` for a decoder that has what the kernels do not know.
    """

    def __init__(self, decoder: Decoder) -> None:
        a = decoder.architecture
        self.decoder, self.keep = decoder, list[Any]()  # what the fields point at
        if a.latent is not None or decoder.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedError
        if any(layer.rope is not None and layer.rope.depends_on_length for layer in a.layers):
            raise UnsupportedError
        self.blocks = (BlockFields * a.depth)(*(self._block(block, i) for i, block in enumerate(decoder.blocks)))
        self.norm = self._norm(decoder.norm)
        self.head = self._matrix(decoder.head or decoder.embedding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def __call__(self, ids: Tensor, cache: KVCache | None = None, **masks: Any) -> Tensor:
        """ids [rows, new] → hidden states [rows, new, width], as `Decoder.forward`; float32 for few tokens."""
        decoder = self.decoder
        if cache is None or ids.numel() > MOST_ROWS or masks or torch.is_grad_enabled():
            return decoder(ids, cache, **masks)
        (rows, new), a, lengths = ids.shape, decoder.architecture, torch.from_numpy(cache.lengths)
        a.expect(cache.longest + new)
        cache.expect(new)
        x = decoder.embedding(ids).float() * a.embedding_scale  # [rows, new, width], not the embedding's own
        if decoder.place is not None:
            x += decoder.place(lengths[:, None] + torch.arange(new))
        for block, layer, keys, values in zip(self.blocks, a.layers, cache.keys, cache.values):
            block.keys, block.values, block.columns = keys.data_ptr(), values.data_ptr(), keys.size(2)
            if layer.rope is not None:
                cosines, sines = cache.tables[layer.rope]
                block.cosines, block.sines = cosines.data_ptr(), sines.data_ptr()
        library().slmkit_decode(
            self.blocks, len(self.blocks), ctypes.byref(self.norm), x.data_ptr(), a.width, lengths.data_ptr(), rows,
            new, torch.get_num_threads(),
        )  # fmt: skip
        cache.advance(new)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden states [..., width] → logits [..., vocab_size], float32 for few rows."""
        cap = self.decoder.architecture.logit_cap
        if hidden.numel() > MOST_ROWS * hidden.size(-1) or torch.is_grad_enabled():
            return self.decoder.logits(hidden.to(self.decoder.dtype))
        logits = self.head(hidden.float())
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _block(self, block: Any, index: int) -> BlockFields:
        a, attention, mlp, of = self.decoder.architecture, block.attention, block.mlp, BlockFields()
        activation = SAME.get(a.activation, a.activation)
        if type(attention) is not Attention or activation not in ACTIVATIONS:
            raise UnsupportedError
        for name in ("attention_in", "attention_out", "mlp_in", "mlp_out"):
            setattr(of, name, self._norm(getattr(block, name)))
        of.query_norm, of.key_norm = self._norm(attention.query_norm), self._norm(attention.key_norm)
        for name in LINEARS:
            linear = getattr(attention if name in LINEARS[:4] else mlp, name)
            if linear is not None:
                setattr(of, name, self._matrix(linear).fields)
        of.heads, of.kv_heads, of.head_dim = a.heads, a.kv_heads, a.head_dim
        of.window, of.activation = a.layers[index].window or 0, ACTIVATIONS.index(activation)
        of.cache_is_bfloat16 = self.decoder.dtype == torch.bfloat16
        of.scale, of.cap = a.attention_scale, a.attention_cap or 0.0
        return of

    def _norm(self, norm: Any) -> NormFields:
        if type(norm) not in NORMS:
            raise UnsupportedError
        if isinstance(norm, nn.Identity):
            return NormFields()
        weight = norm.weight.detach().float() + getattr(norm, "offset", 0.0)
        bias = None if getattr(norm, "bias", None) is None else norm.bias.detach().float()
        self.keep += [weight, bias]
        pointers = (None if x is None else x.data_ptr() for x in (weight, bias))
        return NormFields(*pointers, NORMS.index(type(norm)), weight.numel(), norm.eps)

    def _matrix(self, module: Any) -> Matrix:
        """The weights of a linear or an embedding, plain or quantized."""
        if hasattr(module, "codes"):
            matrix = Matrix(module.form, module.codes, module.scales, module.group, module.bias)
        elif isinstance(module, nn.Embedding) or type(module) is nn.Linear:
            kinds: dict[torch.dtype, Kind] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
            if module.weight.dtype not in kinds:
                raise UnsupportedError
            bias = getattr(module, "bias", None)
            matrix = Matrix(kinds[module.weight.dtype], module.weight.contiguous(), bias=bias)
        else:
            raise UnsupportedError
        self.keep.append(matrix)
        return matrix
