"""`slm bench train` beside `slm plan`, and the benchmarks of training beside peers. No test looks at the clock."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import shakespeare, training, training_worker
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
    assert found.mfu(2 * rate) == pytest.approx(2 * found.mfu(rate))
    assert found.mfu(rate) > 0


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


TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = TINY | {"intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 16}
GPT = TINY | {"model_type": "gpt2", "max_position_embeddings": 16}


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_slmkit_transformers_and_the_plain_loop_have_the_same_losses(config: dict[str, Any], tmp_path: Path):
    pytest.importorskip("transformers")
    training.Suite(training.Work(config, 4, 16), tmp_path, 1, None)
    ids = torch.randint(64, (4, 4, 17), generator=torch.Generator().manual_seed(0))
    spec = {
        "model": str(tmp_path), "compile": False, "precision": "float32", "micro_batch": 2, "device": "cpu",
        "optimizer": training.OPTIMIZER | {"lr": 1e-2}, "max_grad_norm": 1.0,
    }  # fmt: skip
    expected, _ = training_worker.by_slmkit(spec, ids)
    assert max(expected) > 1.001 * min(expected), "the steps change the model"
    for peer in ("plain", "transformers"):
        losses, seconds = training_worker.by_loop(spec | {"peer": peer}, ids)
        assert losses == pytest.approx(expected, rel=1e-4), peer
        assert len(seconds) == len(ids)


def test_ratios_are_to_the_fastest_configuration_of_slmkit_in_the_same_round():
    def of(seconds: float) -> dict[str, float]:
        return {"seconds_per_step": seconds, "peak_gib": 1.0, "first_step_seconds": 2.0}

    rounds = [
        {"slmkit": of(2.0), "slmkit compiled": of(1.0), "transformers": of(3.0)},
        {"slmkit": of(1.0), "slmkit compiled": of(4.0), "transformers": of(2.0)},
    ]
    found = training.summary(rounds, tokens=100)
    assert found["transformers"]["slmkit_is_faster_by"] == {"median": 2.5, "least": 2.0, "most": 3.0}
    assert found["transformers"]["tokens_per_second"]["most"] == 50.0


def test_of_a_recipe_only_what_it_reached_within_the_plain_loops_seconds_counts():
    plain = [(50.0, 2.5), (100.0, 1.9)]
    found = shakespeare.compared(plain, [(20.0, 2.0), (40.0, 1.85), (90.0, 1.7), (120.0, 1.6)])
    assert found["share_of_the_plain_seconds"] == 0.4
    assert found["recipe_loss_in_the_plain_seconds"] == 1.7
    assert shakespeare.compared(plain, [(20.0, 2.0)])["share_of_the_plain_seconds"] is None


def test_the_plain_loop_evaluates_every_character_once():
    class Uniform(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            seen.append(ids.numel())
            return torch.zeros(*ids.shape, 10)

    seen: list[int] = []
    loss = shakespeare.evaluated(Uniform(), torch.arange(1_000) % 10)
    assert sum(seen) == 999
    assert loss == pytest.approx(2.302585)
