"""Forward passes over few tokens in compiled kernels: decoding on a CPU.

`CompiledDecoder` hands a decoder's weights to `kernels.cpp`, which computes what `decoder.py` does, in one call for all
layers: on a small model PyTorch would spend more time between its operations than in them. Longer texts, and
what the kernels do not know (latent attention, rotations that depend on the text's length, adapters), are left to the
decoder itself. The residual stream stays in float32 for weights of any precision.

Every tensor is read where it is, so changes in place, such as those of an optimizer, count. Before each call the
decoder's modules and the addresses of its tensors are compared with those that were read, in about 5 µs a layer: after
`to`, `load_state_dict(assign=True)`, an adapter or a new embedding, the decoder is read anew, or computes itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.model.cache import KVCache
from slmkit.model.decoder import MLP, Attention, Decoder
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
        *fields(ctypes.c_double, "eps", "offset"),
        *fields(ctypes.c_int64, "is_bfloat16"),
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
    """`decoder` with compiled passes over few tokens; itself where that is not possible."""
    if not isinstance(decoder, Decoder) or library() is None:
        return decoder
    try:
        return CompiledDecoder(decoder)
    except UnsupportedError:
        return decoder


class CompiledDecoder:
    """A decoder with a compiled forward pass for up to `MOST_ROWS` new tokens a row without gradients; else as it is.

    Raises `UnsupportedError` for a decoder that has what the kernels do not know.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._read()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def __call__(self, ids: Tensor, cache: KVCache | None = None, **masks: Any) -> Tensor:
        """ids [rows, new] → hidden states [rows, new, width], as `Decoder.forward`; float32 for few tokens a row.

        Raises `ValueError` for a cache of another shape.
        """
        new = ids.size(1)
        is_known = cache is not None and 0 < new <= MOST_ROWS and not masks and not torch.is_grad_enabled()
        if cache is None or not is_known or not self._is_readable(cache):
            return self.decoder(ids, cache, **masks)
        self._expect(ids, cache)
        at_once = MOST_ROWS // new  # rows whose numbers stay near the processor
        if len(ids) <= at_once:
            return self._pass(ids, cache)
        starts = range(0, len(ids), at_once)
        return torch.cat([self._pass(ids[i : i + at_once], cache[i : i + at_once]) for i in starts])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden states [..., width] → logits [..., vocab_size], float32 without gradients."""
        if torch.is_grad_enabled() or not self._is_current(*self.of_head):
            return self.decoder.logits(hidden.to(self.decoder.dtype))
        cap, rows = self.decoder.architecture.logit_cap, hidden.float().flatten(0, -2)
        logits = torch.cat([self.head(few) for few in rows.split(MOST_ROWS)]).view(*hidden.shape[:-1], -1)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _expect(self, ids: Tensor, cache: KVCache) -> None:
        """Raises for ids or a cache that do not fit: the kernels check nothing."""
        a, keys = self.decoder.architecture, cache.keys[0]
        shape = [len(ids), a.kv_heads, a.head_dim]
        if len(cache.keys) != a.depth or [keys.size(0), keys.size(1), keys.size(3)] != shape:
            raise ValueError(f"keys {list(keys.shape)}, expected [{shape[0]}, {shape[1]}, columns, {shape[2]}]")
        a.expect(cache.longest + ids.size(1))
        cache.expect(ids.size(1))

    def _pass(self, ids: Tensor, cache: KVCache) -> Tensor:
        (rows, new), decoder, lengths = ids.shape, self.decoder, torch.from_numpy(cache.lengths)
        a = decoder.architecture
        x = decoder.embedding(ids).float() * a.embedding_scale  # not the embedding's own
        x = x.view(rows, new, a.width)
        if decoder.place is not None:
            x += decoder.place(lengths[:, None] + torch.arange(new))
        is_bfloat16 = cache.keys[0].dtype == torch.bfloat16
        for block, layer, keys, values in zip(self.blocks, a.layers, cache.keys, cache.values):
            block.keys, block.values, block.columns = keys.data_ptr(), values.data_ptr(), keys.size(2)
            block.cache_is_bfloat16 = is_bfloat16
            if layer.rope is not None:
                cosines, sines = cache.tables[layer.rope]
                block.cosines, block.sines = cosines.data_ptr(), sines.data_ptr()
        library().slmkit_decode(
            self.blocks, len(self.blocks), ctypes.byref(self.norm), x.data_ptr(), a.width, lengths.data_ptr(), rows,
            new, torch.get_num_threads(),
        )  # fmt: skip
        cache.advance(new)
        return x

    # -- what was read ------------------------------------------------------------------------------------------------

    def _is_readable(self, cache: KVCache) -> bool:
        """Whether the kernels can compute with the decoder as it is now, and with this cache."""
        keys = cache.keys[0]
        known = keys.is_cpu and keys.is_contiguous() and keys.dtype in (torch.float32, torch.bfloat16)
        return known and self._is_current()

    def _is_current(self, first: int = 0, first_tensor: int = 0) -> bool:
        """Whether what was read, from these places in the lists on, is what the decoder has; reads it anew if not."""
        places = self.owners[first:], self.names[first:]
        same = all(map(operator.is_, map(dict.get, *places), self.found[first:]))
        if not same or list(map(Tensor.data_ptr, self.tensors[first_tensor:])) != self.addresses[first_tensor:]:
            with contextlib.suppress(UnsupportedError):
                self._read()
        return self.is_supported

    def _read(self) -> None:
        """Take the addresses of all weights. Raises `UnsupportedError`, after noting down what it is due to."""
        decoder, a, self.is_supported = self.decoder, self.decoder.architecture, False
        self.of_head = 0, 0  # where its part of the lists begins
        self.owners, self.names, self.found = list[Any](), list[str](), list[Any]()
        self.tensors, self.addresses, self.keep = list[Tensor](), list[int](), list[Any]()
        self._noted(vars(decoder), "architecture")
        if a.latent is not None or any(layer.rope is not None and layer.rope.depends_on_length for layer in a.layers):
            raise UnsupportedError
        self.norm = self._norm(decoder, "norm", a.width)
        blocks = self._noted(decoder._modules, "blocks")._modules
        if len(blocks) != a.depth:
            raise UnsupportedError
        self.blocks = (BlockFields * a.depth)(*(self._block(self._noted(blocks, i), int(i)) for i in blocks))
        self.of_head = len(self.found), len(self.tensors)
        head = "embedding" if self._noted(decoder._modules, "head") is None else "head"
        self.head = self._matrix(decoder, head, a.vocab_size, a.width)
        self.is_supported = True

    def _noted(self, owner: Mapping[str, Any], name: str) -> Any:
        """`owner[name]`, or None, which must not become another one as long as what was read is used."""
        found = owner.get(name)
        self.owners.append(owner)
        self.names.append(name)
        self.found.append(found)
        if isinstance(found, Tensor):
            self.tensors.append(found)
            self.addresses.append(found.data_ptr())
            self.keep.append(found.detach())  # so that no other tensor can come to this address
        return found

    def _block(self, block: Any, index: int) -> BlockFields:
        a, of, modules = self.decoder.architecture, BlockFields(), block._modules
        attention, mlp = self._noted(modules, "attention"), self._noted(modules, "mlp")
        activation = SAME.get(a.activation, a.activation)
        if type(attention) is not Attention or type(mlp) is not MLP or activation not in ACTIVATIONS:
            raise UnsupportedError
        for name in ("attention_in", "attention_out", "mlp_in", "mlp_out"):
            setattr(of, name, self._norm(block, name, a.width))
        of.query_norm = self._norm(attention, "query_norm", a.head_dim, a.heads * a.head_dim)
        of.key_norm = self._norm(attention, "key_norm", a.head_dim, a.kv_heads * a.head_dim)
        queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
        inner = a.mlp_width
        outs = (queries, keys, keys, a.width, inner, inner, a.width)  # of `LINEARS`
        intos = (a.width, a.width, a.width, queries, a.width, a.width, inner)
        for name, *shape in zip(LINEARS, outs, intos):
            if name != "gate" or self._noted(mlp._modules, "gate") is not None:
                setattr(of, name, self._matrix(attention if hasattr(attention, name) else mlp, name, *shape).fields)
        of.heads, of.kv_heads, of.head_dim = a.heads, a.kv_heads, a.head_dim
        of.window, of.activation = a.layers[index].window or 0, ACTIVATIONS.index(activation)
        of.scale, of.cap = a.attention_scale, a.attention_cap or 0.0
        return of

    def _norm(self, owner: nn.Module, name: str, *sizes: int) -> NormFields:
        norm = self._noted(owner._modules, name)
        if type(norm) not in NORMS:
            raise UnsupportedError
        if isinstance(norm, nn.Identity):
            return NormFields()
        weight, bias = (self._noted(norm._parameters, each) for each in ("weight", "bias"))
        for tensor in (weight, bias):
            known = tensor is None or (tensor.is_cpu and tensor.is_contiguous() and tensor.dtype == weight.dtype)
            if not known or (tensor is not None and tensor.numel() not in sizes):
                raise UnsupportedError
        if weight is None or weight.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedError
        pointers = (None if x is None else x.data_ptr() for x in (weight, bias))
        numbers = norm.eps, getattr(norm, "offset", 0.0), weight.dtype == torch.bfloat16
        return NormFields(*pointers, NORMS.index(type(norm)), weight.numel(), *numbers)

    def _matrix(self, owner: nn.Module, name: str, out: int, into: int) -> Matrix:
        """The weights of a linear or an embedding, plain or quantized.  [out, into]"""
        module = self._noted(owner._modules, name)
        is_quantized = hasattr(type(module), "matrix")
        if not is_quantized and not isinstance(module, nn.Embedding) and type(module) is not nn.Linear:
            raise UnsupportedError
        bias = self._noted(module._parameters, "bias")
        weight: Any = None if is_quantized else self._noted(module._parameters, "weight")
        for each in ("codes", "scales") if is_quantized else ():
            self._noted(module._buffers, each)
        kinds: dict[Any, Kind] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
        kind: Any = kinds.get(getattr(weight, "dtype", None))
        if kind is None and not is_quantized:
            raise UnsupportedError
        try:
            matrix: Matrix = module.matrix if is_quantized else Matrix(kind, weight, bias=bias)
        except ValueError as error:  # not contiguous, or on two devices
            raise UnsupportedError from error
        if not (matrix.weight.is_cpu and matrix.adds_bias and (matrix.out_features, matrix.in_features) == (out, into)):
            raise UnsupportedError
        self.keep.append(matrix)
        return matrix
