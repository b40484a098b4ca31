"""Compiled blocks make the update that plain ones make, and leave every name as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from slmkit.device import Device, find_device
from slmkit.model.initialization import build_decoder
from slmkit.training import compilation, fit
from slmkit.training.checkpoints.checkpoint import WholeModel
from slmkit.training.compilation import compile_blocks, compile_pays, compiles, found_to_pay, is_compiled, uncompiled
from slmkit.training.estimate.memory import MemoryProfile, meta_model_of
from slmkit.training.loop import Every, train_step
from slmkit.training.objective import next_token
from slmkit.training.recipe.recipe import Recipe
from slmkit.training.run_directory import RunDirectory
from tests.training.helpers import config, plan, settings, state, stream

PLAIN = find_device("cpu", "float32")
CPU, CUDA = (Device(torch.device(kind), torch.bfloat16) for kind in ("cpu", "cuda"))


def test_auto_compiles_where_it_pays_and_a_recipe_may_say_otherwise() -> None:
    assert compile_pays("auto", CUDA)
    assert not compile_pays("auto", CPU)
    assert compile_pays(True, CPU)
    assert not compile_pays(False, CUDA)


def test_nothing_is_wrapped_where_nothing_is_compiled() -> None:
    hooks = [Every(1, lambda s, report: None)]
    assert uncompiled(hooks, state().model) == hooks


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_is_the_plain_one_and_hooks_run_plain() -> None:
    plain, compiled = state(), state()
    compile_blocks(compiled.model)
    batch = stream(rows=2).batch(0)
    expected, found = (train_step(s, next_token, batch, plan(1)) for s in (plain, compiled))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()
    compiling = []

    def hook(s, report) -> None:
        s.model(batch.ids[:1, :5])  # a shape of its own
        compiling.append(torch._dynamo.utils.counters["frames"]["total"])

    frames = torch._dynamo.utils.counters["frames"]["total"]
    assert frames > 0
    (wrapped,) = uncompiled([Every(1, hook)], compiled.model)
    wrapped.hook(compiled, {})
    assert compiling == [frames]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_what_is_measured_to_be_faster_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, said = state().model, stream(rows=2).batch(0), []
    assert not found_to_pay(model, batch, PLAIN, 10, said.append)  # ten passes repay nothing
    assert not is_compiled(model)
    monkeypatch.setattr(compilation, "COMPILING", 0.0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert found_to_pay(model, batch, PLAIN, 10, said.append) == is_compiled(model)
    assert not said
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_compiler_that_is_missing_breaks_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, batch, said = build_decoder(config(hidden_size=48)), stream(rows=3).batch(0), []
    with inductor.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),), "fx_graph_cache": False}):
        assert not compiles(model, batch, PLAIN, said.append)
    assert not is_compiled(model)
    (line,) = said
    assert "goes on without it" in line
    assert "\n" not in line
    next_token(model, batch).total.backward()


def test_a_long_run_says_in_its_recipe_whether_it_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s, batches = state(), stream(rows=2)
    recipe = Recipe(train=settings())
    context = fit.RunContext(
        run=RunDirectory(tmp_path), recipe=recipe, model=s.model, config=config(), files=WholeModel(config()),
        extra_files=lambda path: None, device=PLAIN,
    )  # fmt: skip
    memory, loop = MemoryProfile(meta_model_of(s.model)), context.plan(batches)
    fit.decide_whether_to_compile(context, next_token, memory, loop)
    assert context.recipe.train.compile == "auto"  # too short to measure anything
    monkeypatch.setattr(fit, "LEAST_FLOPS", 0.0)
    fit.decide_whether_to_compile(context, next_token, memory, loop)
    assert context.recipe.train.compile is False
    assert context.recipe.train.model_copy(update={"compile": "auto"}) == recipe.train
