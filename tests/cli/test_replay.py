"""A fault is planted in a run, and `slm replay` names where it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmkit.tokenizer import SLMTokenizer
from slmkit.training.checkpoints.checkpoint import _write_manifest
from tests.cli.helpers import TINY, refused, slm

STORY = "Once there was a fox who had a kite. The kite flew over the hill and the fox ran after it, laughing. "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    text = [f"{STORY}In the garden number {number} was a zebra.\n" * 3 for number in range(40)]
    (folder / "book.txt").write_text("".join(text))
    done = slm(
        "train", "own-text", "data.source=book.txt", "output_dir=run", *TINY, "train.save_steps=4",
        "train.eval_steps=12", "train.save_total_limit=9", "model.hidden_dropout=0.1", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def with_weight(run: Path, name: str, change) -> Path:
    """A copy of the run with one weight of checkpoint 4 changed, resumed from there until the guard stops it."""
    copy = run.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy, symlinks=True)
    for step in ("8", "12"):
        shutil.rmtree(copy / "checkpoints" / f"step-{step:>06}")
    checkpoint = copy / "checkpoints" / "step-000004"
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors[name])
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / "MANIFEST.json").unlink()
    _write_manifest(checkpoint)
    recipe = (copy / "recipe.yaml").read_text().replace("max_skipped: 10", "max_skipped: 2")
    (copy / "recipe.yaml").write_text(recipe)
    return copy


@pytest.mark.parametrize("step", [1, 7, 12])
def test_a_step_done_again_is_the_same_bit_for_bit_and_nothing_is_touched(run: Path, step: int) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    recipe = (run / "recipe.yaml").read_text()
    assert "logging_steps: 10" in recipe
    done = slm("replay", run, "--step", step)
    assert done.returncode == 0, done.stderr
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = "the same as recorded, bit for bit" if step in logged else "nothing was recorded of it to compare with"
    assert told in done.stdout
    assert "first non-finite tensor" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before


def test_a_weight_that_is_infinite_is_named(run: Path) -> None:
    def spoil(tensor: torch.Tensor) -> None:
        tensor[3, 5] = torch.inf

    copy = with_weight(run, "model.layers.1.mlp.up_proj.weight", spoil)
    line = refused_by_the_guard(copy)
    assert "steps 5 to 6" in line
    assert "--step 5" in line
    done = slm("replay", copy, "--step", "5")
    assert done.returncode == 0, done.stderr
    assert "first non-finite tensor: output of blocks.1.mlp.up\n  row 0, position 0:" in done.stdout
    assert "the same as recorded, bit for bit" in done.stdout
    assert "refused: the loss is nan" in done.stdout


def test_a_poisoned_token_is_named_with_its_row(run: Path) -> None:
    tokenizer = SLMTokenizer.from_pretrained(run / "latest")
    token = tokenizer.encode(" zebra")[-1]

    def spoil(tensor: torch.Tensor) -> None:
        tensor[token, 0] = torch.nan

    copy = with_weight(run, "model.embed_tokens.weight", spoil)
    refused_by_the_guard(copy)
    done = slm("replay", copy, "--step", "5")
    assert "first non-finite tensor: output of embedding" in done.stdout
    assert f"token {token} " in done.stdout


def refused_by_the_guard(copy: Path) -> str:
    done = slm("resume", copy)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("slm: ")
    return last


def test_what_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    assert "the run has steps 1 to 12" in refused("replay", run, "--step", "13")
    assert "not a run" in refused("replay", tmp_path, "--step", "1")
