"""Muon: the reference's steps, whatever the shapes and however many go into one stack."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slmkit.training.optimizers import choose
from slmkit.training.optimizers.choose import Muon, orthogonal

SHAPES = [(24, 24), (24, 24), (48, 24), (24, 48), (24, 24), (7, 3), (24, 48)]


def matrices() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def stepped(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    for step in range(8):
        for index, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=draw)
            parameter.grad = None if index == step else gradient  # one is left out in each step
        optimizer.step()
    return parameters


@pytest.mark.parametrize("largest_stack", [1, 24 * 24 * 2, 2**22])
def test_its_steps_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch, largest_stack: int) -> None:
    monkeypatch.setattr(choose, "LARGEST_STACK", largest_stack)
    monkeypatch.setattr(choose, "multiplies_in_bfloat16", lambda device: True)  # as the reference does everywhere
    plain, ours = matrices(), matrices()
    settings = {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9}
    stepped(plain, torch.optim.Muon(plain, nesterov=True, **settings))
    stepped(ours, Muon(ours, **settings))
    for a, b in zip(plain, ours):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # eight steps of 0.05 in bfloat16


def test_products_are_in_float32_where_the_hardware_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(2))
    found = {}
    for has in (True, False):
        monkeypatch.setattr(choose, "multiplies_in_bfloat16", lambda device, has=has: has)
        found[has] = orthogonal(draw, (3.4445, -4.7750, 2.0315), rounds=5, eps=1e-7)
    assert (found[True].dtype, found[False].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found[True].float(), found[False], rtol=0, atol=0.03)


def test_every_direction_of_a_step_is_about_as_long() -> None:
    values = torch.linalg.svdvals(
        orthogonal(torch.randn(3, 20, 50), (3.4445, -4.7750, 2.0315), rounds=5, eps=1e-7).float()
    )
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_what_is_not_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="2D"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)
