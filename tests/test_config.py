"""Settings are strict, and a mistake is one line in the words of whoever made it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import yaml
from pydantic import Field

from slmkit.config import Settings, UserError, did_you_mean, load_settings, read_yaml, to_yaml


class Inner(Settings):
    learning_rate: float = 1e-3
    warmup_steps: int = 10


class Outer(Settings):
    name: str = "run"
    train: Inner = Field(default_factory=Inner)
    maybe: Inner | None = None
    many: list[Inner] = Field(default_factory=list)
    shares: list[Annotated[float, Field(gt=0, le=1, description="1: all")]] = Field(default_factory=list)
    scale: float = Field(1.0, ge=0, lt=10, alias="lambda")  # a name that Python keeps for itself


def test_values_come_from_the_file_and_overrides_win() -> None:
    loaded = load_settings(Outer, {"name": "a", "train": {"warmup_steps": 5}}, ["train.learning_rate=3e-4", "name=b"])
    assert loaded == Outer(name="b", train=Inner(learning_rate=3e-4, warmup_steps=5))


@pytest.mark.parametrize(
    "text", ["seed: 1\nname: a\nseed: 2\n", "train: {a: 1}\ntrain: {b: 2}\n", "a: {b: {c: 1, c: 1}}\n"]
)
def test_a_key_that_is_set_twice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match="recipe.yaml: not valid YAML: the key '(seed|train|c)' is set twice"):
        read_yaml(tmp_path / "recipe.yaml")


def test_merge_keys_of_yaml_are_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: &a {b: 1, c: 2}\nd:\n  <<: *a\n  c: 3\n")
    assert read_yaml(tmp_path / "recipe.yaml")["d"] == {"b": 1, "c": 3}


def test_an_override_does_not_change_the_mapping_it_was_given() -> None:
    content = {"train": {"warmup_steps": 5}}
    load_settings(Outer, content, ["train.warmup_steps=7"])
    assert content == {"train": {"warmup_steps": 5}}


def test_a_section_that_is_null_is_filled_by_what_is_set_below_it() -> None:
    loaded = load_settings(Outer, {"maybe": None, "train": None}, ["maybe.warmup_steps=7", "train.warmup_steps=8"])
    assert loaded == Outer(maybe=Inner(warmup_steps=7), train=Inner(warmup_steps=8))


def test_an_entry_of_a_list_is_overridden_by_its_number() -> None:
    content = {"many": [{"warmup_steps": 5}, {"warmup_steps": 6}]}
    loaded = load_settings(Outer, content, ["many.1.warmup_steps=7", "lambda=2"])
    assert [inner.warmup_steps for inner in loaded.many] == [5, 7]
    assert content["many"][1] == {"warmup_steps": 6}
    assert load_settings(Outer, yaml.safe_load(to_yaml(loaded))) == loaded


@pytest.mark.parametrize(
    ("content", "overrides", "words"),
    [
        ({"nam": 1}, [], "r.yaml: unknown key 'nam'; did you mean 'name'?"),
        ({"train": {"learing_rate": 1}}, [], "r.yaml: unknown key 'train.learing_rate'; did you mean 'learning_rate'?"),
        ({"maybe": {"warmup": 1}}, [], "unknown key 'maybe.warmup'; did you mean 'warmup_steps'?"),
        ({"train": {"zzz": 1}}, [], "known: learning_rate, warmup_steps"),
        ({"train": {"warmup_steps": "many"}}, [], "train.warmup_steps: expected a whole number, found 'many'"),
        ({}, ["train.warmup_steps"], "expected key=value"),
        ({}, ["name.first=x", "name=1"], "name"),
        ({"name": "a"}, ["name.first=x"], "single value"),
        ({"many": [{}]}, ["many.1.warmup_steps=3"], "many.1.warmup_steps: '1' is not an entry of a list of 1"),
        ({"many": [{}]}, ["many.first=3"], "many.first: 'first' is not an entry of a list of 1: number them from 0"),
        ({"many": []}, ["many.0.warmup_steps=3"], "many.0.warmup_steps: the list is empty, so it has no entry '0'"),
        ({"maybe": None}, ["maybe.warmup=1"], "unknown key 'maybe.warmup'; did you mean 'warmup_steps'?"),
        ({"many": [{}]}, ["many.0.warmup_step=3"], "unknown key 'many.0.warmup_step'; did you mean 'warmup_steps'?"),
        ({"lambda": -1}, [], "lambda: expected 0 or more and less than 10, found -1"),
        ({"shares": [1, 2]}, [], "shares.1: expected more than 0 and up to 1, found 2"),
        ({"lamda": 1}, [], "unknown key 'lamda'; did you mean 'lambda'?"),
    ],
)
def test_a_mistake_names_the_key_and_the_way_out(content: dict, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(Outer, content, overrides, origin="r.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_without_their_names_are_one_line() -> None:
    with pytest.raises(UserError, match="^Inner: give the values by name"):
        Inner(0.5)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    settings = Outer(name="über", train=Inner(learning_rate=5e-5))
    (tmp_path / "r.yaml").write_text(to_yaml(settings))
    assert load_settings(Outer, read_yaml(tmp_path / "r.yaml")) == settings


def test_numbers_written_as_people_write_them_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: 3e-4\nb: 1_000\nc: 1e6\nd: 12\ne: 1.5\nf: 3e\n")
    assert read_yaml(tmp_path / "r.yaml") == {"a": 3e-4, "b": 1000, "c": 1e6, "d": 12, "e": 1.5, "f": "3e"}


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "just words", "!!python/object:os.system {}"])
def test_a_file_that_is_no_mapping_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "r.yaml")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")


def test_did_you_mean_lists_what_there_is_when_nothing_is_near() -> None:
    assert did_you_mean("xyz", ["b", "a"]) == "known: a, b"


def test_a_value_of_several_kinds_is_compared_with_the_kind_it_resembles() -> None:

    class Prompt(Settings):
        prompt: str | list[int] | list[list[int]]

    with pytest.raises(UserError, match=r"^prompt\.0\.1: expected a whole number, found 'b' "):
        load_settings(Prompt, {"prompt": [[1, "b"]]})
