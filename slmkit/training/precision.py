"""What training in 16 bits needs besides autocast: a scale for float16's losses, and updates in float32."""

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
LARGEST_CHUNK = 2**24  # elements of weights that are in float32 at once


@dataclass
class LossScale:
    """What losses are multiplied by, so that small gradients are not lost in float16 (arXiv:1710.03740).

    Where gradients overflow it is halved, and the batch computed again: none is lost. After many steps without that it
    doubles. A scale of at most 1 never changes: other types need none.
    """

    value: float = 1.0
    largest: float = 1.0
    good_steps: int = 0  # in a row

    @classmethod
    def of(cls, device: Device) -> LossScale:
        return cls(FIRST_SCALE, LARGEST_SCALE) if device.compute_dtype == torch.float16 else cls()

    def overflows(self, loss: float, grad_norm: float) -> bool:
        """Note a step's figures; whether its gradients overflowed for the scale's sake, which then is lower now."""
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps == STEPS_TO_DOUBLE:
                self.value, self.good_steps = min(2 * self.value, self.largest), 0
            return False
        self.good_steps = 0
        if self.value <= 1 or not math.isfinite(loss):  # a loss that is not finite was so before it was scaled
            return False
        self.value /= 2
        return True


class UpdatedInFloat32(torch.optim.Optimizer):
    """Weights in bfloat16, updated by an optimizer that sees them, and keeps its moments, in float32.

    Between steps the float32 weights are either kept (`master`: Micikevicius et al. 2018, arXiv:1710.03740) or rounded
    to one of the two neighbours in bfloat16, to the nearer one more often (Zamirai et al. 2020, arXiv:2010.06192): most
    updates are smaller than half their distance, and rounded to the nearest would be nothing. Rounding draws from
    torch's generator. A few weights at a time are in float32, so that rounding takes no more memory than it saves.
    """

    def __init__(self, inner: torch.optim.Optimizer, master: bool) -> None:
        """`inner` is fresh, and made for the same parameters, whatever their type."""
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
        """The moments of `inner` by the number of each parameter, and `master`: its float32 weights, if kept."""
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
        """Each weight with its float32 one, in the order of their numbers."""
        for group, inner in zip(self.param_groups, self.inner.param_groups):
            yield from zip(group["params"], inner["params"])

    def _chunks(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Those that have gradients, as many together as are to be in float32 at once."""
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
    """float32 to bfloat16, up or down with the probabilities that leave the mean as it is.

    bfloat16 is float32 without its last 16 bits; a random number added to those carries as often as they ask for.
    """
    bits = x.view(torch.int32)
    carried = torch.randint_like(bits, 2**16).add_(bits)
    rounded = carried.bitwise_and_(-(2**16)).view(torch.float32).bfloat16()
    return torch.where(torch.isfinite(x), rounded, x.bfloat16())


def to_weight_dtype(model: nn.Module, device: Device) -> None:
    """Bring a model's weights into the type in which they are trained; tables that are not learned stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device.weight_dtype)


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)
