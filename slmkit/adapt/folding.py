"""Folding an adapter in: the frozen matrix and its update become one matrix, and the model a plain one again."""

from __future__ import annotations

import torch
from torch import nn

from slmkit.adapt.lora import adapted_linears
from slmkit.adapt.lora_base import FrozenLinear
from slmkit.adapt.swapping import replace
from slmkit.config import UserError
from slmkit.model import Decoder


def fold(decoder: Decoder) -> Decoder:
    """Put one linear in the place of each adapted one, in place; the decoder computes what it computed.

    Raises `UserError` for a base that is kept in fewer bits: most of an update is smaller than their steps, and what is
    rounded to them again has lost what was learned.
    """
    for name, adapted in adapted_linears(decoder).items():
        if isinstance(adapted.base, FrozenLinear):
            raise UserError(
                f"{name} is stored in {adapted.base.name}, which is too coarse for what the adapter learned: "
                "merge the adapter into the full weights, with `slm merge`"
            )
        replace(decoder, name, _plain(adapted.weight.detach(), adapted.bias))
    return decoder.requires_grad_(True)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear
