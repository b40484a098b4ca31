"""Types of the tensors in a GGUF: which one each tensor gets, and weights in that type.

gguf encodes F16 to Q8_0, byte for byte as ggml does; K-quants come from ggml itself, in the library of xllamacpp.
"""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from slmkit.config import UserError, read_table
from slmkit.export.llama_cpp import import_xllamacpp
from slmkit.model.files.stored import expect_finite

F16_LARGEST = 65_504.0
ROWS = 256  # that a thread encodes at once


@dataclass(frozen=True)
class Kind:
    """Types of a file's matrices: of most; of the head, or the embedding that is the head; of `SENSITIVE` ones in the
    first and last eighth of the layers and in every third between, which are few and matter most.
    """

    most: str
    head: str
    sensitive: str


SENSITIVE = ("attn_v", "attn_v_b", "ffn_down")
TABLES = read_table(Path(__file__).with_name("gguf.yaml"))
KINDS = {name: Kind(*types.split()) for name, types in TABLES["kinds"].items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file, and where its values come from."""

    name: str
    shape: tuple[int, ...]  # [out, in]
    type: str = "F32"
    reason: str = ""  # why it has that type
    bytes: int = 0
    is_fallback: bool = False  # its rows do not divide into the blocks of the kind's type
    underflows: int = 0  # weights that are 0 in F16, and were not before
    source: str = field(default="", repr=False)  # the tensor's name in the model directory; empty: computed
    change: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor, repr=False)  # of that tensor's values

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def with_type(planned: PlannedTensor, kind: str, depth: int, has_head: bool) -> PlannedTensor:
    """The tensor with its type in a file of `kind` and `depth` layers, the reason, and the size.

    `has_head`: the file has a head of its own, beside the embedding.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    types, columns = KINDS[kind], planned.shape[-1]
    *_, layer, module, _ = ("", *planned.name.split("."))
    type_, reason = types.most, kind
    if len(planned.shape) == 1 or module == "position_embd":
        type_, reason = "F32", "norms, biases and positions"
    elif types.head != type_ and (module == "output" or (module == "token_embd" and not has_head)):
        type_, reason = types.head, f"{kind}: the head"
    elif types.sensitive != type_ and module in SENSITIVE and _matters_more(int(layer), depth):
        type_, reason = types.sensitive, f"{kind}: {module} in some layers"
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_]]
    if columns % block:
        reason = f"{columns} columns are no multiple of {block} → F16"
        return replace(planned, type="F16", reason=reason, bytes=2 * planned.weights, is_fallback=True)
    return replace(planned, type=type_, reason=reason, bytes=planned.weights // block * size)


def _matters_more(layer: int, depth: int) -> bool:
    eighth = depth // 8
    return layer < eighth or layer >= 7 * depth // 8 or (layer - eighth) % 3 == 2


def weights_by_type(plan: list[PlannedTensor]) -> Counter[str]:
    """The number of weights of each type."""
    weights = Counter[str]()
    for planned in plan:
        weights[planned.type] += planned.weights
    return weights


def file_type(weights: Counter[str], kind: str) -> int:
    """`general.file_type`, from the weights of each type: the kind, or the type of most if that is another."""
    from gguf import LlamaFileType

    most = weights.most_common(1)[0][0]
    name = kind if most == KINDS[kind].most else most
    spelled = [f"{prefix}_{name}{suffix}" for prefix in ("ALL", "MOSTLY") for suffix in ("", "_S")]
    return int(next(LlamaFileType[one] for one in spelled if one in LlamaFileType.__members__))


def encoded(planned: PlannedTensor, tensor: Tensor) -> tuple[np.ndarray, int]:
    """A tensor [..., columns] in its type, as numbers or bytes, and how many weights F16 made 0.

    Raises `UserError` for NaN, infinity, and weights that float16 cannot hold, in which most types have their scales.
    """
    from gguf import GGMLQuantizationType, quants

    expect_finite(tensor, repr(planned.source), "the model is broken: use another checkpoint")
    largest = max(map(abs, map(float, tensor.aminmax())))
    if planned.type not in ("F32", "BF16") and largest > F16_LARGEST:
        raise UserError(
            f"{planned.source!r} has a weight of {largest:.3g}, beyond the {F16_LARGEST:,.0f} of float16: use BF16"
        )
    weights = tensor.contiguous().numpy()
    if planned.type in K_QUANTS:
        return k_quantizer(planned.type)(weights.reshape(-1, weights.shape[-1])), 0
    found = quants.quantize(weights, GGMLQuantizationType[planned.type])
    return found, int(np.count_nonzero(weights) - np.count_nonzero(found)) if planned.type == "F16" else 0


# The error of each K-quant, relative to normal weights, is below this.
K_QUANTS = {"Q2_K": 0.4, "Q3_K": 0.2, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.025}


@cache
def k_quantizer(type_: str) -> Callable[[np.ndarray], np.ndarray]:
    """ggml's encoder of a K-quant: float32 [rows, columns] → uint8 [rows, bytes].

    Raises `UserError` if gguf reads what it writes otherwise than ggml, or as numbers far from the weights: the types
    are numbered and laid out by both.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    import_xllamacpp()
    from xllamacpp import xllamacpp

    number = GGMLQuantizationType[type_]
    block, size = GGML_QUANT_SIZES[number]
    library, long, address = ctypes.CDLL(xllamacpp.__file__), ctypes.c_int64, ctypes.c_void_p
    chunk, decoder = library["ggml_quantize_chunk"], library[f"dequantize_row_q{type_.removeprefix('Q')}"]
    chunk.restype, chunk.argtypes = ctypes.c_size_t, [ctypes.c_int, address, address, long, long, long, address]
    decoder.restype, decoder.argtypes = None, [address, address, long]

    def encode(weights: np.ndarray) -> np.ndarray:
        rows, columns = weights.shape
        written = np.empty((rows, columns // block * size), np.uint8)

        def encode_rows(first: int) -> None:
            count, start = min(ROWS, rows - first), first * columns
            chunk(int(number), weights.ctypes.data, written.ctypes.data, start, count, columns, None)

        with ThreadPoolExecutor() as threads:  # ctypes lets go of Python's lock
            list(threads.map(encode_rows, range(0, rows, ROWS)))
        return written

    sample = np.random.default_rng(0).standard_normal((16, 4 * block), np.float32)
    written, by_ggml = encode(sample), np.empty_like(sample)
    decoder(written.ctypes.data, by_ggml.ctypes.data, sample.size)
    by_gguf = quants.dequantize(written, number)
    error = np.sqrt(np.square(by_gguf - sample).mean() / np.square(sample).mean())
    if not np.array_equal(by_gguf, by_ggml) or not error < K_QUANTS[type_]:
        raise UserError(
            f"{type_}: gguf and the ggml of xllamacpp disagree about it: use Q8_0, or other versions of them"
        )
    return encode
