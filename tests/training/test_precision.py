"""Training in 16 bits: what is rounded, what is scaled, and that it still learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slmkit.device import PRECISIONS, find_device
from slmkit.training import precision
from slmkit.training.loop import train, train_step
from slmkit.training.objective import next_token
from slmkit.training.precision import LossScale, UpdatedInFloat32, rounded_stochastically
from tests.training.helpers import Changed, plan, state, stream


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_precision_makes_nearly_the_update_of_float32(name: str, optimizer: str) -> None:
    exact, learner = state(optimizer=optimizer), state(optimizer=optimizer, precision=name)
    for step in range(3):
        expected = train_step(exact, next_token, stream().batch(step), plan(3))
        found = train_step(learner, next_token, stream().batch(step), plan(3, precision=name))
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
    assert all(p.dtype == PRECISIONS[name][1] for p in learner.model.parameters())


def test_stochastic_rounding_goes_up_and_down_so_that_the_mean_stays() -> None:
    torch.manual_seed(0)
    exact = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way from 1 to its next neighbour, 1 + 2⁻⁷
    rounded = rounded_stochastically(exact)
    assert rounded.dtype == torch.bfloat16
    assert sorted(rounded.unique().tolist()) == [1.0, 1.0 + 2**-7]
    assert (rounded > 1).float().mean().item() == pytest.approx(1 / 8, abs=0.005)
    below = rounded_stochastically(-exact)
    assert (below < -1).float().mean().item() == pytest.approx(1 / 8, abs=0.005)


def test_what_bfloat16_can_say_is_not_touched_by_rounding() -> None:
    values = torch.tensor([0.0, 1.0, -3.5, 1e-30, -(2.0**100), float("inf"), float("-inf")])
    assert torch.equal(rounded_stochastically(values).float(), values.bfloat16().float())
    assert torch.isnan(rounded_stochastically(torch.tensor([float("nan")]))).all()


@pytest.mark.parametrize("master", [True, False])
def test_updates_too_small_for_bfloat16_add_up(master: bool) -> None:
    """Each is a sixteenth of the distance between neighbours: rounded to the nearest, all of them would be lost."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = UpdatedInFloat32(torch.optim.SGD([weight], lr=2.0**-11), master)
    for _ in range(64):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 + 64 * 2**-11, abs=2e-4)


def test_weights_go_through_float32_a_few_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, in_chunks = (state(precision="bfloat16-master", optimizer="muon") for _ in range(2))
    train_step(at_once, next_token, stream().batch(0), plan(1, precision="bfloat16-master"))
    monkeypatch.setattr(precision, "LARGEST_CHUNK", 1_000)
    chunks = list(chunk_sizes(in_chunks.optimizers[0]))
    assert len(chunks) > 2
    train_step(in_chunks, next_token, stream().batch(0), plan(1, precision="bfloat16-master"))
    for a, b in zip(at_once.model.parameters(), in_chunks.model.parameters()):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


def chunk_sizes(optimizer: UpdatedInFloat32) -> list[int]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    return [sum(weight.numel() for weight, _ in chunk) for chunk in optimizer._chunks()]


def test_rounding_frees_its_float32_weights_after_each_step() -> None:
    learner = state(precision="bfloat16-pure")
    train_step(learner, next_token, stream().batch(0), plan(1, precision="bfloat16-pure"))
    (optimizer,) = learner.optimizers
    assert all(p.numel() == 0 and p.grad is None for g in optimizer.inner.param_groups for p in g["params"])
    assert all(p.grad is None for p in learner.model.parameters())


def test_a_scale_that_is_too_large_is_halved_until_the_same_batch_goes_through() -> None:
    usual, high = state(precision="float16"), state(precision="float16")
    high.loss_scale = LossScale(2.0**40, 2.0**40)
    expected = train_step(usual, next_token, stream().batch(0), plan(1, precision="float16"))
    found = train_step(high, next_token, stream().batch(0), plan(1, precision="float16"))
    assert 2.0 < high.loss_scale.value < 2.0**32
    assert usual.loss_scale.value == precision.FIRST_SCALE
    assert found == pytest.approx(expected, rel=1e-2)
    assert high.step == usual.step == 1


def test_without_a_scale_small_gradients_are_lost_in_float16() -> None:
    faint = Changed(lambda loss: loss * 1e-6)

    norms = {}
    for scale in (1.0, 2.0**16):
        learner = state(precision="float16")
        learner.loss_scale = LossScale(scale, scale)
        norms[scale] = train_step(learner, faint, stream().batch(0), plan(1, precision="float16"))["grad_norm"]
    exact = train_step(state(), faint, stream().batch(0), plan(1))["grad_norm"]
    assert norms[2.0**16] == pytest.approx(exact, rel=0.02)
    assert norms[1.0] != pytest.approx(exact, rel=0.02)


def test_the_scale_doubles_after_many_good_steps_and_stays_within_its_bound() -> None:
    scale = LossScale(2.0, largest=8.0, good_steps=precision.STEPS_TO_DOUBLE - 1)
    assert not scale.overflows(1.0, 1.0)
    assert scale == LossScale(4.0, 8.0, 0)
    scale = LossScale(8.0, 8.0, precision.STEPS_TO_DOUBLE - 1)
    scale.overflows(1.0, 1.0)
    assert scale.value == 8.0


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale() -> None:
    scale = LossScale(2.0**16, 2.0**24)
    assert not scale.overflows(float("nan"), float("nan"))
    assert scale.value == 2.0**16


def test_the_loss_in_pure_bfloat16_falls_as_far_as_in_float32() -> None:
    last = {}
    for name in ("float32", "bfloat16-pure"):
        learner = state(precision=name)
        train(learner, next_token, stream(), plan(60, precision=name))
        quiet = dataclasses.replace(plan(61, precision="float32"), schedule=lambda step: 0.0)
        learner.model.float()
        last[name] = train_step(learner, next_token, stream().batch(60), quiet)["loss"]
    assert last["bfloat16-pure"] < last["float32"] + 0.1


def test_auto_is_autocast_and_never_changes_the_weights() -> None:
    assert find_device("cpu", "auto").weight_dtype == torch.float32
