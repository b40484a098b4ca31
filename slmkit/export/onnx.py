"""A model as an ONNX graph with its cache as inputs and outputs, for ONNX Runtime and what is built on it.

Names are those that optimum, transformers.js and onnxruntime-genai give a decoder's inputs and outputs:

    input_ids        int64 [batch_size, sequence_length]        new tokens
    attention_mask   int64 [batch_size, total_sequence_length]  of past and new tokens; 0: padding, on the left
    position_ids     int64 [batch_size, sequence_length]        position of each new token in its text, from 0
    past_key_values.N.key, .value   [batch_size, kv_heads, past_sequence_length, head_dim]
    logits           float32 [batch_size, sequence_length, vocab_size]
    present.N.key, .value           [batch_size, kv_heads, total_sequence_length, head_dim]

One graph reads a prompt (past_sequence_length 0) and decodes. Every length may be any number, also 0 of the past and 1.
A layer of latent attention has only a key, of one head: the latent and the rotary channels.

With int8 and int4, products are `MatMulNBits` of ONNX Runtime, whose weights stay packed in memory, and the embedding
is `GatherBlockQuantized`. A tied head and its embedding share one tensor.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.adapt.quantize import BITS, encode, in_whole_bytes, unpack
from slmkit.adapt.swapping import linears, replace
from slmkit.config import UserError, importing, one_line
from slmkit.export.runtimes import Loaded, Message, Runtime, Stored, codes_in
from slmkit.model.architectures import architecture_of
from slmkit.model.attend import AttentionInputs
from slmkit.model.cache import KVCache
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import write_configs
from slmkit.model.files.stored import expect_finite
from slmkit.model.kernels import Kind
from slmkit.model.rope import Rope, Rotation
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat import REPLY

KINDS = ("fp32", "fp16", "int8", "int4")  # the default first
MISSING = "ONNX needs more packages: pip install slmkit[export]"
GRAPH, DATA, SCRIPT, CHAT = "model.onnx", "model.onnx.data", "generate.py", "chat_prompt.json"
OPSET = 18  # the oldest that the exporter writes: old runtimes read it
BLOCK = 32  # weights with one scale
# How MatMulNBits computes: 1 with activations of float32, 4 with activations rounded to int8 in blocks.
ACCURACY_LEVEL = 4
FOLDED = 32  # elements of a constant that is computed at export: shapes, no weights, which would be stored twice
LARGEST_FILE = 2**31 - 2**24  # bytes; protobuf's limit is 2 GiB
AT_ONCE = 256  # tokens of a prompt in one run: their logits are all computed


# -- the graph --------------------------------------------------------------------------------------------------------


class GrowingCache(KVCache):
    """A cache whose tensors grow: `past` and `present` have the key and value of each layer in turn."""

    def __init__(self, past: Sequence[Tensor], per_layer: int) -> None:
        self.past, self.present, self.per_layer = past, list(past), per_layer

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        first = layer * self.per_layer
        for place, fresh in zip(range(first, first + self.per_layer), (key, value)):
            self.present[place] = torch.cat((self.past[place], fresh), dim=2)
        return self.present[first], self.present[first + 1] if self.per_layer == 2 else value

    def is_read_by_few(self, new: int) -> bool:
        return True  # one graph for all lengths


class CachedDecoder(nn.Module):
    """A decoder as a function of tensors alone, with the inputs and outputs of the graph."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.per_layer = 1 if decoder.architecture.latent else 2

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        decoder, cache = self.decoder, GrowingCache(past, self.per_layer)
        columns = torch.arange(attention_mask.size(1))  # [seen]
        queries, keys = columns[past[0].size(2) :, None], columns[None]  # [new, 1], [1, seen]
        # A padding token attends to itself: without any key it would become NaN.
        unmasked = (attention_mask[:, None] != 0) | (queries == keys)  # [batch, new, seen]
        of_keys = (attention_mask.cumsum(1) - 1).clamp(min=0)  # [batch, seen]: position of each key
        length = position_ids.amax(1) + 1
        inputs = []
        for kind in decoder.kinds:
            reach = (keys <= queries) if kind.window is None else (keys <= queries) & (keys > queries - kind.window)
            q = self._rotation(kind.rope, position_ids, length)
            mask = (unmasked & reach)[:, None]  # [batch, 1, new, seen]
            if kind.rope is not None and kind.rope.depends_on_length:
                inputs.append(AttentionInputs(q, None, self._rotation(kind.rope, of_keys, length), mask))
            else:
                inputs.append(AttentionInputs(q, q, mask=mask))
        hidden = decoder.hidden_states(input_ids, position_ids, inputs, cache)
        return decoder.logits(hidden).float(), *cache.present

    def _rotation(self, rope: Rope | None, positions: Tensor, length: Tensor) -> Rotation | None:
        return None if rope is None else self.decoder.rotary[self.decoder.ropes.index(rope)](positions, length)


class Product(nn.Module):
    """x W + b, with W [in, out] as the graph's MatMul has it: a transposed matrix would be stored a second time."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Table(nn.Module):
    """An embedding [vocab_size, width], whose `project` reads the same tensor by a Gemm."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)  # [batch * new, width]
        sizes = rows.size(0), self.weight.size(0)
        logits = torch.onnx.ops.symbolic("Gemm", (rows, self.weight), {"transB": 1}, dtype=hidden.dtype, shape=sizes)
        return logits.view(*hidden.shape[:-1], -1)


class Packed(nn.Module):
    """A matrix [out, in] in groups of `BLOCK` columns, packed as MatMulNBits and GatherBlockQuantized read it.

    codes uint8 [out, blocks, BLOCK * bits / 8], from 0, the first of two in the low bits; scales [out, blocks]
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, module: Any, kind: Kind) -> None:
        super().__init__()
        self.bits, self.bias = BITS[kind], getattr(module, "bias", None)
        self.out_features, self.in_features = module.weight.shape
        whole = F.pad(module.weight.detach(), (0, -self.in_features % BLOCK))
        codes, scales = encode(whole, kind, BLOCK)
        self.register_buffer("codes", in_whole_bytes(unpack(codes, scales.size(1), kind), kind))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]"""
        sizes: dict[str, Any] = {"K": self.in_features, "N": self.out_features, "bits": self.bits, "block_size": BLOCK}
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", (x, self.codes, self.scales), sizes | {"accuracy_level": ACCURACY_LEVEL},
            dtype=x.dtype, shape=(*x.shape[:-1], self.out_features), version=1,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias


class PackedTable(Packed):
    """A packed embedding, whose `project` is the head of a model with tied embeddings."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., in]"""
        layout: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 2, "block_size": BLOCK, "bits": self.bits}
        rows = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized", (self.codes, ids, self.scales[..., None]), layout,
            dtype=torch.float32, shape=(*ids.shape, self.scales.size(1), BLOCK), version=1,
        )  # fmt: skip
        return rows.flatten(-2)[..., : self.in_features]

    def project(self, hidden: Tensor) -> Tensor:
        return Packed.forward(self, hidden)


def prepare(decoder: Decoder, kind: str) -> None:
    """Replace the decoder's matrices, in place, by modules whose tensors the graph has as they are."""
    for name in linears(decoder):
        if name.endswith("key_value"):  # latent attention reads it in two parts, neither by a product with x
            continue
        module = decoder.get_submodule(name)
        replace(decoder, name, Product(module) if kind.startswith("fp") else Packed(module, kind_of(name, kind)))
    table = Table(decoder.embedding.weight) if kind.startswith("fp") else PackedTable(decoder.embedding, "int8")
    replace(decoder, "embedding", table)


def kind_of(name: str, kind: str) -> Kind:
    """How a matrix is rounded: embedding and head have 8 bits, since every token's logit depends on the head."""
    return "int4" if kind == "int4" and name != "head" else "int8"


def attention(q: Any, k: Any, v: Any, attn_mask: Any, *, scale: float, **_: Any) -> Any:
    """`scaled_dot_product_attention` in ONNX: the queries of a key's group are rows of one product with it, so that no
    key is repeated.

    q [batch, heads, new, dim], k and v [batch, kv_heads, seen, dim], attn_mask [batch, 1, new, seen] → as q.
    """
    import onnxscript

    op: Any = onnxscript.opset18
    heads, kv_heads = q.shape[1], k.shape[1]
    seen = op.Shape(k, start=2, end=3)
    split, joined = (op.Constant(value_ints=[0, count, -1]) for count in (heads, kv_heads))
    rows = op.Reshape(op.Mul(q, op.CastLike(scale, q)), op.Concat(joined, op.Shape(q, start=3, end=4), axis=0))
    scores = op.Reshape(op.MatMul(rows, op.Transpose(k, perm=[0, 1, 3, 2])), op.Concat(split, seen, axis=0))
    lowest = op.CastLike(-65504.0 if q.dtype.name == "FLOAT16" else -3.4028235e38, q)
    weights = op.Softmax(op.Add(scores, op.Where(attn_mask, op.CastLike(0.0, q), lowest)), axis=-1)
    y = op.MatMul(op.Reshape(weights, op.Concat(joined, seen, axis=0)), v)
    return op.Reshape(y, op.Concat(split, op.Shape(v, start=3, end=4), axis=0))


# -- files ------------------------------------------------------------------------------------------------------------


def write_onnx(loaded: Loaded, folder: Path, kind: str) -> None:
    """Write the graph of a model, its tokenizer, configs and a script that generates with them, into `folder`.

    Raises `UserError` without the extra `export`, and for a weight that float16 cannot hold.
    """
    with importing(MISSING):
        import onnx  # noqa: F401 (here, before the work begins)
        import onnxscript  # noqa: F401
    model, config, tokenizer, decoder = loaded.name, loaded.config, loaded.tokenizer, copy.deepcopy(loaded.decoder)
    if kind == "fp16":
        for name, parameter in decoder.half().named_parameters():
            expect_finite(parameter, f"{model}: {name!r} in float16", "export fp32 instead")
        expect_no_overflow(decoder, model)
    prepare(decoder, kind)
    save_graph(decoder, folder / GRAPH, kind)
    tokenizer.save_pretrained(folder)
    write_configs(config, folder, "float16" if kind == "fp16" else "float32")
    advice = config.for_generation() | {"eos_token_id": sorted(tokenizer.stop_token_ids)}
    (folder / "generation_config.json").write_text(json.dumps(advice, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("onnx_generate.py"), folder / SCRIPT)
    if tokenizer.chat_template:  # for the script, which has no Jinja: the texts before and after a user's message
        asked = tokenizer.encode_chat_prompt([{"role": "user", "content": REPLY}])
        frame = tokenizer.decode(asked).partition(REPLY)[::2]
        (folder / CHAT).write_text(json.dumps(frame, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.inference_mode()
def expect_no_overflow(decoder: Decoder, model: str) -> None:
    """Raises `UserError` if hidden states are beyond float16, as ONNX Runtime shows on GPUs alone: its CPU kernels
    compute in float32 and leave out roundings between them.
    """
    length = min(AT_ONCE, decoder.max_positions)
    ids = torch.randint(decoder.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    if not decoder.logits(decoder(ids)).isfinite().all():
        raise UserError(f"{model}: its hidden states are beyond float16's 65,504: export fp32 instead")


def save_graph(decoder: Decoder, path: Path, kind: str) -> None:
    """Write the graph of a prepared decoder; weights of more than `LARGEST_FILE` bytes into a second file beside it."""
    import onnx_ir
    from onnx_ir.passes.common import DeduplicateInitializersPass
    from onnxscript.optimizer import optimize_ir

    wrapped, (batch, new, past) = CachedDecoder(decoder), (2, 3, 5)
    heads, *dims = decoder.architecture.cached_per_position
    dims = [dim for dim in dims if dim]
    cached = [f"{layer}.{part}" for layer in range(len(decoder.blocks)) for part in ("key", "value")[: len(dims)]]
    example = [torch.zeros(batch, heads, past, dim, dtype=decoder.dtype) for _ in decoder.blocks for dim in dims]
    ids, columns = torch.zeros(batch, new, dtype=torch.long), torch.ones(batch, past + new, dtype=torch.long)
    rows = {0: "batch_size", 1: "sequence_length"}
    with quiet():
        program: Any = torch.onnx.export(
            wrapped, (ids, columns, ids.clone(), example), dynamo=True, verbose=False, optimize=False,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{one}" for one in cached)],
            output_names=["logits", *(f"present.{one}" for one in cached)],
            dynamic_shapes=(
                rows, {0: "batch_size", 1: "total_sequence_length"}, rows,
                [{0: "batch_size", 2: "past_sequence_length"}] * len(cached),
            ),
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: attention},
        )  # fmt: skip
    graph = program.model
    optimize_ir(graph, input_size_limit=FOLDED)
    for value in graph.graph.outputs[1:]:  # else "past_sequence_length + sequence_length", in any order
        value.shape = onnx_ir.Shape([*value.shape[:2], "total_sequence_length", value.shape[3]])
    DeduplicateInitializersPass()(graph)
    said = {"kind": kind, "context": decoder.max_positions}
    said |= {} if kind.startswith("fp") else {"block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    graph.metadata_props.update({f"slmkit.{name}": str(value) for name, value in said.items()})
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    onnx_ir.save(graph, path, external_data=DATA if size > LARGEST_FILE else None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter says of packages that it does not need, and of itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# -- the runtime ------------------------------------------------------------------------------------------------------


class OnnxRuntime(Runtime):
    """A folder of `write_onnx` in ONNX Runtime on the CPU. Raises `UserError` if that is missing or refuses it."""

    name, rounds_activations = "ONNX Runtime", True

    def __init__(self, folder: Path) -> None:
        with importing(MISSING):
            import onnxruntime
        self.folder = folder
        self.size = sum(path.stat().st_size for path in (folder / GRAPH, folder / DATA) if path.is_file())
        try:
            self.plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
        except Exception as error:  # the libraries' own, whose base is `Exception`
            raise UserError(f"{folder / GRAPH}: ONNX Runtime refuses it: {one_line(error)[:300]}") from None
        self.plain.encode_special_tokens = True  # special tokens spelled in a text are text
        self.tokenizer = SLMTokenizer.from_pretrained(folder)
        ropes = architecture_of(SLMConfig.from_pretrained(folder)).layers
        self.each_apart = any(layer.rope is not None and layer.rope.depends_on_length for layer in ropes)

    def encode(self, text: str) -> list[int]:
        return self.plain.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages: list[Message]) -> list[int] | None:
        return self.tokenizer.encode_chat_prompt(messages) if self.tokenizer.chat_template else None

    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        if self.each_apart:  # what is cached would depend on the length at which it was read
            return np.concatenate([self._read(ids[:length], [length], length) for length in lengths])
        return self._read(ids[: max(lengths)], lengths, AT_ONCE)

    def _read(self, ids: Sequence[int], lengths: Sequence[int], at_once: int) -> np.ndarray:
        found: dict[int, np.ndarray] = {}
        past = self._empty()
        for start in range(0, len(ids), at_once):
            logits, past = self._run(ids[start : start + at_once], past)
            found |= {length: logits[length - start - 1] for length in lengths if 0 < length - start <= len(logits)}
        rows = np.stack([found[length] for length in lengths]).astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        return (rows - np.log(np.exp(rows).sum(-1, keepdims=True))).astype(np.float32)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        logits, past = self._run(ids, self._empty())
        found = [int(logits[-1].argmax())]
        while len(found) < count:
            logits, past = self._run(found[-1:], past)
            found.append(int(logits[-1].argmax()))
        return found[:count]

    def _run(self, ids: Sequence[int], past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits of all `ids` [new, vocab_size], which follow `past`, and what is cached then."""
        seen = next(iter(past.values())).shape[2]
        fresh = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, seen + len(ids)), np.int64),
            "position_ids": np.arange(seen, seen + len(ids))[None],
        }
        asked = {one.name for one in self.session.get_inputs()}
        logits, *present = self.session.run(None, {name: x for name, x in (fresh | past).items() if name in asked})
        return logits[0], dict(zip(past, present))

    def stored(self, loaded: Loaded) -> Iterator[Stored]:
        import onnx

        arrays = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(self.folder / GRAPH).graph.initializer}
        for parameter, weight in loaded.decoder.named_parameters():
            name = f"decoder.{parameter.removesuffix('weight')}"
            if f"{name}scales" in arrays:
                codes, scales = (torch.tensor(arrays[f"{name}{part}"]) for part in ("codes", "scales"))
                bits = 8 * codes.size(2) // BLOCK  # codes: [out, groups, bytes]
                values = (codes_in(codes, bits) - 2 ** (bits - 1)) * scales.view(len(codes), -1, 1)
                yield Stored(name, [parameter], values.flatten(1)[:, : weight.size(1)], f"int{bits}", BLOCK)

    def _empty(self) -> dict[str, np.ndarray]:
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        cached = [one for one in self.session.get_inputs() if one.name.startswith("past")]
        return {one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), kinds[one.type]) for one in cached}
