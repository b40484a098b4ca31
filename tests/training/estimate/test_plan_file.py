"""A run's plan.json: written as it goes, complete at its end, with both figures beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmkit.device import find_device
from slmkit.model.files.directory import empty_decoder
from slmkit.training.estimate.forecast import PlanFile
from slmkit.training.estimate.memory import MemoryProfile
from slmkit.training.logging.metrics_log import read_json
from slmkit.training.loop import Every
from tests.training.helpers import config, run, settings

CPU = find_device("cpu", "float32")
PROFILE = MemoryProfile(empty_decoder(config()))


def test_predicted_and_real_stand_side_by_side(tmp_path: Path) -> None:
    shape, seen = config(), []
    (tmp_path / "run").mkdir()
    plan = PlanFile(tmp_path / "run", PROFILE, settings(max_steps=30), 30, CPU)
    watch = Every(1, lambda state, report: seen.append("predicted" in read_json(tmp_path / "run" / "plan.json")))
    run(tmp_path / "run", hooks=(Every(1, plan.update), watch), max_steps=30, eval_steps=30)
    assert seen.index(True) == 9  # known after a third of so short a run
    said = plan.complete(validation_loss=2.5)
    content = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert content["parameters"] == sum(p.numel() for p in _parameters(shape))
    assert content["tokens"] == 30 * 4 * 32
    for name in ("seconds", "memory_bytes", "disk_bytes"):
        assert content["predicted"][name] > 0
        assert content["real"][name] > 0
    assert content["predicted"]["memory_bytes"] > content["probe"]["memory_bytes"] > content["memory_before_bytes"] > 0
    assert content["counted_memory_bytes"] > content["memory_before_bytes"]
    assert content["real"]["disk_bytes"] > 100_000
    assert said.startswith("the run took: time 0:")
    assert "), memory" in said


def test_a_run_that_ends_before_its_speed_is_known_promises_nothing(tmp_path: Path) -> None:
    plan = PlanFile(tmp_path, PROFILE, settings(), 30, CPU)
    run(tmp_path, hooks=(Every(1, plan.update),), max_steps=3)
    assert plan.complete(None) == ""
    assert read_json(tmp_path / "plan.json") == {"steps": 30}


def test_a_resumed_run_predicts_what_is_left_of_it(tmp_path: Path) -> None:
    run(tmp_path, max_steps=12)
    plan = PlanFile(tmp_path, PROFILE, settings(max_steps=24), 24, CPU)
    run(tmp_path, resume=True, hooks=(Every(1, plan.update),), max_steps=24)
    plan.complete(None)
    content = read_json(tmp_path / "plan.json")
    whole = PlanFile(tmp_path, PROFILE, settings(max_steps=24), 24, CPU)
    whole.times = plan.times[:5]
    whole._predict()
    anew = read_json(tmp_path / "plan.json")
    assert content["predicted"]["seconds"] == pytest.approx(anew["predicted"]["seconds"] / 2, rel=0.6)


def _parameters(shape):
    from slmkit.model.initialization import build_decoder

    return build_decoder(shape, 0).parameters()
