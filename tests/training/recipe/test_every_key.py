"""Every key of a recipe does something, or is refused, or is said to have no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from slmkit.config import UserError, load_settings
from slmkit.device import DeviceError
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.logging.metrics_log import MEASURED
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.model import model_for
from slmkit.workflows.train import train_recipe
from tests.test_life import Silent
from tests.training.every_key import ELSEWHERE, EVERY, KEYS, changed, make_world, scenario

# They act where gradients jump or break, which tests/training/test_guards.py brings about.
OF_THE_GUARD = ("guard.max_skipped", "guard.on_divergence", "guard.max_spike", "guard.window")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What runs of the recipes as they are were seen to do."""
    return {}


def content_of(key: str, world: Path, is_changed: bool) -> dict[str, Any]:
    name, extra, value = EVERY[key]
    return changed(scenario(name, world), extra | ({key: value} if is_changed else {}), world)


def outcome(content: dict[str, Any], place: Path) -> tuple[Any, list[str]]:
    """All that a run does but for what the clock says; or the line that refuses it. And the warnings about its keys."""
    reporter = Silent()
    wanted = Path(content["output_dir"]).name
    try:
        run = train_recipe(load_settings(Recipe, content | {"output_dir": str(place / wanted)}), reporter, force=True)
    except (UserError, DeviceError) as error:
        return str(error), reporter.lines
    lines = [json.loads(line) for line in run.metrics.path.read_text().splitlines()]
    checkpoints = sorted(run.checkpoints.iterdir())
    weights = load_file(next(checkpoints[-1].glob("*.safetensors")))
    return {
        "place": run.root.name,
        "files": sorted(path.name for path in run.root.iterdir()),
        "metrics": [{name: value for name, value in line.items() if name not in MEASURED} for line in lines],
        "checkpoints": [path.name for path in checkpoints],
        "weights": {name: array.tolist() for name, array in weights.items()},
        "config": [path.read_text() for path in sorted(checkpoints[-1].glob("*config.json"))],
        "tokenizer": (checkpoints[-1] / "tokenizer.json").read_text(),
        "samples": run.samples.read_text() if run.samples.is_file() else "",
    }, reporter.lines  # fmt: skip


def built(content: dict[str, Any]) -> Any:
    """The model of a recipe as it is before its first step, and what it makes of some text; or why there is none."""
    try:
        recipe = load_settings(Recipe, content)
        model, _, _ = model_for(recipe, SLMTokenizer(260), Path(recipe.model.path) if recipe.model.path else None)
    except UserError as error:
        return str(error)
    torch.manual_seed(0)
    hidden = model.train()(torch.arange(40)[None])
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return weights, model.logits(hidden).tolist()


def test_every_key_has_a_line_and_every_line_a_key() -> None:
    assert set(KEYS) == EVERY.keys() | ELSEWHERE.keys()
    for key, place in ELSEWHERE.items():
        assert key.rpartition(".")[2] in Path(place).read_text()


@pytest.mark.parametrize("key", [key for key in EVERY if key not in OF_THE_GUARD])
def test_a_key_changes_the_run_or_is_refused_or_said_to_have_no_effect(
    key: str, world: Path, seen: dict[str, Any], tmp_path: Path, without_plan_and_pictures: None
) -> None:
    before = content_of(key, world, is_changed=False)
    if key.startswith("model.") and key != "model.max_position_embeddings":  # which is the length of a run's rows
        assert built(before) != built(content_of(key, world, is_changed=True))
        return
    known = json.dumps(before)
    if known not in seen:
        seen[known] = outcome(before, tmp_path / "before")[0]
    after, lines = outcome(content_of(key, world, is_changed=True), tmp_path / "after")
    said = [line for line in lines if str(line).startswith(key.replace("*", "0")) and "has no effect" in str(line)]
    assert (seen[known] != after) != bool(said), (key, said, after if isinstance(after, str) else "a run")
