"""What `slm plan` says of a recipe: its steps, and what of it is in memory, whatever it learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmkit.api.planning import plan_recipe
from slmkit.model import build_decoder
from slmkit.training import planning
from slmkit.training.recipe import find_recipe, load_recipe


def test_a_recipe_is_planned_by_its_text_and_its_keys(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The fox had a kite. " * 20_000)
    values = [f"data.source={tmp_path}/book.txt", f"output_dir={tmp_path}/run", "train.device=cpu"]
    recipe = load_recipe(find_recipe("own-text"), values)
    ahead = plan_recipe(recipe, measure=False)
    assert ahead.ahead.steps == 3_000_000 // 4_096
    assert ahead.ahead.parameters == sum(p.numel() for p in build_decoder(ahead.config, 0).parameters())
    assert ahead.fits
    assert ahead.measured is None
    assert list(tmp_path.iterdir()) == [tmp_path / "book.txt"]  # nothing was made
    epochs = load_recipe(find_recipe("own-text"), [*values, "train.max_tokens=null", "train.num_train_epochs=2"])
    assert plan_recipe(epochs, measure=False).ahead.steps == round(2 * (400_000 // 4 // 256) / 16)
    longer = plan_recipe(load_recipe(find_recipe("own-text"), [*values, "train.max_tokens=6e6"]), measure=False)
    assert longer.ahead.seconds == pytest.approx(2 * ahead.ahead.seconds, rel=0.05)


def test_the_quickstarts_second_part_is_planned_before_its_first_is_there() -> None:
    ahead = plan_recipe(load_recipe(find_recipe("quickstart-stories")), measure=False)
    assert ahead.ahead.loss is None  # it begins with a trained model
    assert ahead.ahead.steps == pytest.approx(2_202, rel=0.2)


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_memory", lambda device: 64 << 20)
    assert not plan_recipe(load_recipe(find_recipe("quickstart-primer")), measure=False).fits


def test_pairs_are_two_sequences_and_questions_as_many_rows_as_answers() -> None:
    pairs = plan_recipe(load_recipe(find_recipe("quickstart-dpo")), measure=False)
    assert pairs.ahead.steps == 2000 // (12_288 // (2 * 384))
    assert any("pairs that fill their rows" in assumption for assumption in pairs.assumptions)
    by_epoch = ["train.max_steps=null", "train.num_train_epochs=1"]
    asked = plan_recipe(load_recipe(find_recipe("quickstart-grpo"), by_epoch), measure=False)
    assert asked.ahead.steps == 5000 // 32
    assert any("sampling them takes its time" in assumption for assumption in asked.assumptions)
