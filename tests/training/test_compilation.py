"""Compiled blocks make the update that plain ones make, and leave every name as it is."""

from __future__ import annotations

import shutil

import pytest
import torch

from slmkit.device import Device
from slmkit.training.compilation import compile_blocks, compile_pays, uncompiled
from slmkit.training.loop import Every, train_step
from slmkit.training.objective import next_token
from tests.training.helpers import plan, state, stream

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
