"""Each optimizer makes the steps of its paper, on the parameters that are its own, and is saved and resumed whole."""

from __future__ import annotations

import sys

import pytest
import torch

from slmkit.config import UserError, load_settings
from slmkit.training.loop import Every, State, train, train_step
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import OPTIMIZERS, Lion
from slmkit.training.recipe.recipe import TrainSettings
from tests.training.helpers import plan, run, state, stream

pytestmark = pytest.mark.usefixtures("without_plan_and_pictures")


def rates_for(optimizer: str) -> dict[str, float]:
    return {"learning_rate": 2e-3} if optimizer == "lion" else {}


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion"])  # test_loop.py has the others
def test_a_tiny_text_is_learned_by_heart(optimizer: str) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    learner = state(optimizer=optimizer, **rates_for(optimizer))
    losses = []
    train(learner, next_token, stream(), plan(150), [Every(1, lambda s, report: losses.append(report["loss"]))])
    assert losses[0] > 4
    assert losses[-1] < 0.45  # what is left is which of three names and things comes, where nothing tells


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_belongs_to_one_group_and_decay_is_on_matrices(optimizer: str) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    learner = state(optimizer=optimizer)
    groups = [group for each in learner.optimizers for group in each.param_groups]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in learner.model.parameters())
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_lion_steps_by_the_sign_of_its_momentum() -> None:
    """Algorithm 2 of arXiv:2302.06675, written out for one number after another."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    lion = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    w, m = weight.tolist(), [0.0] * 3
    for gradient in ([0.3, -1.0, 0.0], [-5.0, 2.0, 1.0], [0.1, 0.1, -0.2]):
        weight.grad = torch.tensor(gradient)
        lion.step()
        for i, g in enumerate(gradient):
            update = 0.9 * m[i] + 0.1 * g
            w[i] -= 0.1 * ((update > 0) - (update < 0) + 0.2 * w[i])
            m[i] = 0.99 * m[i] + 0.01 * g
    assert weight.tolist() == pytest.approx(w)


def test_moments_of_8_bits_are_near_those_of_32() -> None:
    """On a matrix large enough to be quantised: smaller ones are not."""
    pytest.importorskip("bitsandbytes")
    full, small = state(), state(optimizer="adamw_8bit")
    for step in range(3):
        batch = stream().batch(step)
        for learner in (full, small):
            train_step(learner, next_token, batch, plan(3))
    moments = small.optimizers[0].state[small.model.embedding.weight]
    assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8
    before = state().model.state_dict()
    for name, parameter in small.model.named_parameters():
        step_of_full = full.model.state_dict()[name] - before[name]
        assert (parameter - full.model.state_dict()[name]).norm() < 0.2 * step_of_full.norm(), name


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("adamw_8bit", "float32"),
        ("lion", "float32"),
        ("adamw", "float16"),
        ("adamw", "bfloat16-pure"),
        ("muon", "bfloat16-pure"),
        ("adamw", "bfloat16-master"),
        ("adamw_8bit", "bfloat16-master"),
    ],
)
def test_a_resumed_run_ends_as_the_unbroken_one(optimizer: str, precision: str, tmp_path) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    how = {"optimizer": optimizer, "precision": precision, "save_total_limit": 9, "muon_beta2": 0.8}
    whole = run(tmp_path, **how)
    last = tmp_path / "checkpoints" / "step-000012"
    last.rename(tmp_path / "last")
    resumed = run(tmp_path, resume=True, **how)
    assert resumed.step == 12
    assert same(whole, resumed)


def same(a: State, b: State) -> bool:
    """Bit for bit: weights, every tensor of every optimizer's state, and the loss scale."""
    tensors = [
        {
            f"{number}/{key}/{name}": tensor
            for number, optimizer in enumerate(s.optimizers)
            for key, moments in optimizer.state_dict()["state"].items()
            for name, tensor in moments.items()
        }
        | dict(s.model.named_parameters())
        for s in (a, b)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    return a.loss_scale == b.loss_scale and all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())


def test_without_its_package_8_bits_are_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "slmkit.training.optimizers.adamw_8bit", None)
    with pytest.raises(UserError, match=r"adamw_8bit: .*pip install slmkit\[optim\]"):
        state(optimizer="adamw_8bit")


@pytest.mark.parametrize("key", [{"optimizer": "adamw_8bit"}, {"precision": "bfloat16-pure"}])
def test_what_needs_whole_weights_is_refused_where_processes_share_them(key: dict[str, str]) -> None:
    assert load_settings(TrainSettings, key | {"parallel": "ddp"})
    with pytest.raises(UserError, match="set parallel to ddp"):
        load_settings(TrainSettings, key | {"parallel": "fsdp"})


@pytest.mark.parametrize("changes", [{"optimizer": "adamw_8bit"}, {"precision": "bfloat16-master"}])
def test_what_needs_whole_weights_is_refused_with_shares_of_them(changes: dict[str, str]) -> None:
    TrainSettings.model_validate(changes | {"parallel": "ddp"})
    with pytest.raises(ValueError, match="needs whole weights.*set parallel to ddp, or use adamw, muon or lion"):
        TrainSettings.model_validate(changes | {"parallel": "fsdp"})
