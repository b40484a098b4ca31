"""RMSNorm and LayerNorm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.model.architectures import Architecture


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axes, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).  [...] → [...]

    Over (heads, head_dim) it normalises all heads together, over (head_dim) each separately. The weight is 1-D.
    """

    def __init__(self, *shape: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((math.prod(shape),), 1 - offset))
        self.shape, self.eps, self.offset = shape, eps, offset  # offset: added to the weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset if self.offset else self.weight.float()
        return F.rms_norm(x.float(), self.shape, weight.view(self.shape), self.eps).to(x.dtype)


def make_norm(a: Architecture, *shape: int, present: bool = True) -> nn.Module:
    """The architecture's norm over the last axes; an Identity if not `present`."""
    if not present:
        return nn.Identity()
    if a.norm == "layer":
        return nn.LayerNorm(shape, eps=a.norm_eps)
    return RMSNorm(*shape, eps=a.norm_eps, offset=1.0 if a.norm == "rms+1" else 0.0)
