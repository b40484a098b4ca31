"""`slm compare` as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slmkit.data import stories
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from tests.adapt.trained import SHAPE, TOKENIZER
from tests.cli.helpers import refused, slm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, a copy of it, and one with much larger weights, which is sure of wrong tokens."""
    folder = tmp_path_factory.mktemp("compare")
    told = [story.text[:300] for story in stories.tell_many(77, 12)]
    (folder / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in told))
    for name, scale in (("model", 0.02), ("worse", 0.5)):
        config = SHAPE.model_copy(update={"initializer_range": scale})
        save_decoder(build_decoder(config, seed=9), config, folder / name)
        TOKENIZER.save_pretrained(folder / name)
    shutil.copytree(folder / "model", folder / "same")
    return folder


@pytest.fixture(scope="module")
def stdout(folder: Path) -> str:
    done = slm(
        "compare", "model", "same", "worse", "--text", "stories.jsonl", "--no-cache", "--device", "cpu",
        "--picture", "difference.png", "--output", "compared.json", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_line_for_each_model_with_the_verdict(stdout: str) -> None:
    lines = stdout.splitlines()
    assert lines[:3] == ["A  model", "B  same", "C  worse"]
    assert lines[4].split()[:5] == ["task", "metric", "items", "A", "other"]
    equal, worse = lines[5:7]
    assert equal.startswith("stories.jsonl  bits_per_byte     12")
    assert equal.endswith("1.000  no difference shown: the same on every item")
    assert worse.endswith("< 0.001  A is better")
    assert "p is corrected for 2 comparisons (Holm)" in stdout
    assert "window 128; stride 64" in stdout, "the recipe is printed"


def test_the_figures_and_the_picture_are_written(stdout: str, folder: Path) -> None:
    found = json.loads((folder / "compared.json").read_text())
    assert found["models"] == ["model", "same", "worse"]
    assert [row["verdict"] for row in found["rows"]][1:] == ["A is better"]
    assert found["rows"][0]["difference"]["value"] == 0
    assert (folder / "difference.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_eval_are_compared_without_a_model(stdout: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("model", "same", "worse"):
        done = slm("eval", name, "--text", "stories.jsonl", "--device", "cpu", "--output", f"{name}.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(tmp_path / name)
    done = slm("compare", "--results", "model.json", "same.json", "worse.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == stdout


def test_what_cannot_be_compared_is_one_line(folder: Path) -> None:
    text = "--text", "stories.jsonl"
    assert "two or more models, such as slm compare model OTHER" in refused("compare", "model", *text, cwd=folder)
    assert "give --text FILE, --tasks NAMES" in refused("compare", "model", "same", cwd=folder)
    assert "nowhere" in refused("compare", "model", "nowhere", *text, cwd=folder)
    assert "ends in .png" in refused("compare", "model", "same", *text, "--picture", "a.txt", cwd=folder)
    assert "a folder that exists" in refused("compare", "model", "same", *text, "-o", "none/a.json", cwd=folder)
    assert "leave out --text" in refused("compare", "--results", "a.json", *text, cwd=folder)
    assert "a.json: No such file" in refused("compare", "--results", "a.json", "b.json", cwd=folder)
    (folder / "text.json").write_text('{"text": "no result"}')
    assert "`slm eval --output`" in refused("compare", "--results", "text.json", "text.json", cwd=folder)


def test_results_on_other_data_are_refused_by_name(stdout: str, folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "stories.jsonl").write_text('{"text": "Another text."}\n{"text": "And one more."}\n')
    for name, text in (("one", "stories.jsonl"), ("two", "other/stories.jsonl")):
        text_and_file = "--text", text, "--source", "name=stories", "--output", f"{name}.json"
        assert slm("eval", "worse", *text_and_file, "--device", "cpu", cwd=folder).returncode == 0
    line = refused("compare", "--results", "one.json", "two.json", cwd=folder)
    assert line.startswith("slm: stories: not comparable: data ")
    assert line.endswith("evaluate both with the same data")


def test_eval_shows_the_interval_of_none_of_164() -> None:
    from slmkit.cli.evaluate import figure
    from slmkit.evaluation.results import Item, TaskResult

    items = tuple(Item(str(number), {"acc": (0.0, 1.0)}, {}) for number in range(164))
    assert figure(TaskResult("task", {}, {"acc": "mean"}, items), "acc") == "0.0000 (0.0000 to 0.0229)"
