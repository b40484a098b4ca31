"""Weights of 8 and 4 bits: rounded in groups, and dequantized as they are used.

    w ≈ scale of its group × value of its code

A group is 32, 64 or 128 neighbours of a row. `slmkit.model.kernels` says how codes are kept, and multiplies with them.
Scales are float32 [out, in / group] whatever the model's precision, with the 8 significant bits of a bfloat16, as which
files keep them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from slmkit.adapt.swapping import ALL_LINEAR, linear, linears, matching, replace
from slmkit.config import UserError
from slmkit.model.decoder import Decoder, Embedding
from slmkit.model.kernels import GROUPS, NF4, Kind, Matrix, dequantize

LARGEST: dict[Kind, int] = {"int8": 127, "int4": 7, "nf4": 1}  # the largest value of a code, by kind
BITS: dict[Kind, int] = {"int8": 8, "int4": 4}
DEFAULT_GROUP: dict[str, int] = {"int8": 32, "int4": 32, "nf4": 64}  # columns of a group; bitsandbytes' own for nf4
# Candidates for the scale of a group, as shares of its largest magnitude / 7: a smaller step rounds most weights less
# and clips the largest one.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
ROWS_AT_ONCE = 4096  # of a matrix: what rounding needs besides is several times their size
TINY = torch.finfo(torch.float32).tiny


# -- codes ------------------------------------------------------------------------------------------------------------


def encode(weight: Tensor, kind: Kind, group: int) -> tuple[Tensor, Tensor]:
    """weight [out, in] → codes and scales, as above, rounded to nearest. `in` must be a multiple of `group`."""
    groups = weight.float().unflatten(1, (-1, group))  # [out, groups, group]
    scales = group_scales(groups, kind)
    return pack(nearest(groups, scales[..., None], kind), kind), scales


def group_scales(groups: Tensor, kind: Kind) -> Tensor:
    """groups [..., group] of weights → their scales [...]. For int4 the one of `SHARES` with the least square error."""
    full = groups.abs().amax(-1) / LARGEST[kind]
    if kind != "int4":
        return _bfloat16(full)
    best, least = full, torch.full_like(full, torch.inf)
    for share in SHARES:
        scales = _bfloat16(full * share)
        rounded = (groups / scales[..., None]).round().clamp(-8, 7) * scales[..., None]
        error = (rounded - groups).square().sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def _bfloat16(scales: Tensor) -> Tensor:
    return scales.clamp(min=TINY).bfloat16().float()


def nearest(weights: Tensor, scales: Tensor, kind: Kind) -> Tensor:
    """weights and their scales, of shapes that broadcast → codes, one a byte: int8, or uint8 from 0 to 15."""
    scaled = weights / scales
    if kind == "int8":
        return scaled.round().clamp(-127, 127).to(torch.int8)
    if kind == "int4":
        return (scaled.round().clamp(-8, 7) + 8).to(torch.uint8)
    table = NF4.to(weights.device)
    return torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def values(codes: Tensor, kind: Kind) -> Tensor:
    """Codes, one a byte [...] → the values that scales multiply, float32 [...]."""
    if kind == "nf4":
        return NF4.to(codes.device)[codes.int()]
    return codes.float() if kind == "int8" else codes.float() - 8


def pack(codes: Tensor, kind: Kind) -> Tensor:
    """Codes, one a byte [..., groups, group] → as they are in memory [..., in or in / 2]."""
    if kind == "int8":
        return codes.flatten(-2)
    low, high = codes.chunk(2, dim=-1)
    return (low | high << 4).flatten(-2)


def unpack(codes: Tensor, groups: int, kind: Kind) -> Tensor:
    """The inverse of `pack`."""
    codes = codes.unflatten(-1, (groups, -1))
    return codes if kind == "int8" else torch.cat((codes & 15, codes >> 4), dim=-1)


def in_whole_bytes(codes: Tensor, kind: Kind) -> Tensor:
    """Codes of int8 or int4, one a byte [..., in] → counted from 0, the first of two in the low bits: uint8 [..., in]
    or [..., in / 2]. Files of other programs have them so.
    """
    return codes.view(torch.uint8) ^ 128 if kind == "int8" else codes[..., ::2] | codes[..., 1::2] << 4


# -- modules ----------------------------------------------------------------------------------------------------------


class Quantized(nn.Module):
    """A frozen matrix [out, in] as `codes` and `scales` of a kind."""

    codes: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, codes: Tensor, scales: Tensor, kind: Kind, bias: Tensor | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._matrix: Matrix | None = None  # made at first use, since it keeps addresses

    @property
    def group(self) -> int:
        """Weights with one scale."""
        return self.codes.size(1) * (1 if self.kind == "int8" else 2) // self.scales.size(1)

    @property
    def numel(self) -> int:
        """The number of weights."""
        return self.scales.numel() * self.group

    @property
    def matrix(self) -> Matrix:
        if self._matrix is None or not self._matrix.reads(self.codes, self.scales, self.bias):
            self._matrix = Matrix(self.kind, self.codes, self.scales, self.group, self.bias)
        return self._matrix

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix.  [out, in], float32"""
        return self.matrix.dequantized()

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b.  [..., in] → [..., out]"""
        if x.requires_grad and torch.is_grad_enabled():
            return Product.apply(x, self.matrix, self.matrix.dequantized)
        return self.matrix(x)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """For `to`: scales stay in float32, and none is rounded."""
        scales = self.scales
        super()._apply(function, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self._matrix = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_matrix": None}


class QuantizedLinear(Quantized):
    """x W^T + b with a quantized W."""

    def __init__(self, codes: Tensor, scales: Tensor, kind: Kind, bias: Tensor | None = None) -> None:
        super().__init__(codes, scales, kind, bias)
        self.out_features, self.in_features = codes.size(0), scales.size(1) * self.group

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return self.product(x)


class QuantizedEmbedding(Quantized):
    """A quantized embedding, whose `project` is the head of a model with tied embeddings."""

    def __init__(self, codes: Tensor, scales: Tensor, kind: Kind) -> None:
        super().__init__(codes, scales, kind)
        self.result: Tensor
        self.register_buffer("result", torch.empty(0), persistent=False)  # its precision is that of the result

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., width]."""
        rows = ids.flatten()
        looked_up = dequantize(self.kind, self.codes[rows], self.scales[rows], self.group)
        return looked_up.view(*ids.shape, -1).to(self.result.dtype)

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., width] → logits [..., vocab_size] of a tied head."""
        return self.product(hidden)


class Product(torch.autograd.Function):
    """x W^T + b that keeps no W for the backward pass, which dequantizes it again.  [..., in] → [..., out]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight().to(gradient.dtype), None, None


# -- models -----------------------------------------------------------------------------------------------------------


def quantized_modules(decoder: nn.Module) -> dict[str, Quantized]:
    """The quantized modules of a decoder, by name."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, Quantized)}


def expect_full(decoder: nn.Module, what: str | Path) -> None:
    """Raises `UserError` that begins with `what` for a quantized decoder."""
    if quantized_modules(decoder):
        raise UserError(f"{what}: its weights are quantized: name the full model that it was made from")


def to_quantize(decoder: Decoder, kind: str, group: int, embedding: str) -> dict[str, Kind]:
    """The names of the matrices to quantize → their kinds.

    The layers' linears get `kind`; a head of its own int8, where `kind` is an integer, and with `embedding` int8 the
    embedding (and a head tied to it) int8. A matrix whose columns are no multiple of `group` is left out. Raises
    `UserError` if all of the layers' are.
    """
    names = [name for name in matching(linears(decoder), ALL_LINEAR) if linear(decoder, name).in_features % group == 0]
    if not names:
        raise UserError(
            f"no matrix can be quantized in groups of {group}: their columns are no multiple of it; "
            f"--group is one of {', '.join(map(str, GROUPS))}"
        )
    chosen: dict[str, Kind] = dict.fromkeys(names, cast(Kind, kind))
    if decoder.architecture.width % group == 0:
        if decoder.head is not None and (kind != "nf4" or embedding == "int8"):
            chosen["head"] = "int8"
        if embedding == "int8":
            chosen["embedding"] = "int8"
    return chosen


def round_to(decoder: Decoder, chosen: dict[str, Kind], group: int) -> None:
    """Quantize the matrices that `to_quantize` chose, in place, one after another: each to the nearest codes."""
    for name, kind in chosen.items():
        module = decoder.get_submodule(name)
        if not isinstance(module, Quantized):
            replace(decoder, name, rounded(module, kind, group))


def rounded_copy(decoder: Decoder, kind: str) -> Decoder:
    """A copy whose layers have matrices of a kind, rounded to nearest in groups of `DEFAULT_GROUP`."""
    copied, group = copy.deepcopy(decoder), DEFAULT_GROUP[kind]
    round_to(copied, to_quantize(copied, kind, group, "bfloat16"), group)
    return copied


def rounded(module: Any, kind: Kind, group: int) -> Quantized:
    """A linear or an embedding, rounded to the nearest codes."""
    parts = [encode(rows, kind, group) for rows in module.weight.detach().split(ROWS_AT_ONCE)]
    codes, scales = (torch.cat(each) for each in zip(*parts))
    return quantized_like(module, codes, scales, kind).to(module.weight.dtype)  # of an embedding's results


def quantized_like(module: Any, codes: Tensor, scales: Tensor, kind: Kind) -> Quantized:
    """The quantized module in place of a linear or an embedding."""
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(codes, scales, kind)
    return QuantizedLinear(codes, scales, kind, module.bias)


def dequantize_modules(decoder: Decoder) -> None:
    """Give a quantized decoder ordinary matrices of the same values in float32, in place."""
    for name, module in quantized_modules(decoder).items():
        rows, columns = module.weight.shape
        with torch.device("meta"):
            is_linear = isinstance(module, QuantizedLinear)
            whole: Any = nn.Linear(columns, rows, bias=False) if is_linear else Embedding(rows, columns)
        whole.weight, whole.bias = nn.Parameter(module.weight, requires_grad=False), module.bias
        replace(decoder, name, whole.eval())
