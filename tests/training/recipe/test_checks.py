"""What a recipe asks for and would not get is said or refused before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmkit.config import UserError, load_settings
from slmkit.data.shards.folder import REQUEST, claim
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe.checks import expect_a_model, unlikely, without_effect
from slmkit.training.recipe.recipe import Recipe, TrainSettings, find_recipe, load_recipe
from slmkit.workflows.model import model_for

SHIPPED = sorted(path.stem for path in find_recipe("own-text").parent.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_set_nothing_in_vain(name: str) -> None:
    assert without_effect(load_recipe(find_recipe(name))) == []


@pytest.mark.parametrize("setting", ["text_column: a", "messages_column: a", "columns: {text: a}"])
def test_a_column_of_a_text_file_is_said_to_have_no_effect(tmp_path: Path, setting: str) -> None:
    for source, lines in (("a.txt", 1), ("[a.txt, b.md.gz]", 1), ("[a.txt, b.jsonl]", 0), ("folder", 0)):
        (tmp_path / "recipe.yaml").write_text(f"data: {{source: {source}, {setting}}}\n")
        said = without_effect(load_recipe(tmp_path / "recipe.yaml"))
        assert len(said) == lines, source
        assert all("has no effect: text files have no columns" in line for line in said)
    (tmp_path / "recipe.yaml").write_text(f"data: {{sources: [{{path: a.txt, {setting}}}, {{path: b.jsonl}}]}}\n")
    (line,) = without_effect(load_recipe(tmp_path / "recipe.yaml"))
    assert "has no effect: text files have no columns" in line


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_for_a_finished_model_is_refused_without_one(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    text = find_recipe(name).read_text()
    if "path: null" not in text or recipe.model.path is not None:
        if recipe.lora is None:
            expect_a_model(recipe)
        return
    with pytest.raises(UserError, match=r"model\.path") as error:
        expect_a_model(recipe)
    assert "\n" not in str(error.value)
    expect_a_model(load_recipe(find_recipe(name), ["model.path=runs/base"]))
    if recipe.objective in ("sft", "pretrain") and recipe.lora is None:
        expect_a_model(load_recipe(find_recipe(name), ["model.preset=quickstart"]))


def test_fine_tuning_that_names_no_model_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="fine-tunes a trained model"):
        expect_a_model(Recipe(objective="sft"))
    expect_a_model(Recipe())  # a new model of the default size


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"warmup_steps": 20}, "the warm-up takes 20 steps and the run 10: the last learning rate is 50% of its peak"),
        ({"warmup_steps": 6, "lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.8}, "longer than the run"),
        ({"eval_steps": 11}, "train.eval_steps is 11 and the run takes 10 steps"),
        ({"save_steps": 11}, "train.save_steps is 11"),
        ({"logging_steps": 11}, "train.logging_steps is 11"),
        ({"early_stopping_patience": 10}, "it will not be ended early"),
        ({"early_stopping_patience": 9, "warmup_steps": 2}, None),
        ({"warmup_steps": 9}, None),
        ({}, "10 steps are few: the warm-up is 0 steps; more rows, more epochs (train.num_train_epochs) or a smaller"),
        ({"max_tokens": 81_920}, "a larger train.max_tokens or a smaller train.tokens_per_step gives more steps"),
        (
            {"warmup_ratio": 0.1, "max_steps": 10},
            "the warm-up is 1 step; a larger train.max_steps or train.warmup_ratio",
        ),
        ({"warmup_ratio": 0.5}, None),
        ({"lr_schedule_steps": 20}, None),
    ],
)
def test_steps_that_do_not_suit_the_run_are_said(train: dict, words: str | None) -> None:
    lines = unlikely(TrainSettings(**train), steps=10)
    assert lines == [] if words is None else words in " ".join(lines)


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 19, 29, 732])
def test_a_run_has_at_most_ten_evaluations_by_itself(steps: int) -> None:
    evaluations = -(-steps // TrainSettings().evaluation_interval(steps))
    assert min(steps, 6) <= evaluations <= 10


@pytest.mark.parametrize("name", ["own-chat", "own-chat-lora", "own-chat-gemma", "own-chat-llama3"])
def test_a_hundred_conversations_get_a_warm_up_of_several_steps(name: str) -> None:
    assert unlikely(load_recipe(find_recipe(name)).train, steps=12) == []


def test_a_larger_vocabulary_is_padded_and_a_smaller_one_refused() -> None:
    def config(size: int):
        shape = {"vocab_size": size, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        return model_for(load_settings(Recipe, {"model": shape}), SLMTokenizer(300), None)

    padded, found, _ = config(512)
    assert found.vocab_size == padded.embedding.weight.size(0) == 512
    tokens = len(SLMTokenizer(300))
    with pytest.raises(UserError, match=f"model.vocab_size is {tokens - 1} and the tokenizer's {tokens}"):
        config(tokens - 1)
    shape = {"bos_token_id": 7, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(UserError, match=r"^model\.bos_token_id is 7 and .*: remove it from the recipe .*recipe\.yaml"):
        model_for(load_settings(Recipe, {"model": shape}), SLMTokenizer(300), None)


def test_shards_are_not_replaced_by_those_of_another_source(tmp_path: Path) -> None:
    from slmkit.data.prepare.text_to_shards import prepare_text

    claim(tmp_path / "shards", {"sources": ["a.txt"]})
    claim(tmp_path / "shards", {"sources": ["a.txt"]})  # the same command goes on
    with pytest.raises(UserError, match="repeat that command to continue it, or delete the folder"):
        claim(tmp_path / "shards", {"sources": ["b.txt"]})
    shards = prepare_text(["some text"], SLMTokenizer(260), tmp_path / "shards", sources=[{"path": "a.txt"}])
    assert not list(tmp_path.rglob(REQUEST))
    with pytest.raises(UserError, match=r"holds finished shards of a\.txt: choose another directory"):
        claim(tmp_path / "shards", {"sources": ["a.txt"]})
    assert len(shards) == 10
