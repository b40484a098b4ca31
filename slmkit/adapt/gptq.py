"""GPTQ: rounding that makes up for its own errors (Frantar et al. 2022, arXiv:2210.17323).

A linear's columns are rounded one after another. The error of each is spread over the columns that are not rounded yet,
so that the linear's outputs on a calibration text change least: with the Hessian H = Σ x xᵀ over its inputs x there,

    w_j → rounded,   w_k -= (w_j - rounded) U_jk / U_jj   for all k > j,   H⁻¹ = Uᵀ U, U upper triangular

Layers are done in order, and within a layer the linears, so that each sees inputs that earlier rounding has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.adapt.quantize import QuantizedLinear, group_scales, nearest, pack, round_to, values
from slmkit.adapt.swapping import LinearLike, linear, replace
from slmkit.model.decoder import Decoder

DAMPING = 0.01  # added to the diagonal of H, as a share of its mean
TOKENS_AT_ONCE = 8192


@torch.no_grad()
def gptq(
    decoder: Decoder,
    chosen: dict[str, str],
    group: int,
    ids: Tensor,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> None:
    """Quantize the matrices that `to_quantize` chose, in place, for the calibration text `ids` [rows, length].

    Embedding and head are rounded to nearest. `progress` gets the number of layers done, and of all.
    """
    batches = [_block_inputs(decoder, rows) for rows in ids.split(max(1, TOKENS_AT_ONCE // ids.size(1)))]
    hidden = [x for x, _ in batches]
    for index, block in enumerate(decoder.blocks):
        calls = [others[index] for _, others in batches]

        def run(block: nn.Module = block, calls: list[Any] = calls) -> list[Tensor]:
            return [block(x, *arguments) for x, arguments in zip(hidden, calls)]

        names = [name for name in chosen if name.startswith(f"blocks.{index}.")]
        for together in _with_one_input(decoder, names, lambda: block(hidden[0], *calls[0])):  # noqa: B023
            factor = _inverse_factor(_hessian(decoder.get_submodule(together[0]), run))
            for name in together:
                replace(decoder, name, solve(linear(decoder, name), factor, chosen[name], group))
        hidden = run()
        progress(index + 1, len(decoder.blocks))
    round_to(decoder, chosen, group)


def solve(linear: LinearLike, factor: Tensor, form: str, group: int) -> QuantizedLinear:
    """The linear with its columns rounded in order. `factor` [in, in]: U of the formula above."""
    weight = linear.weight.detach().float().clone()  # [out, in]
    codes, scales = [], []
    for start in range(0, weight.size(1), group):
        part, u = weight[:, start : start + group], factor[start : start + group]
        scale = group_scales(part, form)  # [out]
        errors = torch.empty_like(part)
        for j in range(group):
            code = nearest(part[:, j], scale, form)
            errors[:, j] = (part[:, j] - values(code, form) * scale) / u[j, start + j]
            part[:, j + 1 :] -= errors[:, j, None] * u[j, start + j + 1 : start + group]
            codes.append(code)
        weight[:, start + group :] -= errors @ u[:, start + group :]
        scales.append(scale)
    grouped = torch.stack(codes, dim=1).unflatten(1, (-1, group))  # [out, groups, group]
    return QuantizedLinear(pack(grouped, form), torch.stack(scales, dim=1), form, linear.bias)


def _block_inputs(decoder: Decoder, ids: Tensor) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """The first block's input [rows, length, width], and the other arguments of every block."""
    calls: list[tuple[Any, ...]] = []
    hooks = [block.register_forward_pre_hook(lambda _, arguments: calls.append(arguments)) for block in decoder.blocks]
    decoder(ids)
    for hook in hooks:
        hook.remove()
    return calls[0][0], [arguments[1:] for arguments in calls]


def _with_one_input(decoder: Decoder, names: list[str], run: Callable[[], Any]) -> list[list[str]]:
    """The linears `names` in the order in which `run` calls them; those called with the same tensor together."""
    called: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        same = next((others for seen, others in called if seen is x), None)
        if same is None:
            called.append((x, [name]))
        else:
            same.append(name)

    hooks = [
        decoder.get_submodule(name).register_forward_pre_hook(lambda _, arguments, name=name: note(name, arguments[0]))
        for name in names
    ]
    run()
    for hook in hooks:
        hook.remove()
    return [others for _, others in called]


def _hessian(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The mean of x xᵀ over all inputs x of a linear while `run` runs.  [in, in]"""
    total, count = torch.zeros(()), 0

    def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal total, count
        x = arguments[0].flatten(0, -2).float()  # [tokens, in]
        total, count = total + x.T @ x, count + len(x)

    hook = module.register_forward_pre_hook(add)
    run()
    hook.remove()
    return total / count


def _inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with Uᵀ U = (H + damping)⁻¹.  [in, in]"""
    diagonal = hessian.diagonal()
    damping = DAMPING * diagonal.mean()
    while True:  # rounding may leave a singular H with negative eigenvalues
        damped = hessian + (damping + 1e-12) * torch.eye(len(hessian))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
        damping = damping * 10 + 1e-12
