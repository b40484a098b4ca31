"""What the loop calls at an evaluation."""

from __future__ import annotations

from pathlib import Path

import torch

from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.hooks import WriteSamples
from tests.training.helpers import TOKENIZER, settings, state


def test_samples_are_written_for_each_prompt(tmp_path: Path) -> None:
    recipe = Recipe(train=settings(sample_prompts=["Ann", "Ben has"], sample_tokens=4))
    WriteSamples(tmp_path / "samples.md", recipe, TOKENIZER)(state(), {})
    text = (tmp_path / "samples.md").read_text()
    assert text.startswith("## Step 0\n\n> Ann")
    assert "\n> Ben has" in text


def test_a_model_that_cannot_write_costs_no_run(tmp_path: Path) -> None:
    broken = state()
    with torch.no_grad():
        broken.model.embedding.weight.fill_(float("nan"))
    recipe = Recipe(train=settings(sample_prompts=["Ann"], sample_tokens=4))
    WriteSamples(tmp_path / "samples.md", recipe, TOKENIZER)(broken, {})
    assert "logits are not finite" in (tmp_path / "samples.md").read_text()
