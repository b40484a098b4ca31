"""The optimizers, and which of the trained parameters each of them updates.

Muon updates matrices inside the blocks; the embedding, the head, norms and biases are always updated by AdamW. Weight
decay is decoupled, and on matrices only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from slmkit.config import UserError
from slmkit.device import Device
from slmkit.training.optimizers.lion_and_muon import Lion, Muon
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

    The update is the momentum, orthogonalised by five Newton-Schulz iterations: fewer tokens to the same loss, for a
    few extra matrix products per step.
    """
    parameters = trained(model)
    hidden = {name for name, parameter in parameters.items() if name.startswith("blocks.") and parameter.dim() == 2}
    matrices = [parameter for name, parameter in parameters.items() if name in hidden]
    others = [parameter for name, parameter in parameters.items() if name not in hidden]
    first = Muon(
        matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay, momentum=settings.muon_momentum
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
