"""`slm merge RECIPE`: two models in, one model directory out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from slmkit.cli.show import suggestion
from tests.adapt.merge_models import arrays, small, write_family
from tests.cli.helpers import refused, slm

RECIPE = "merge_method: linear\nmodels: [{model: tune-0, weight: 1}, {model: tune-1, weight: 3}]\noutput_dir: both\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models")
    write_family(found, small(max_position_embeddings=128), tunes=2)
    (found / "merge.yaml").write_text(RECIPE)
    return found


def test_a_recipe_makes_a_model_to_generate_with(folder: Path) -> None:
    done = slm("merge", "merge.yaml", "models.1.weight=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("linear of 2 models: ")
    assert done.stdout.splitlines()[-2:] == ["model: both", "next: slm generate both 'Once upon a time'"]
    first, second, both = (arrays(folder / name) for name in ("tune-0", "tune-1", "both"))
    assert all(np.allclose(both[name], (first[name] + second[name]) / 2, atol=1e-6) for name in both)
    done = slm("generate", "both", "Once", "--seed", "1", "--max-new-tokens", "5", cwd=folder)
    assert done.returncode == 0, done.stderr
    before = (folder / "both" / "model.safetensors").read_bytes()
    assert "both: exists already" in refused("merge", "merge.yaml", cwd=folder)
    assert (folder / "both" / "model.safetensors").read_bytes() == before


def test_what_would_be_done_can_be_seen_first(folder: Path) -> None:
    done = slm("merge", "merge.yaml", "--print-config", "models.0.weight=[1,0]", cwd=folder)
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    assert [entry["weight"] for entry in printed["models"]] == [[1, 0], 3]
    assert printed["lambda"] == 1
    done = slm("merge", "merge.yaml", "--dry-run", "output_dir=other", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "other").exists()


def test_a_mistake_is_one_line(folder: Path) -> None:
    assert "unknown key 'models.0.wieght'; did you mean 'weight'?" in refused(
        "merge", "merge.yaml", "models.0.wieght=1", cwd=folder
    )
    assert "nowhere: no such directory" in refused("merge", "merge.yaml", "models.0.model=nowhere", cwd=folder)
    assert "tune-0: a directory; expected a merge's YAML file" in refused("merge", "tune-0", cwd=folder)
    assert "mrge.yaml: no such recipe file" in refused("merge", "mrge.yaml", cwd=folder)


def test_an_unfilled_recipe_lists_all_that_is_to_be_set(folder: Path) -> None:
    keys = "base_model", "models.0.model", "models.1.model"
    line = refused("merge", "ties", cwd=folder)
    assert f"set {', '.join(keys)} to model directories" in line
    assert all(f" {key}=runs/" in line for key in keys)
    assert "set models.1.model to" in refused("merge", "ties", "base_model=base", "models.0.model=tune-0", cwd=folder)


@pytest.mark.parametrize(
    ("objective", "command"),
    [
        ("sft", "slm chat made  (and ask it: What is 2 + 2?)"),
        ("dpo", "slm chat made  (and ask it: What is 2 + 2?)"),
        ("pretrain", "slm generate made 'What is 2 + 2?'"),
    ],
)
def test_what_comes_next_is_what_the_run_it_was_made_from_is_for(tmp_path: Path, objective: str, command: str) -> None:
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "1" / "config.json").write_text("{}")
    (tmp_path / "latest").symlink_to("checkpoints/1")
    train = {"sample_prompts": ["What is 2 + 2?"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"objective": objective, "train": train}))
    assert suggestion("made", tmp_path) == command


def test_the_recipe_that_comes_along_is_one(folder: Path) -> None:
    done = slm(
        "merge", "ties", "base_model=base", "models.0.model=tune-0", "models.1.model=tune-1", "output_dir=ties",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "ties" / "merge.yaml").is_file()
