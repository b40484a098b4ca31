"""GPTQ: its formula beside the one of the paper, and its result beside rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from slmkit.adapt.gptq import _inverse_factor, gptq, solve
from slmkit.adapt.quantize import quantized_modules, round_to, rounded, to_quantize
from slmkit.config import UserError
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from tests.adapt.trained import loss, rows, trained_decoder
from tests.model.test_cache import UNLIKE, config, ids


@pytest.fixture(scope="module")
def trained() -> Decoder:
    return trained_decoder()


def correlated_inputs(tokens: int = 512, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(tokens, width, generator=generator) @ mix


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_outputs_change_less_than_by_rounding(kind: str) -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 48), correlated_inputs()
    factor = _inverse_factor(x.T @ x / len(x), "query")
    wanted = linear(x)
    solved, plain = solve(linear, factor, kind, 32), rounded(linear, kind, 32)
    errors = [(module(x) - wanted).square().mean() for module in (solved, plain)]
    assert errors[0] < 0.6 * errors[1]
    assert solved.codes.shape == plain.codes.shape
    assert torch.equal(solved.scales, solved.scales.bfloat16().float())


def test_columns_are_corrected_as_the_paper_does_it() -> None:
    """Against optimal brain quantization: after each column the inverse Hessian of the rest is computed anew."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 8), correlated_inputs()
    hessian = x.T @ x / len(x)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)).double()
    solved = solve(linear, _inverse_factor(hessian, "query"), "int4", 64)
    weight = linear.weight.detach().double().clone()
    scale = solved.scales.double()[:, 0]
    for j in range(64):
        inverse = damped[j:, j:].inverse()
        column = (weight[:, j] / scale).round().clamp(-8, 7) * scale
        weight[:, j:] -= ((weight[:, j] - column) / inverse[0, 0])[:, None] * inverse[0]
        torch.testing.assert_close(weight[:, j], column)
    agree = ((solved.weight.double() - weight).abs() < 1e-4).double().mean()
    assert agree > 0.98  # a weight halfway between two codes may go either way


def test_a_singular_hessian_is_damped_until_it_can_be_inverted() -> None:
    for hessian in (torch.zeros(64, 64), torch.ones(64, 64), -1e-3 * torch.eye(64)):
        assert _inverse_factor(hessian, "query").isfinite().all()
        assert torch.equal(_inverse_factor(hessian, "query").tril(-1), torch.zeros(64, 64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_inputs_that_are_not_finite_are_refused_by_the_name_of_the_linear(trained: Decoder, value: float) -> None:
    hessian = torch.ones(64, 64)
    hessian[3, 2] = hessian[2, 3] = value
    with pytest.raises(UserError, match="^query: its inputs on the calibration text are not finite"):
        _inverse_factor(hessian, "query")
    broken = copy.deepcopy(trained)
    broken.blocks[1].mlp.up.weight.data[5] = value
    with pytest.raises(UserError, match=r"^blocks\.1\.mlp\.down: .*calibrate with another text, or .*--method round"):
        gptq(broken, to_quantize(broken, "int4", 64, "bfloat16"), 64, rows(2, 4))


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_a_trained_model_predicts_more_like_itself_than_by_rounding(trained: Decoder, kind: str) -> None:
    chosen = to_quantize(trained, kind, 64, "bfloat16")
    by_rounding, by_gptq = copy.deepcopy(trained), copy.deepcopy(trained)
    round_to(by_rounding, chosen, 64)
    done = []
    gptq(by_gptq, chosen, 64, rows(2, 48), lambda layer, layers: done.append((layer, layers)))
    assert done == [(1, 2), (2, 2)]
    held_out = rows(3, 48)
    with torch.no_grad():
        assert loss(trained, held_out) < 3  # it learned: 5.6 without
        wanted = trained.logits(trained(held_out)).log_softmax(-1)
        rounding, second = (
            F.kl_div(one.logits(one(held_out)).log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            for one in (by_rounding, by_gptq)
        )
    assert 0 < second < 0.8 * rounding


@pytest.mark.parametrize("family", UNLIKE)
def test_every_family_is_calibrated(family: str) -> None:
    two = {"num_hidden_layers": 2} | ({"layer_types": None} if config(family).layer_types else {})
    decoder = build_decoder(config(family).model_copy(update=two), seed=3).eval()
    chosen = to_quantize(decoder, "int4", 32, "bfloat16")
    names = list(chosen)
    gptq(decoder, chosen, 32, ids(4))
    assert quantized_modules(decoder).keys() == set(names)
    assert decoder.logits(decoder(ids())).isfinite().all()
    assert not [hook for module in decoder.modules() for hook in module._forward_pre_hooks]
