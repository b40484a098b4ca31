"""What people type for a recipe's key leads to the key, and every hint names one that exists."""

from __future__ import annotations

import pytest

from slmkit.config import UserError, _dotted_keys, load_settings
from slmkit.training.recipe.keys import HINTS
from slmkit.training.recipe.keys import KEYS as TABLES
from slmkit.training.recipe.recipe import MODEL_KEYS, Recipe

KEYS = {*_dotted_keys(Recipe), *(f"model.{name}" for name in MODEL_KEYS)}
LEAVES = sorted({key.rpartition(".")[2] for key in KEYS if "." in key} - {*Recipe.model_fields} - {*HINTS})


def refusal(override: str) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(Recipe, {"model": {"hidden_size": 64}}, [override])
    return str(caught.value)


def test_every_hint_names_a_key_that_exists() -> None:
    assert {*TABLES["names"], *TABLES["notes"]} <= KEYS


def test_what_people_type_leads_to_the_key() -> None:
    for name in [*HINTS, "Learning-Rate", "LR", "per-device-train-batch-size"]:
        wanted = HINTS.get(name.lower().replace("-", "_"), "train.learning_rate").partition(" ")[0]
        line = refusal(f"{name}=7")
        assert f"did you mean {wanted!r}?" in line, name
        assert "\n" not in line, name


def test_a_key_without_its_section_is_found() -> None:
    for leaf in LEAVES:
        where = {key for key in KEYS if key.endswith(f".{leaf}")}
        line = refusal(f"{leaf}=7")
        assert any(f"did you mean {key!r}?" in line for key in where), (leaf, line)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.n_layer=3", "did you mean 'model.num_hidden_layers'?"),
        ("train.lr=3", "did you mean 'train.learning_rate'?"),
        ("train.learing_rate=3", "did you mean 'learning_rate'?"),
        ("train.hidden_size=3", "did you mean 'model.hidden_size'?"),
        ("data=book.txt", "did you mean 'data.source'?"),
        ("train.learning_rate=fast", "train.learning_rate: expected a number, found 'fast'"),
        ("train.micro_batch_tokens=few", "train.micro_batch_tokens: expected a whole number or 'auto', found 'few'"),
        ("train.max_steps=-1", "train.max_steps: expected more than 0, found -1"),
        ("train.optimizer=sgd", "train.optimizer: expected 'adamw', "),
        ("train.report_to=wandb", "train.report_to: expected a list"),
        ("lora=4", "lora: expected keys with values below it, found 4"),
        ("seed=[1]", "seed: expected a whole number, found [1]"),
    ],
)
def test_a_wrong_value_is_answered_in_words(override: str, words: str) -> None:
    line = refusal(override)
    assert words in line
    assert "Settings" not in line
