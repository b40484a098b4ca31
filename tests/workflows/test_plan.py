"""What `slm plan` says of a recipe: its steps, and what of it is in memory, whatever it learns."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.device import find_device
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.model.sizes import parameter_count
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.estimate.forecast import disk_bytes
from slmkit.training.estimate.memory import MemoryProfile, reading_peaks, state_bytes, training_bytes, weights_bytes
from slmkit.training.estimate.micro_batch import USABLE, fitting_rows
from slmkit.training.recipe.recipe import Recipe, find_recipe, load_recipe
from slmkit.workflows import plan
from slmkit.workflows.plan import RunEstimate, plan_recipe


def test_a_recipe_is_planned_by_its_text_and_its_keys(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The fox had a kite. " * 20_000)
    values = [f"data.source={tmp_path}/book.txt", f"output_dir={tmp_path}/run", "train.device=cpu"]
    values += ["model.num_hidden_layers=1"]  # the arithmetic of memory goes through every layer
    recipe = load_recipe(find_recipe("own-text"), values)
    result = plan_recipe(recipe, measure=False)
    assert result.estimate.steps == 3_000_000 // 4_096
    assert result.estimate.parameters == sum(p.numel() for p in build_decoder(result.config, 0).parameters())
    assert result.fits
    assert result.measured is None
    assert list(tmp_path.iterdir()) == [tmp_path / "book.txt"]  # nothing was made
    epochs = load_recipe(find_recipe("own-text"), [*values, "train.max_tokens=null", "train.num_train_epochs=2"])
    assert plan_recipe(epochs, measure=False).estimate.steps == round(2 * (400_000 // 4 // 256) / 16)
    longer = plan_recipe(load_recipe(find_recipe("own-text"), [*values, "train.max_tokens=6e6"]), measure=False)
    assert longer.estimate.seconds == pytest.approx(2 * result.estimate.seconds, rel=0.05)


def test_the_quickstarts_second_part_is_planned_before_its_first_is_there() -> None:
    result = plan_recipe(load_recipe(find_recipe("quickstart-stories")), measure=False)
    assert result.estimate.loss is None  # it begins with a trained model
    assert result.estimate.steps == pytest.approx(2_202, rel=0.2)


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda device: 64 << 20)
    assert not plan_recipe(load_recipe(find_recipe("quickstart-primer")), measure=False).fits


def test_pairs_are_two_sequences_and_questions_as_many_rows_as_answers() -> None:
    pairs = plan_recipe(load_recipe(find_recipe("quickstart-dpo")), measure=False)
    assert pairs.estimate.steps == 2000 // (12_288 // (2 * 384))
    assert pairs.epochs == pytest.approx(1, rel=0.01)
    assert any("shorter pairs train faster" in assumption for assumption in pairs.assumptions)
    by_epoch = ["train.max_steps=null", "train.num_train_epochs=1"]
    asked = plan_recipe(load_recipe(find_recipe("quickstart-grpo"), by_epoch), measure=False)
    assert asked.estimate.steps == 5000 // 32
    assert any("time to sample answers is not included" in assumption for assumption in asked.assumptions)


SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
TRAIN = {"sequence_length": 64, "tokens_per_step": 256, "max_steps": 20, "device": "cpu", "precision": "float32"}
DATA = {"source": "stories", "documents": 20}
CPU = find_device("cpu", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer, to adapt, to refine, or to learn from."""
    root = tmp_path_factory.mktemp("model")
    config = SLMConfig(**SHAPE)
    save_decoder(build_decoder(config), config, root)
    SLMTokenizer(260).save_pretrained(root)
    return root


def planned(model: Path, objective: str, measure: bool = False, **sections: object) -> RunEstimate:
    return plan_once(model, objective, measure, json.dumps(sections))


@functools.cache
def plan_once(model: Path, objective: str, measure: bool, written: str) -> RunEstimate:
    sections = json.loads(written)
    of = {} if objective == "distill" else {"path": str(model)}
    if objective == "distill":
        of = {key: value for key, value in SHAPE.items() if key != "vocab_size"}
    content = {"objective": objective, "model": of, "data": DATA, "train": TRAIN}
    return plan_recipe(Recipe.model_validate(content | sections), measure)


def test_an_adapter_is_planned_as_what_it_is(model: Path) -> None:
    """A frozen base in its own type of number; gradients, moments and checkpoints of the adapter alone."""
    whole, adapter, nf4 = (
        planned(model, "sft", **lora) for lora in ({}, {"lora": {"r": 2}}, {"lora": {"r": 2, "base_weights": "nf4"}})
    )
    assert whole.estimate.trained == whole.estimate.parameters == adapter.estimate.parameters
    assert adapter.estimate.trained < 0.1 * whole.estimate.parameters
    assert adapter.estimate.memory_bytes < whole.estimate.memory_bytes
    assert adapter.estimate.tokens_per_second > whole.estimate.tokens_per_second
    state, of_adapter, of_nf4 = (state_bytes(each.profile, each.recipe.train, CPU) for each in (whole, adapter, nf4))
    assert of_adapter == pytest.approx(state / 3 + 3 * 4 * adapter.estimate.trained, rel=0.02)
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert of_adapter - of_nf4 == pytest.approx(matrices * (4 - 4.5 / 8), rel=0.02)
    stored = [disk_bytes(3 * 4 * each.estimate.trained, each.recipe.train, 20, 512, 0) for each in (whole, adapter)]
    text = [each.estimate.disk_bytes - disk for each, disk in zip((whole, adapter), stored)]
    assert text[1] == pytest.approx(text[0], abs=20_000)  # the rest of the disk is the same text


def test_a_teacher_is_in_memory_where_it_is_asked_and_not_where_it_was_stored(model: Path, tmp_path: Path) -> None:
    asked = planned(model, "distill", distillation={"teacher": str(model)})
    assert asked.recipe.tokenizer.vocab_size == asked.config.vocab_size == 260  # its teacher's tokenizer
    stored = planned(
        model, "distill", distillation={"teacher": str(model), "cache": str(tmp_path)}, tokenizer={"path": str(model)}
    )
    assert (asked.estimate.frozen_parameters, stored.estimate.frozen_parameters) == (
        parameter_count(architecture_of(SLMConfig(**SHAPE))),
        0,
    )
    teacher = weights_bytes(asked.profile) - weights_bytes(stored.profile)
    assert teacher == pytest.approx(4 * asked.estimate.frozen_parameters, rel=0.01)
    alone = MemoryProfile(asked.profile.model)
    needed = [training_bytes(each, asked.recipe.train, 4, 64, CPU) for each in (asked.profile, alone)]
    assert needed[0] > needed[1] + teacher
    assert asked.estimate.tokens_per_second < stored.estimate.tokens_per_second
    states = planned(model, "distill", distillation={"teacher": str(model), "hidden_weight": 1.0})
    assert training_bytes(states.profile, states.recipe.train, 4, 64, CPU) > needed[0]


def test_a_reference_is_kept_where_beta_asks_for_one(model: Path) -> None:
    without, beside = (planned(model, "grpo", grpo={"beta": beta, "max_new_tokens": 8}) for beta in (0.0, 0.04))
    assert (without.estimate.frozen_parameters, beside.estimate.frozen_parameters) == (0, without.estimate.parameters)
    state, with_reference = (state_bytes(each.profile, each.recipe.train, CPU) for each in (without, beside))
    assert with_reference - state == pytest.approx(4 * without.estimate.parameters, rel=0.01)
    assert len(reading_peaks(beside.profile, 64, CPU)) == 2  # sampling, and the reference that reads the answers


def test_fewer_rows_fit_beside_a_teacher(model: Path) -> None:
    asked = planned(model, "distill", distillation={"teacher": str(model)})
    free = int(training_bytes(asked.profile, asked.recipe.train, 8, 64, CPU) / USABLE["cpu"]) + 1
    alone = MemoryProfile(asked.profile.model)
    rows = [fitting_rows(each, asked.recipe.train, 9, 64, CPU, free) for each in (asked.profile, alone)]
    assert rows == [8, 9]


@pytest.mark.parametrize("what", ["lora", "asked", "stored", "grpo"])
def test_the_probe_trains_what_the_recipe_would(what: str, model: Path, tmp_path: Path) -> None:
    taught: dict[str, object] = {"teacher": str(model)}
    sections: dict[str, tuple[str, dict[str, object]]] = {
        "lora": ("sft", {"lora": {"r": 2, "use_dora": True, "base_weights": "int8"}}),
        "asked": ("distill", {"distillation": taught}),
        "stored": ("distill", {"distillation": taught | {"cache": str(tmp_path)}, "tokenizer": {"path": str(model)}}),
        "grpo": ("grpo", {"grpo": {"beta": 0.04, "prompts_per_step": 2, "num_generations": 2}}),
    }
    objective, more = sections[what]
    result = planned(model, objective, measure=True, **more)
    assert result.measured is not None
    assert result.measured.steps == 20
    assert result.estimate.tokens_per_second == result.measured.tokens_per_second


def test_an_adapter_without_a_model_is_no_plan() -> None:
    with pytest.raises(UserError, match="lora needs a trained model to adapt"):
        plan_recipe(Recipe.model_validate({"lora": {}, "data": DATA, "train": TRAIN}), measure=False)
