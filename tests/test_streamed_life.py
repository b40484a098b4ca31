"""A run on a streamed mixture, stopped and resumed: the model of the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slmkit.config import load_settings
from slmkit.training.loop import RunStopped, StopRequested
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.train import resume_run, train_recipe
from tests.test_life import Silent, evaluated

pytestmark = pytest.mark.usefixtures("module_without_plan_and_pictures")

WORDS = {"foxes": "the fox ran over the hill and sang", "owls": "an owl sat in a tree and slept"}


@pytest.fixture
def sources(tmp_path: Path) -> list[dict]:
    for name, words in WORDS.items():
        lines = [" ".join(words.split()[n % 7 :] + words.split()[: n % 5]) + f" {n}" for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in WORDS]


def recipe(sources: list[dict], output: Path, **data: object) -> Recipe:
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 32, "hidden_dropout": 0.1,
    }  # fmt: skip
    phases = [
        {"until_tokens": 1500, "weights": {"foxes": 0.75, "owls": 0.25}},
        {"weights": {"foxes": 0.25, "owls": 0.75}},
    ]
    train = {
        "tokens_per_step": 128, "max_steps": 36, "eval_steps": 12, "logging_steps": 3, "device": "cpu",
        "sample_tokens": 3,
    }  # fmt: skip
    read = {"sources": sources, "phases": phases, "streaming": True, "shuffle_buffer": 9, "validation_documents": 6}
    return load_settings(
        Recipe,
        {
            "output_dir": str(output), "model": shape, "tokenizer": {"vocab_size": 300}, "data": read | data,
            "train": train,
        },
    )  # fmt: skip


def logged(run: Path) -> list[dict]:
    timed = ("tokens_per_second", "seconds", "mfu", "memory")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def test_a_stopped_stream_goes_on_with_exactly_the_next_batch(
    sources: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second phase and beyond the first epoch of either source."""
    whole = train_recipe(recipe(sources, tmp_path / "whole"), Silent()).root

    steps = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(
            StopRequested, "is_set", property(lambda stop: next(steps) >= 20, lambda stop, value: None), raising=False
        )
        with pytest.raises(RunStopped):
            train_recipe(recipe(sources, tmp_path / "stopped"), Silent())
    stopped = tmp_path / "stopped"
    state = json.loads((stopped / "latest" / "training_state" / "state.json").read_text())
    assert 0 < state["step"] < 36
    assert all(source["block"]["epoch"] > 0 for source in state["data"]["sources"].values())
    resume_run(stopped, Silent())

    weights = [load_file(run / "latest" / "model.safetensors") for run in (whole, stopped)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert [line for line in logged(stopped) if line["step"] % 3 == 0] == logged(whole)
    assert not (whole / "data" / "train").exists()
    assert evaluated(stopped).loss == evaluated(whole).loss


def test_realised_shares_are_logged(sources: list[dict], tmp_path: Path) -> None:
    run = train_recipe(recipe(sources, tmp_path / "run"), Silent()).root
    shares = {line["step"]: (line["share/foxes"], line["share/owls"]) for line in logged(run)}
    assert shares[9] == pytest.approx((0.75, 0.25), abs=0.02)
    rows, first = 36 * 4, 1500 // 32
    assert shares[36][0] == pytest.approx((0.75 * first + 0.25 * (rows - first)) / rows, abs=0.01)


def test_a_stream_that_runs_dry_ends_its_run_whole_and_says_so(sources: list[dict], tmp_path: Path) -> None:
    reporter = Silent()
    run = train_recipe(recipe(sources, tmp_path / "run", when_exhausted="stop"), reporter).root
    last = logged(run)[-1]
    assert 3 < last["step"] < 36
    assert "validation_loss" in last
    assert (run / "latest").resolve().name == f"step-{last['step']:06d}"
    assert any(f"the data ended after step {last['step']} of 36" in line for line in reporter.lines)
    resume_run(run, reporter)  # nothing is left to do
    assert logged(run)[-1] == last


def test_shards_that_run_out_shorten_the_plan(sources: list[dict], tmp_path: Path) -> None:
    """What shards hold is known before the first step, so that the learning rate falls to its end all the same."""
    reporter = Silent()
    run = train_recipe(recipe(sources, tmp_path / "run", when_exhausted="stop", streaming=False), reporter).root
    assert any("(then the data ends: stop)" in str(line) for line in reporter.lines)
    last = logged(run)[-1]
    assert 3 < last["step"] < 36
    assert last["learning_rate"] == pytest.approx(1e-4, rel=0.2)
