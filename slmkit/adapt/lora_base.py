"""A frozen linear whose matrix is quantized, and dequantized only for each product (QLoRA).

Gradients go to its input and never to the matrix. Neither pass keeps the dequantized matrix: the backward pass
dequantizes it again (Dettmers et al. 2023, arXiv:2305.14314).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64  # weights per scale in NF4
# NF4's sixteen values: quantiles of the normal distribution with zero, scaled to [-1, 1] (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class FrozenLinear(nn.Module):
    """x W^T + b with a frozen matrix, stored as `codes` and `scales`."""

    name: str

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.codes: Tensor
        self.scales: Tensor
        codes, scales = self.encode(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [out, in] → codes and scales."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix.  [out, in], float32"""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return _Product.apply(x, self)


class BFloat16Linear(FrozenLinear):
    """Two bytes per weight."""

    name = "bfloat16"

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.bfloat16(), weight.new_empty(0)

    @property
    def weight(self) -> Tensor:
        return self.codes.float()


class Int8Linear(FrozenLinear):
    """One byte per weight and a scale per row: the rounding error is at most 1/254 of the row's maximum."""

    name = "int8"

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scales = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127  # [out, 1]
        return (weight / scales).round().to(torch.int8), scales

    @property
    def weight(self) -> Tensor:
        return self.codes * self.scales


class NF4Linear(FrozenLinear):
    """Half a byte per weight and a scale per block of 64: 4.5 bits in total."""

    name = "nf4"

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)  # [blocks]
        values = torch.tensor(NF4, device=weight.device)
        borders = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks / scales[:, None], borders).to(torch.uint8)  # [blocks, 64] of 0 … 15
        return codes[:, ::2] << 4 | codes[:, 1::2], scales  # [blocks, 32]: two in a byte

    @property
    def weight(self) -> Tensor:
        values = torch.tensor(NF4, device=self.codes.device)
        # Look up pairs of values, one of 256 for each byte: half as many look-ups.
        pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)  # [256, 2]
        blocks = pairs[self.codes.int()].flatten(1) * self.scales[:, None]  # [blocks, 64]
        return blocks.flatten()[: self.out_features * self.in_features].view(self.out_features, self.in_features)


class _Product(torch.autograd.Function):
    """x W^T + b that keeps only the linear for the backward pass.  [..., in] → [..., out]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.weight.to(x.dtype), linear.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.linear.weight.to(gradient.dtype), None


FORMATS: dict[str, type[FrozenLinear]] = {kind.name: kind for kind in (BFloat16Linear, Int8Linear, NF4Linear)}
