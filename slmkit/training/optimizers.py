"""The optimizers, and the one rule that says which parameters each of them updates.

Matrices inside the blocks are what Muon is for; the embedding, the head, norms and biases are AdamW's in any case.
Weight decay is decoupled, and on matrices alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from slmkit.training.muon import Muon
from slmkit.training.recipe import TrainSettings

Optimizers = list[torch.optim.Optimizer]


def adamw(model: nn.Module, settings: TrainSettings) -> Optimizers:
    """AdamW for everything (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    return [_adamw(model.parameters(), settings)]


def muon(model: nn.Module, settings: TrainSettings) -> Optimizers:
    """Muon for the hidden matrices (Jordan 2024), AdamW for the rest.

    A step's matrix is the momentum made orthogonal by five Newton-Schulz products, so that no direction is left
    behind: fewer tokens to a loss, for some matrix products a step, which large steps hardly notice.
    """
    hidden = {
        name for name, parameter in model.named_parameters() if name.startswith("blocks.") and parameter.dim() == 2
    }
    matrices = [parameter for name, parameter in model.named_parameters() if name in hidden]
    others = [parameter for name, parameter in model.named_parameters() if name not in hidden]
    first = Muon(
        matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay, momentum=settings.muon_momentum
    )
    return [_with_peaks(first), _adamw(others, settings)]


def _adamw(parameters: Iterable[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # Fused, it is one multi-tensor update: 6 ms at 10.6 M parameters on two cores.
    return _with_peaks(
        torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            fused=True,
        )
    )


def _with_peaks(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Each group remembers its peak rate, which the loop multiplies by the schedule."""
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainSettings], Optimizers]] = {"adamw": adamw, "muon": muon}
