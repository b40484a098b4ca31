"""Muon: the reference's steps, whatever the shapes and however many go into one stack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slmkit.device import multiplies_in_bfloat16
from slmkit.training.optimizers import choose
from slmkit.training.optimizers.choose import POLAR_EXPRESS, Muon, orthogonal

SHAPES = [(24, 24), (24, 24), (48, 24), (24, 48), (24, 24), (7, 3), (24, 48)]
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5  # what torch.optim.Muon does


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
@pytest.mark.parametrize("in_bfloat16", [True, False])
def test_its_steps_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, largest_stack: int, in_bfloat16: bool
) -> None:
    monkeypatch.setattr(choose, "LARGEST_STACK", largest_stack)
    monkeypatch.setattr(choose, "POLAR_EXPRESS", JORDAN)
    monkeypatch.setattr(choose, "multiplies_in_bfloat16", lambda device: in_bfloat16)  # the reference always does
    plain, ours = matrices(), matrices()
    settings = {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9}
    stepped(plain, torch.optim.Muon(plain, nesterov=True, **settings))
    stepped(ours, Muon(ours, **settings))
    for a, b in zip(plain, ours):
        # Eight steps of 0.05, of the reference in bfloat16, whose rounding is the difference.
        torch.testing.assert_close(a, b, rtol=0, atol=6e-3)


@pytest.mark.parametrize("shape", [(20, 20), (20, 24), (20, 50), (50, 20)])
@pytest.mark.parametrize("rank", [1, 20])
def test_a_wide_matrix_by_fewer_products_is_the_plain_iteration(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rank: int
) -> None:
    monkeypatch.setattr(choose, "multiplies_in_bfloat16", lambda device: False)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(3, shape[0], rank, generator=draw) @ torch.randn(3, rank, shape[1], generator=draw)
    torch.testing.assert_close(orthogonal(x), iterated(x).float(), rtol=0, atol=2e-4)


def iterated(x: Tensor) -> Tensor:
    """The polynomials of the singular values one after another, in float64."""
    x = x.double() / x.double().norm(dim=(-2, -1), keepdim=True)
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
    return x


def test_each_polynomial_is_the_best_for_what_the_one_before_it_leaves() -> None:
    """Of degree 5, odd: its distances from 1 are equally large, with changing sign, at the ends and twice between."""
    low, high = 0.003, 1.0
    for number, (a, b, c) in enumerate(POLAR_EXPRESS):
        s = 1.01 if number < len(POLAR_EXPRESS) - 1 else 1.0
        x = np.linspace(low, high, 100_001)
        distance = a * s * x + b * s**3 * x**3 + c * s**5 * x**5 - 1
        between = np.flatnonzero(np.diff(np.sign(np.diff(distance)))) + 1
        extremes = distance[[0, *between, -1]]
        assert extremes == pytest.approx(extremes[-1] * np.array([-1, 1, -1, 1]), abs=1e-3)
        low, high = 1 + distance.min(), 1 + distance.max()
    assert (low, high) == pytest.approx((0.80, 1.20), abs=0.005)


def test_products_are_in_float32_where_the_hardware_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(2))
    found = {}
    for has in (True, False):
        monkeypatch.setattr(choose, "multiplies_in_bfloat16", lambda device, has=has: has)
        found[has] = orthogonal(draw)
    assert (found[True].dtype, found[False].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found[True].float(), found[False], rtol=0, atol=0.06)


@pytest.mark.parametrize("in_bfloat16", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 8])  # of rank 1, the largest singular value is the norm: it may round to more
def test_every_direction_of_a_step_is_about_as_long(
    monkeypatch: pytest.MonkeyPatch, in_bfloat16: bool, rank: int
) -> None:
    monkeypatch.setattr(choose, "multiplies_in_bfloat16", lambda device: in_bfloat16)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(3, 20, rank, generator=draw) @ torch.randn(3, rank, 50, generator=draw)
    values = torch.linalg.svdvals(orthogonal(x).float())[:, :rank]
    assert values.min() > 0.7
    assert values.max() < 1.3


def test_rows_of_an_update_are_made_equally_long_over_the_steps() -> None:
    """Algorithm 1 of arXiv:2510.05491, one matrix and one step at a time; the norm of an update is Muon's."""
    plain, ours = matrices(), matrices()
    stepped(ours, Muon(ours, lr=0.05, momentum=0.9, beta2=0.8))
    draw = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(shape, generator=draw) for shape in SHAPES] for _ in range(8)]
    for index, p in enumerate(plain):
        momentum, variance = torch.zeros_like(p), torch.zeros(len(p), 1)
        for gradient in (of_step[index] for step, of_step in enumerate(gradients) if step != index):
            momentum = 0.9 * momentum + 0.1 * gradient
            update = orthogonal((0.9 * momentum + 0.1 * gradient)[None])[0].float()
            variance = 0.8 * variance + 0.2 * update.square().mean(1, keepdim=True)
            even = update / variance.sqrt()
            even *= update.norm() / even.norm()
            p.data -= 0.05 * max(1.0, p.size(0) / p.size(1)) ** 0.5 * even
        torch.testing.assert_close(ours[index], p, rtol=0, atol=1e-3 if multiplies_in_bfloat16(p.device) else 1e-4)


def test_rows_without_a_gradient_stay_as_they_are() -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.zeros(4, 6)
    Muon([weight], lr=0.1, beta2=0.9).step()
    assert torch.equal(weight, torch.ones(4, 6))
    weight.grad[1] = 1.0
    Muon([weight], lr=0.1, beta2=0.9).step()
    assert (weight != 1).any(1).tolist() == [False, True, False, False]
    assert torch.isfinite(weight).all()
