"""GPTQ: rounding that makes up for its own errors (Frantar et al. 2022, arXiv:2210.17323).

A linear's columns are rounded one after another. The error of each is spread over the columns that are not rounded yet,
so that the linear's outputs on a calibration text change least: with the Hessian H = Σ x xᵀ over its inputs x there,

    w_j → rounded,   w_k -= (w_j - rounded) U_jk / U_jj   for all k > j,   H⁻¹ = Uᵀ U, U upper triangular

Layers are done in order, and within a layer the linears, so that each sees inputs that earlier rounding has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.adapt.quantize import QuantizedLinear, group_scales, nearest, pack, round_to, values
from slmkit.adapt.swapping import LinearLike, linear, replace
from slmkit.config import UserError
from slmkit.model.decoder import Decoder
from slmkit.model.kernels import Kind

DAMPING = 0.01  # added to the diagonal of H, as a share of its mean; ten times as much at each of the
ATTEMPTS = 12
TOKENS_AT_ONCE = 8192


@torch.no_grad()
def gptq(
    decoder: Decoder,
    chosen: dict[str, Kind],
    group: int,
    ids: Tensor,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> None:
    """Quantize the matrices that `to_quantize` chose, in place, for the calibration text `ids` [rows, length].

    Embedding and head are rounded to nearest. `progress` gets the number of layers done, and of all. Raises `UserError`
    by name for a linear whose inputs there are not finite.
    """
    batches = [_block_inputs(decoder, rows) for rows in ids.split(max(1, TOKENS_AT_ONCE // ids.size(1)))]
    hidden = [x for x, _ in batches]
    for index in range(len(decoder.blocks)):
        layer = _Layer(decoder, index, hidden, [others[index] for _, others in batches])
        names = [name for name in chosen if name.startswith(f"blocks.{index}.")]
        for together in layer.linears_by_input(names):
            factor = _inverse_factor(layer.hessian(together[0]), together[0])
            for name in together:
                replace(decoder, name, solve(linear(decoder, name), factor, chosen[name], group))
        hidden = list(layer.run())
        progress(index + 1, len(decoder.blocks))
    round_to(decoder, chosen, group)


def solve(linear: LinearLike, factor: Tensor, kind: Kind, group: int) -> QuantizedLinear:
    """The linear with its columns rounded in order. `factor` [in, in]: U of the formula above."""
    weight = linear.weight.detach().float().clone()  # [out, in]
    codes, scales = [], []
    for start in range(0, weight.size(1), group):
        part, u = weight[:, start : start + group], factor[start : start + group]
        scale = group_scales(part, kind)  # [out]
        errors = torch.empty_like(part)
        for j in range(group):
            code = nearest(part[:, j], scale, kind)
            errors[:, j] = (part[:, j] - values(code, kind) * scale) / u[j, start + j]
            part[:, j + 1 :] -= errors[:, j, None] * u[j, start + j + 1 : start + group]
            codes.append(code)
        weight[:, start + group :] -= errors @ u[:, start + group :]
        scales.append(scale)
    grouped = torch.stack(codes, dim=1).unflatten(1, (-1, group))  # [out, groups, group]
    return QuantizedLinear(pack(grouped, kind), torch.stack(scales, dim=1), kind, linear.bias)


def _block_inputs(decoder: Decoder, ids: Tensor) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """The first block's input [rows, length, width], and the other arguments of every block."""
    calls: list[tuple[Any, ...]] = []
    hooks = [block.register_forward_pre_hook(lambda _, arguments: calls.append(arguments)) for block in decoder.blocks]
    decoder(ids)
    for hook in hooks:
        hook.remove()
    return calls[0][0], [arguments[1:] for arguments in calls]


@dataclass(frozen=True)
class _Layer:
    """A block with its inputs: hidden states [rows, length, width] and the other arguments, of each batch."""

    decoder: Decoder
    index: int
    hidden: list[Tensor]
    others: list[tuple[Any, ...]]

    def run(self) -> Iterator[Tensor]:
        """The block's output [rows, length, width] of each batch."""
        return (self.decoder.blocks[self.index](x, *others) for x, others in zip(self.hidden, self.others))

    def linears_by_input(self, names: list[str]) -> list[list[str]]:
        """The linears in the order in which they are called; those called with the same tensor together."""
        called: dict[int, tuple[Tensor, list[str]]] = {}  # holds the tensors, so that no other gets their id

        def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, arguments: called.setdefault(id(arguments[0]), (arguments[0], []))[1].append(name)

        hooks = [self.decoder.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
        next(self.run())
        for hook in hooks:
            hook.remove()
        return [together for _, together in called.values()]

    def hessian(self, name: str) -> Tensor:
        """The mean of x xᵀ over all inputs x of a linear.  [in, in]"""
        products: list[Tensor] = [torch.zeros(())]

        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2).float()  # [tokens, in]
            products[0] = products[0] + x.T @ x

        hook = self.decoder.get_submodule(name).register_forward_pre_hook(add)
        tokens = sum(x.size(0) * x.size(1) for x in self.run())
        hook.remove()
        return products[0] / tokens


def _inverse_factor(hessian: Tensor, name: str) -> Tensor:
    """U, upper triangular, with Uᵀ U = (H + damping)⁻¹.  [in, in]

    Raises `UserError` that begins with `name` where H is not finite, or too large to be inverted.
    """
    damping = DAMPING * hessian.diagonal().abs().mean()
    for _ in range(ATTEMPTS if hessian.isfinite().all() else 0):  # rounding may leave H with negative eigenvalues
        damped = hessian + (damping + 1e-12) * torch.eye(len(hessian))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
        damping = damping * 10 + 1e-12
    raise UserError(
        f"{name}: its inputs on the calibration text are not finite, or too large: calibrate with another text, or "
        "only round the weights (--method round)"
    )
