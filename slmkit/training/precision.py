"""16-bit training: loss scaling for float16, and float32 updates of bfloat16 weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.device import Device

FIRST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24
STEPS_TO_DOUBLE = 2_000
LARGEST_CHUNK = 2**24  # elements of weights converted to float32 at once


@dataclass
class LossScale:
    """Factor on the loss, so that small gradients do not underflow in float16 (arXiv:1710.03740).

    When gradients overflow it is halved and the batch computed again; after many steps without overflow it doubles. A
    scale of at most 1 never changes: other types need none.
    """

    value: float = 1.0
    largest: float = 1.0
    good_steps: int = 0  # in a row

    @classmethod
    def of(cls, device: Device) -> LossScale:
        return cls(FIRST_SCALE, LARGEST_SCALE) if device.compute_dtype == torch.float16 else cls()

    def overflows(self, loss: float, grad_norm: float) -> bool:
        """Record a step's figures. True if its gradients overflowed because of the scale, which is then lowered."""
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps == STEPS_TO_DOUBLE:
                self.value, self.good_steps = min(2 * self.value, self.largest), 0
            return False
        self.good_steps = 0
        if self.value <= 1 or not math.isfinite(loss):  # a non-finite loss was so before scaling
            return False
        self.value /= 2
        return True


class UpdatedInFloat32(torch.optim.Optimizer):
    """Optimizer wrapper: weights are bfloat16, the inner optimizer sees float32 weights and keeps float32 moments.

    Between steps the float32 weights are either kept (`master`: Micikevicius et al. 2018, arXiv:1710.03740) or rounded
    stochastically to bfloat16 (Zamirai et al. 2020, arXiv:2010.06192): most updates are smaller than half the distance
    between bfloat16 neighbours, and rounding to the nearest would lose them. Rounding draws from torch's generator.
    Only a few weights at a time are in float32, to save memory.
    """

    def __init__(self, inner: torch.optim.Optimizer, master: bool) -> None:
        """`inner` has no state yet, and is made for the same parameters, of any type."""
        super().__init__([dict(group) for group in inner.param_groups], {})
        self.inner, self.master = inner, master
        for group in inner.param_groups:
            group["params"] = [nn.Parameter(p.detach().float() if master else _nothing(p)) for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group, inner in zip(self.param_groups, self.inner.param_groups):
            inner |= {key: value for key, value in group.items() if key != "params"}
        for chunk in self._chunks():
            for weight, wide in chunk:
                assert weight.grad is not None
                if not self.master:
                    wide.data = weight.float()
                wide.grad, weight.grad = weight.grad.float(), None
            self.inner.step()
            for weight, wide in chunk:
                weight.copy_(wide if self.master else rounded_stochastically(wide))
                wide.grad = None
                if not self.master:
                    wide.data = _nothing(weight)

    def state_dict(self) -> dict[str, Any]:
        """The state of `inner` by parameter number, and `master`: the float32 weights, if kept."""
        state = {index: dict(moments) for index, moments in self.inner.state_dict()["state"].items()}
        if self.master:
            for index, (_, wide) in enumerate(self._pairs()):
                state.setdefault(index, {})["master"] = wide.detach()
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, content: dict[str, Any]) -> None:
        moments = {index: dict(of_one) for index, of_one in content["state"].items()}
        for index, (weight, wide) in enumerate(self._pairs()):
            kept = moments.get(index, {}).pop("master", None)
            if kept is not None:
                wide.data = kept.to(weight.device, torch.float32, copy=True)
        groups = self.inner.state_dict()["param_groups"]
        self.inner.load_state_dict({"state": {i: m for i, m in moments.items() if m}, "param_groups": groups})

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of weight and float32 weight, in the order of parameter numbers."""
        for group, inner in zip(self.param_groups, self.inner.param_groups):
            yield from zip(group["params"], inner["params"])

    def _chunks(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Pairs that have gradients, grouped by how many may be in float32 at once."""
        chunk: list[tuple[Tensor, Tensor]] = []
        for weight, wide in self._pairs():
            if weight.grad is None:
                continue
            if chunk and sum(w.numel() for w, _ in chunk) + weight.numel() > LARGEST_CHUNK:
                yield chunk
                chunk = []
            chunk.append((weight, wide))
        if chunk:
            yield chunk


def rounded_stochastically(x: Tensor) -> Tensor:
    """Stochastic rounding of float32 `x` [...] to bfloat16 [...], with expectation `x`.

    bfloat16 is float32 without its last 16 bits: adding a random 16-bit number carries with the right probability.
    """
    bits = x.view(torch.int32)
    carried = torch.randint_like(bits, 2**16).add_(bits)
    rounded = carried.bitwise_and_(-(2**16)).view(torch.float32).bfloat16()
    return torch.where(torch.isfinite(x), rounded, x.bfloat16())


def to_weight_dtype(model: nn.Module, device: Device) -> None:
    """Convert a model's weights to the type in which they are trained; buffers that are not learned keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device.weight_dtype)


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)
