"""The optimizers, which of the trained parameters each of them updates, and the steps of Lion and Muon.

Muon updates matrices inside the blocks; the embedding, the head, norms and biases are always updated by AdamW. Weight
decay is decoupled, and on matrices only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slmkit.config import UserError
from slmkit.device import Device, multiplies_in_bfloat16
from slmkit.training.distributed import share_like, whole
from slmkit.training.precision import UpdatedInFloat32
from slmkit.training.recipe.recipe import TrainSettings

Optimizers = list[torch.optim.Optimizer]


def make_optimizers(model: nn.Module, settings: TrainSettings, device: Device) -> Optimizers:
    """The recipe's optimizers for `model`, whose weights have the device's `weight_dtype`.

    Raises `UserError` when the optimizer's package is missing, and if every parameter is frozen.
    """
    if not trained(model):
        raise UserError("nothing is trained: every parameter is frozen; set requires_grad on those that are to change")
    optimizers = OPTIMIZERS[settings.optimizer](model, settings)
    if device.weight_dtype == torch.float32:
        return optimizers
    return [UpdatedInFloat32(optimizer, master=device.keeps_master) for optimizer in optimizers]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adamw(model: nn.Module, settings: TrainSettings) -> Optimizers:
    """AdamW for everything (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    return [_adamw(trained(model).values(), settings)]


def adamw_8bit(model: nn.Module, settings: TrainSettings) -> Optimizers:
    """AdamW with a quarter of the state: moments of 8 bits in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).

    Raises `UserError` without bitsandbytes.
    """
    try:
        from slmkit.training.optimizers.adamw_8bit import AdamW8bit  # here, since importing bitsandbytes takes seconds
    except ImportError as error:
        raise UserError(f"train.optimizer adamw_8bit: {error}; pip install slmkit[optim]") from None
    return [with_peaks(AdamW8bit(_decayed_and_not(trained(model).values(), settings), **_adam_rates(settings)))]


def lion(model: nn.Module, settings: TrainSettings) -> Optimizers:
    """Lion for everything, with a beta 2 of 0.99."""
    groups = _decayed_and_not(trained(model).values(), settings)
    return [with_peaks(Lion(groups, lr=settings.learning_rate, betas=(settings.adam_beta1, LION_BETA2)))]


def muon(model: nn.Module, settings: TrainSettings) -> Optimizers:
    """Muon for the hidden matrices (Jordan 2024), AdamW for the rest.

    The update is the momentum, orthogonalised by four matrix polynomials: fewer tokens to the same loss, for a few
    extra matrix products per step.
    """
    parameters = trained(model)
    hidden = {name for name, parameter in parameters.items() if name.startswith("blocks.") and parameter.dim() == 2}
    matrices = [parameter for name, parameter in parameters.items() if name in hidden]
    others = [parameter for name, parameter in parameters.items() if name not in hidden]
    first = Muon(
        matrices, settings.muon_learning_rate, settings.weight_decay, settings.muon_momentum, settings.muon_beta2
    )
    return [with_peaks(first), _adamw(others, settings)]


def _adamw(parameters: Iterable[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    # Fused, it is one multi-tensor update: 6 ms at 10.6 M parameters on two cores.
    groups = _decayed_and_not(parameters, settings)
    return with_peaks(torch.optim.AdamW(groups, **_adam_rates(settings), fused=True))


def _decayed_and_not(parameters: Iterable[nn.Parameter], settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices only."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _adam_rates(settings: TrainSettings) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }


def with_peaks(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Store each group's peak rate, which the loop multiplies by the schedule."""
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


LION_BETA2 = 0.99
OPTIMIZERS: dict[str, Callable[[nn.Module, TrainSettings], Optimizers]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "muon": muon,
    "lion": lion,
}


# -- Lion and Muon, with one operation for many parameters at a time ---------------------------------------------------


class ForeachOptimizer(torch.optim.Optimizer):
    """Calls `update` for the parameters of each group that have a gradient."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self.update(parameters, group)

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:  # [...] each
        """Change the parameters by their gradients."""
        raise NotImplementedError

    def momenta(self, name: str, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients, and momenta stored under `name`, which begin as zeros: [...] each, as the parameters."""
        for p in parameters:
            if not self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [p.grad for p in parameters if p.grad is not None], [self.state[p][name] for p in parameters]


class Lion(ForeachOptimizer):
    """Lion: updates by the sign of the momentum; half of Adam's state.

    Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2. Use a learning
    rate three to ten times below AdamW's, and a weight decay as many times higher; it is decoupled.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:  # [...] each
        gradients, momenta = self.momenta("exp_avg", parameters)
        beta1, beta2 = group["betas"]
        steps = torch._foreach_sign(torch._foreach_lerp(momenta, gradients, 1 - beta1))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)


# Small matrices are faster in one batched product (17 → 7 ms for 28 of width 128 on two cores); large ones are not,
# and would need the memory.
LARGEST_STACK = 2**22  # elements
# Coefficients of x, x³ and x⁵. Each polynomial is the one whose largest distance from 1 is least over what the one
# before it leaves of [0.003, 1]; all but the last are of x / 1.01, since bfloat16 may round 1 up to more. The four
# drive that interval into [0.78, 1.2]; Jordan's 3.4445, -4.7750, 2.0315 needs five rounds for about as much.
POLAR_EXPRESS = (
    (8.300667, -24.037544, 17.466134),
    (4.003387, -2.922840, 0.541871),
    (3.470862, -2.549404, 0.500204),
    (2.490116, -1.834275, 0.436835),
)
LEAST_NORM = 1e-7


class Muon(ForeachOptimizer):
    """Muon with Nesterov's momentum: the update is the momentum with all its singular values near 1.

    Jordan 2024, "Muon: An optimizer for hidden layers in neural networks"; the polynomials are those of Amsel et al.
    2025, "The Polar Express", arXiv:2505.16932. A matrix of more rows than columns takes larger steps, by the square
    root of the ratio. Weight decay is decoupled. With `beta2` the rows of an update are made equally long over the
    steps (NorMuon, Li et al. 2025, arXiv:2510.05491). All parameters must be matrices.
    """

    def __init__(
        self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95, beta2: float | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "beta2": beta2})

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:  # [rows, columns] each
        for matrices in _stacks(parameters):
            gradients, momenta = self.momenta("momentum_buffer", matrices)
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            # Singular values need full matrices: where ranks hold shards, each rank gathers and orthogonalises them.
            ahead = torch.stack([whole(part) for part in torch._foreach_lerp(gradients, momenta, group["momentum"])])
            rows, columns = matrices[0].shape
            step = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            directions = orthogonal(ahead).to(matrices[0].dtype)
            if group["beta2"] is not None:
                directions = self.with_even_rows(directions, matrices, group["beta2"])
            torch._foreach_add_(matrices, [*map(share_like, directions, matrices)], alpha=-step)

    def with_even_rows(self, directions: Tensor, matrices: list[Tensor], beta2: float) -> Tensor:
        """Each row divided by the root of its mean square over the steps, the norm of a matrix kept.

        `directions` and the result: [matrices, rows, columns]. The mean squares, [rows, 1], are whole on every rank.
        """
        squares = directions.square().mean(-1, keepdim=True)  # [matrices, rows, 1]
        for p in matrices:
            self.state[p].setdefault("row_variance", torch.zeros_like(squares[0]))
        variances = [self.state[p]["row_variance"] for p in matrices]
        torch._foreach_lerp_(variances, [*squares], 1 - beta2)
        scales = torch.stack(variances).sqrt().clamp(min=LEAST_NORM).reciprocal()
        norms = (
            squares.sum(-2, keepdim=True),
            (squares * scales.square()).sum(-2, keepdim=True),
        )  # squared, by columns
        return directions * scales * (norms[0] / norms[1].clamp(min=LEAST_NORM)).sqrt()


def orthogonal(matrices: Tensor) -> Tensor:
    """Each matrix with its singular values driven towards 1 by `POLAR_EXPRESS`.  [matrices, rows, columns]

    Products are of the shorter side, in bfloat16 if the hardware supports it, else in float32.
    """
    if matrices.size(-2) > matrices.size(-1):
        return orthogonal(matrices.mT).mT
    x = matrices.bfloat16() if multiplies_in_bfloat16(matrices.device) else matrices.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    if x.dtype == torch.float32 and x.size(-1) > 1.5 * x.size(-2):
        return torch.bmm(_product_of_factors(torch.bmm(x, x.mT)), x)
    for coefficients in POLAR_EXPRESS:
        x = torch.bmm(_factor(torch.bmm(x, x.mT), coefficients), x)
    return x


def _factor(gram: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """a + b x xᵀ + c (x xᵀ)², by which a polynomial multiplies x, from x xᵀ.  [matrices, rows, rows]"""
    a, b, c = coefficients
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


def _product_of_factors(gram: Tensor) -> Tensor:
    """What all polynomials multiply x by, from x xᵀ: fewer products where x is wide.  [matrices, rows, rows]

    A factor f maps x to f x, and x xᵀ to f x xᵀ f. Not for bfloat16, whose rounding would hide small eigenvalues.
    """
    product = factor = _factor(gram, POLAR_EXPRESS[0])
    for coefficients in POLAR_EXPRESS[1:]:
        gram = torch.bmm(torch.bmm(factor, gram), factor)
        factor = _factor(gram, coefficients)
        product = torch.bmm(product, factor)
    return product


def _stacks(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of matrices of one shape, up to `LARGEST_STACK` elements each."""
    of_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        of_shape[matrix.shape].append(matrix)
    for shape, alike in of_shape.items():
        most = max(1, LARGEST_STACK // shape.numel())
        for first in range(0, len(alike), most):
            yield alike[first : first + most]
