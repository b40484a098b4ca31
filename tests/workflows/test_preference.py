"""Whole runs on preferences and on rewards: what they store, how they resume, and what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.numpy
import torch

from slmkit.config import UserError
from slmkit.data.prepare.corpus import open_corpus
from slmkit.data.rows.answers import PairRows
from slmkit.device import find_device
from slmkit.model.files.directory import load_decoder, save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.training import loop
from slmkit.training.estimate.forecast import PlanFile
from slmkit.training.logging.plots import plot_runs
from slmkit.training.objectives.preference import reference_log_probabilities
from slmkit.training.recipe.recipe import Recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.grpo import REWARDS, exact, find_reward, number
from slmkit.workflows.train import replay_run, resume_run, train_recipe
from tests.test_life import Silent
from tests.training.helpers import TOKENIZER
from tests.training.objectives.test_preference import CONFIG
from tests.training.ranks import on_ranks

TRAIN = {
    "sequence_length": 64, "max_steps": 6, "eval_steps": 3, "logging_steps": 1, "learning_rate": 3e-3,
    "sample_prompts": ["What is 1 + 2?"], "sample_tokens": 3, "device": "cpu", "precision": "float32",
}  # fmt: skip
SUMS = {"source": "sums", "documents": 40, "validation_documents": 6}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing."""
    root = tmp_path_factory.mktemp("start")
    dropout = CONFIG.model_copy(update={"hidden_dropout": 0.1})
    save_decoder(build_decoder(dropout, 7), dropout, root)
    TOKENIZER.save_pretrained(root)
    return root


WHOLE = (
    "test_the_references_log_probabilities_are_the_starting_models_and_stored",
    "test_rewards_rise_and_are_told_and_drawn",
)


@pytest.fixture(autouse=True)
def short(request: pytest.FixtureRequest) -> None:
    """All that a run writes is written by those of `WHOLE` alone."""
    if request.function.__name__ not in WHOLE:
        request.getfixturevalue("without_plan_and_pictures")


def recipe(start: Path, root: Path, objective: str, train: dict | None = None, **changes: object) -> Recipe:
    sections = {"objective": objective, "output_dir": str(root), "model": {"path": str(start)}, "data": SUMS}
    if objective == "grpo":
        changes = {
            "grpo": {"prompts_per_step": 4, "num_generations": 4, "max_new_tokens": 6, "reward": "vowels"}
        } | changes
    return Recipe.model_validate(sections | {"train": TRAIN | (train or {})} | changes)


@pytest.fixture(autouse=True)
def vowels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that a model which knows nothing gets some of."""
    monkeypatch.setitem(REWARDS, "vowels", lambda prompt, answer, known: sum(c in "aeiou0123456789" for c in answer))


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    return dict(load_decoder(run.latest)[0].named_parameters())


def stopped_and_resumed(run: RunDirectory, at: int) -> RunDirectory:
    """A copy of a finished run as it was after step `at`, gone on with."""
    root = run.root.with_name(f"{run.root.name}-resumed")
    shutil.copytree(run.root, root, symlinks=True)
    for later in (root / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > at:
            shutil.rmtree(later)
    return resume_run(root, Silent())


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    start: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_recipe(recipe(start, tmp_path / objective, objective), Silent(), force=True)
    # The reference's log-probabilities are stored: whoever computes them a second time fails.
    monkeypatch.setattr("slmkit.workflows.preference.reference_log_probabilities", None)
    resumed = stopped_and_resumed(run, 3)
    assert resumed.metrics.comparable() == run.metrics.comparable()
    assert [line["step"] for line in run.metrics.read()] == [1, 2, 3, 4, 5, 6]
    expected = weights(run)
    assert all(torch.equal(found, expected[name]) for name, found in weights(resumed).items())


def test_the_references_log_probabilities_are_the_starting_models_and_stored(start: Path, tmp_path: Path) -> None:
    told = Silent()
    run = train_recipe(recipe(start, tmp_path / "dpo", "dpo"), told)
    stored = safetensors.numpy.load_file(run.data / "reference.safetensors")
    corpus = open_corpus(run.data)
    for name, shards in (("00", corpus.train[0]), ("01", corpus.validation)):
        rows = PairRows(shards, 64)
        device = find_device("cpu", "float32")
        expected = reference_log_probabilities(load_decoder(start)[0], rows, device, 16, lambda pairs, tokens: None)
        assert (stored[name] == expected).all()
    assert told.counted["reference"] == (46, 46)  # pairs to learn from and held-out ones
    lines = run.metrics.read()
    assert lines[0]["rewards/margin"] != 0  # dropout alone
    assert {"validation/rewards/accuracy", "validation/rewards/margin"} <= lines[2].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert run.shares.is_file()


def test_an_objective_without_a_reference_stores_none(start: Path, tmp_path: Path) -> None:
    free = recipe(start, tmp_path / "simpo", "dpo", {"max_steps": 1}, preference={"loss": "simpo"})
    assert not (train_recipe(free, Silent()).data / "reference.safetensors").exists()


def test_a_batch_counts_both_answers_of_a_pair(start: Path, tmp_path: Path) -> None:
    reporter = Silent()
    train_recipe(recipe(start, tmp_path / "dpo", "dpo", {"tokens_per_step": 8 * 64}), reporter, dry_run=True)
    assert any("6 steps of 4 × 64 tokens" in line for line in reporter.lines)
    epoch = recipe(start, tmp_path / "dpo", "dpo", {"tokens_per_step": 8 * 64, "max_steps": None})
    train_recipe(epoch, reporter, dry_run=True)
    assert any("10 steps of 4 × 64 tokens" in line for line in reporter.lines)  # 40 pairs


def test_rewards_rise_and_are_told_and_drawn(start: Path, tmp_path: Path) -> None:
    longer = {"max_steps": 40, "eval_steps": 20, "learning_rate": 1e-2}
    run = train_recipe(recipe(start, tmp_path / "grpo", "grpo", longer), Silent(), force=True)
    lines = run.metrics.read()
    first, last = (sum(line["answers/reward"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last > first + 0.5
    assert {"answers/right", "answers/tokens", "groups/without_signal"} <= lines[0].keys()
    assert {"validation_loss", "validation/right"} <= lines[-1].keys()
    assert "mfu" not in lines[0]
    assert run.shares.is_file()
    plot_runs([run.root], tmp_path / "right.png", "steps")
    assert (tmp_path / "right.png").is_file()


def test_a_step_of_sampled_answers_is_replayed_bit_for_bit(start: Path, tmp_path: Path) -> None:
    run = train_recipe(
        recipe(start, tmp_path / "grpo", "grpo", {"max_steps": 3, "eval_steps": 1}), Silent(), force=True
    )
    replayed = replay_run(run.root, 3, Silent())
    assert replayed.recorded is not None
    assert not replayed.differences
    assert len(replayed.rows) == 16


def test_a_refused_step_keeps_its_answers_to_be_replayed(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Guard.judge

    def spoilt(self: loop.Guard, settings: object, loss: float, norm: float) -> str | None:
        if len(self.norms) == 3 and self.skipped == 0:
            self.skipped, self.in_a_row = 1, 1
            return "made up"
        return original(self, settings, loss, norm)

    monkeypatch.setattr(loop.Guard, "judge", spoilt)
    run = train_recipe(recipe(start, tmp_path / "grpo", "grpo"), Silent(), force=True)
    assert (run.records / "step-000004" / "batches.safetensors").is_file()
    replayed = replay_run(run.root, 4, Silent())
    assert not replayed.differences
    assert "advantage" in replayed.batch.extra


def test_the_x_ray_shows_both_answers_and_sampled_ones(start: Path, tmp_path: Path) -> None:
    reporter = Silent()
    train_recipe(recipe(start, tmp_path / "dpo", "dpo"), reporter, dry_run=True)
    lines = [str(line).strip() for line in reporter.lines]
    (chosen,), (rejected,) = (
        [line for line in lines if line.startswith(f"{kind}: ")] for kind in ("chosen", "rejected")
    )
    assert chosen.removeprefix("chosen: ") != rejected.removeprefix("rejected: ")
    assert all("⟦" in line and "assistant" in line for line in (chosen, rejected))
    sampled = Silent()
    train_recipe(recipe(start, tmp_path / "grpo", "grpo"), sampled, dry_run=True, force=True)
    assert any("rows 64 of" in str(line) for line in sampled.lines)


def test_what_cannot_be_is_refused_in_one_line(start: Path, tmp_path: Path) -> None:
    for objective in ("dpo", "kto", "grpo"):
        without = recipe(start, tmp_path / "x", objective).model_copy(update={"model": Recipe().model})
        with pytest.raises(UserError, match=f"objective {objective} needs a model that can chat"):
            train_recipe(without, Silent())
        with pytest.raises(ValueError, match="read whole before the first step"):
            recipe(start, tmp_path / "x", objective, data=SUMS | {"streaming": True})
    with pytest.raises(ValueError, match="train.sequence_length: grpo needs"):
        recipe(start, tmp_path / "x", "grpo", {"sequence_length": None})
    unknown = recipe(start, tmp_path / "x", "grpo", grpo={"max_new_tokens": 6, "reward": "exakt"})
    with pytest.raises(UserError, match="did you mean 'exact'"):
        train_recipe(unknown, Silent())


def test_rewards_are_plain_functions() -> None:
    assert exact("", " 46\n", "46") == 1
    assert exact("", "046", "46") == 0
    assert number("", "20 + 26 makes 46.", "46") == 1
    assert number("", "1,046", "46") == 0
    assert number("", "none", "46") == 0
    assert find_reward("slmkit.workflows.grpo:number") is number
    for name in ("slmkit.workflows.grpo:nothing", "no_such_module:f"):
        with pytest.raises(UserError, match="no function 'nothing'|cannot be loaded: ModuleNotFoundError"):
            find_reward(name)


def test_a_recipe_says_how_many_answers_make_a_step(start: Path, tmp_path: Path) -> None:
    made = recipe(start, tmp_path / "x", "grpo")
    assert made.train.tokens_per_step == 16 * 64
    again = Recipe.model_validate(json.loads(made.model_dump_json()))
    assert again == made


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_an_adapter_learns_from_both(start: Path, tmp_path: Path, objective: str) -> None:
    lora = {"r": 4, "lora_alpha": 8}
    short = {"max_steps": 2, "eval_steps": 2}
    run = train_recipe(recipe(start, tmp_path / objective, objective, short, lora=lora), Silent(), force=True)
    assert (run.latest / "adapter_model.safetensors").is_file()
    lines = run.metrics.read()
    assert len(lines) == 2
    assert lines[-1]["grad_norm"] > 0


def _on_a_rank(made: Recipe) -> None:
    PlanFile.update = lambda *arguments: None
    train_recipe(made, Silent())


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_processes_learn_from_judged_answers_what_one_does(tmp_path: Path, objective: str) -> None:
    root = tmp_path / "plain"
    save_decoder(build_decoder(CONFIG, 7), CONFIG, root)  # without dropout, which differs from rank to rank
    TOKENIZER.save_pretrained(root)
    made = [
        recipe(root, tmp_path / name, objective, {"tokens_per_step": 512, "max_steps": 3}) for name in ("one", "two")
    ]
    train_recipe(made[0], Silent())
    on_ranks(2, _on_a_rank, made[1])
    one, two = (RunDirectory(tmp_path / name) for name in ("one", "two"))
    told = {"dpo": ("rewards/accuracy", "rewards/margin"), "kto": ("rewards/chosen", "divergence", "desirable")}
    figures = ("loss", "grad_norm", *told[objective])
    for a, b in zip(one.metrics.read(), two.metrics.read(), strict=True):
        assert [a[name] for name in figures] == pytest.approx([b[name] for name in figures], rel=1e-3, abs=1e-5)
    assert one.metrics.read()[-1]["validation_loss"] == pytest.approx(
        two.metrics.read()[-1]["validation_loss"], abs=1e-4
    )
    expected = weights(one)
    for name, found in weights(two).items():
        assert torch.allclose(found, expected[name], atol=1e-4), name
