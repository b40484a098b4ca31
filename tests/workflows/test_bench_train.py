"""`slm bench train`: recipes and presets, beside what `slm plan` says without measuring."""

from __future__ import annotations

import re

import pytest

from slmkit.config import UserError
from slmkit.training.recipe.recipe import find_recipe, load_recipe
from slmkit.workflows.bench import training_speed
from slmkit.workflows.plan import plan_recipe
from tests.cli.helpers import slm

SMALL = [
    "model.hidden_size=64", "model.intermediate_size=96", "model.num_hidden_layers=2", "tokenizer.vocab_size=512",
    "train.sequence_length=32", "train.tokens_per_step=128", "train.micro_batch_tokens=64", "train.precision=float32",
    "train.device=cpu",
]  # fmt: skip


def test_a_recipe_is_measured_with_its_overrides_beside_its_plan():
    found = training_speed("own-text", SMALL, steps=4)
    planned = plan_recipe(load_recipe(find_recipe("own-text"), [*SMALL, "train.max_tokens=1e5"]), measure=False)
    assert found.foretold.config == planned.config
    assert found.foretold.estimate.counted_bytes == planned.estimate.counted_bytes
    assert found.foretold.recipe.train.optimizer == planned.recipe.train.optimizer
    assert found.measured.steps == 4
    rate = found.measured.tokens_per_second
    assert rate == pytest.approx(128 / found.measured.step_seconds), "a step is all of its micro-batches"
    assert found.mfu(2 * rate) == pytest.approx(2 * found.mfu(rate)) > 0


def test_the_command_takes_a_preset_and_names_what_it_does_not_know():
    done = slm("bench", "train", "quickstart", "train.sequence_length=32", "train.tokens_per_step=64", "--steps", "4")
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert re.fullmatch(r"quickstart: 1\.\d+ M parameters, 2 rows of 32 tokens a step, adamw", first), first
    assert [re.split(r"  +", row.strip())[0] for row in rows] == [
        "measured",
        "tokens/s",
        "seconds a step",
        "memory",
        "MFU",
    ]
    with pytest.raises(UserError, match="did you mean 'own-text'"):
        training_speed("own-txt", [], steps=4)
    with pytest.raises(UserError, match="optimizer"):
        training_speed("quickstart", ["train.optimiser=muon"], steps=4)
