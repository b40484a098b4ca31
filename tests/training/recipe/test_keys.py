"""What is typed wins over what a recipe file says in another way; two that contradict each other are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.training.recipe.keys import REPLACED
from slmkit.training.recipe.recipe import Recipe, find_recipe, load_recipe

# A value for each key that can be typed, as text of a recipe and as an override.
VALUES = {
    "train.max_tokens": "20000", "train.max_steps": "7", "train.num_train_epochs": "2.0",
    "train.warmup_steps": "3", "train.warmup_ratio": "0.1",
    "data.source": "book.txt", "data.sources": "[{path: a.txt, name: a}]", "data.phases": "[{weights: {a: 1.0}}]",
    "model.path": "runs/base", "model.preset": "gpt2", "model.hidden_size": "64", "model.vocab_size": "300",
    "model.eos_token_id": "3", "tokenizer.path": "tok", "tokenizer.vocab_size": "300",
    "tokenizer.documents_per_source": "5",
}  # fmt: skip


def matching(pattern: str) -> list[str]:
    stem = pattern.removesuffix("*")
    names = [key for key in VALUES if key == pattern or (pattern.endswith("*") and key.startswith(stem))]
    return names or [key for key in VALUES if key == "model.eos_token_id" and pattern == "model.*_token_id"]


PAIRS = [
    (typed, written)
    for key, patterns in REPLACED.items()
    if key != "objective"
    for typed in (matching(key) if key != "model.*" else ["model.preset", "model.hidden_size"])
    for pattern in patterns
    for written in matching(pattern)
    if typed != written
]


def read(tmp_path: Path, written: str, *typed: str) -> tuple[Recipe, list[str]]:
    section, _, name = written.partition(".")
    more = f"\n  sources: {VALUES['data.sources']}" if name == "phases" else ""
    (tmp_path / "r.yaml").write_text(f"{section}:\n  {name}: {VALUES[written]}{more}\n")
    lines: list[str] = []
    return load_recipe(tmp_path / "r.yaml", [f"{key}={VALUES[key]}" for key in typed], lines.append), lines


@pytest.mark.parametrize(("typed", "written"), PAIRS)
def test_what_is_typed_replaces_what_the_file_says_and_the_line_says_so(
    typed: str, written: str, tmp_path: Path
) -> None:
    recipe, lines = read(tmp_path, written, typed)
    alone, _ = read(tmp_path, typed)
    assert recipe == alone
    assert any(f"{typed}={VALUES[typed]} replaces" in line and f"{written}: " in line for line in lines)


@pytest.mark.parametrize(("typed", "other"), [pair for pair in PAIRS if "model.vocab_size" not in pair])
def test_two_that_are_typed_are_refused_where_they_contradict_each_other(
    typed: str, other: str, tmp_path: Path
) -> None:
    if other == "model.eos_token_id":
        return
    with pytest.raises(UserError, match=f"{typed} and {other} contradict|{other} and {typed} contradict"):
        read(tmp_path, "train.max_tokens", typed, other)


@pytest.mark.parametrize("name", [path.stem for path in find_recipe("own-text").parent.glob("*.yaml")])
@pytest.mark.parametrize("end", ["train.max_tokens=2e4", "train.max_steps=5", "train.num_train_epochs=2"])
def test_any_shipped_recipe_is_ended_where_the_user_says(name: str, end: str) -> None:
    if load_recipe(find_recipe(name)).data.streaming and "epochs" in end:
        return  # the length of a stream is not known
    train = load_recipe(find_recipe(name), [end]).train
    given = [key for key in ("max_tokens", "max_steps", "num_train_epochs") if getattr(train, key) is not None]
    assert [f"train.{key}" for key in given] == [end.partition("=")[0]]


def test_another_objective_leaves_the_teacher_behind() -> None:
    lines: list[str] = []
    recipe = load_recipe(find_recipe("quickstart-distill"), ["objective=pretrain"], lines.append)
    assert recipe.distillation is None
    assert "objective=pretrain replaces distillation" in lines[0]


def test_a_line_begins_with_the_name_as_it_was_typed_and_what_the_user_drops_is_not_replaced() -> None:
    lines: list[str] = []
    load_recipe(find_recipe("own-chat"), ["train.max_steps=4"], lines.append)
    assert lines == ["own-chat: train.max_steps=4 replaces train.num_train_epochs: 3"]
    train = load_recipe(find_recipe("own-chat"), ["train.num_train_epochs=null", "train.max_steps=4"], lines.append)
    assert (train.train.max_steps, len(lines)) == (4, 1)
    with pytest.raises(UserError, match="^own-chat: unknown key"):
        load_recipe(find_recipe("own-chat"), ["train.max_step=4"])


def test_a_share_of_warm_up_steps_in_an_older_recipe_is_read_and_said(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {warmup_steps: 0.2}\n")
    lines: list[str] = []
    train = load_recipe(tmp_path / "r.yaml", tell=lines.append).train
    assert train.total_warmup_steps(50) == 10
    assert "train.warmup_steps: 0.2 is read as train.warmup_ratio" in lines[0]
    assert load_recipe(tmp_path / "r.yaml", ["train.warmup_steps=4"]).train.total_warmup_steps(50) == 4
