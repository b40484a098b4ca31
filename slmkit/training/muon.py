"""Muon: momentum made orthogonal, many matrices of one shape at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Of the odd polynomial that drives every singular value to about 1 in five rounds (Jordan 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
# Small matrices win by going through one batched product together (17 → 5 ms for 28 of width 128 on two cores); large
# ones win nothing and would need the memory.
LARGEST_STACK = 2**22  # elements


class Muon(torch.optim.Optimizer):
    """The steps of `torch.optim.Muon` with Nesterov's momentum, three times as fast on small matrices.

    Jordan 2024, "Muon: An optimizer for hidden layers in neural networks". A matrix of more rows than columns takes
    larger steps, by the square root of the ratio. Weight decay is decoupled. Raises `ValueError` for a parameter that
    is not a matrix.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon is for matrices, not for a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrices in _stacks(p for p in group["params"] if p.grad is not None):
                self._update(matrices, group)
        return loss

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))  # [matrices, rows, columns]
        rows, columns = matrices[0].shape
        step = group["lr"] * max(1.0, rows / columns) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(orthogonal(ahead).to(matrices[0].dtype)), alpha=-step)


def orthogonal(matrices: Tensor) -> Tensor:
    """Each matrix with its singular values driven to between 0.7 and 1.2.  [matrices, rows, columns], in bfloat16."""
    if matrices.size(-2) > matrices.size(-1):
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _stacks(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape together, as many as go into one stack."""
    of_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        of_shape[matrix.shape].append(matrix)
    for shape, alike in of_shape.items():
        most = max(1, LARGEST_STACK // shape.numel())
        for first in range(0, len(alike), most):
            yield alike[first : first + most]
