"""Reward functions of one's own: where they are found, and what is said when one of them is not as it should be."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from slmkit.config import UserError, to_yaml
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.recipe.recipe import Recipe, load_recipe
from slmkit.workflows.grpo import REWARDS, checked_reward, find_reward
from slmkit.workflows.train import resume_run, train_recipe
from tests.test_life import Silent
from tests.training.helpers import TOKENIZER
from tests.training.objectives.test_preference import CONFIG

GOOD = "import helper\n\ndef score(prompt, answer, known):\n    return helper.length(answer)\n"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A recipe, with a reward function and what that imports beside it."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "scores.py").write_text(GOOD)
    (folder / "helper.py").write_text("length = len\n")
    save_decoder(build_decoder(CONFIG, 7), CONFIG, tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    recipe = Recipe.model_validate(
        {
            "objective": "grpo", "output_dir": str(tmp_path / "run"), "model": {"path": str(tmp_path / "start")},
            "data": {"source": "sums", "documents": 20, "validation_documents": 2},
            "grpo": {"prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 4, "reward": "scores.py:score"},
            "train": {
                "sequence_length": 64, "max_steps": 2, "eval_steps": 1, "logging_steps": 1, "sample_tokens": 2,
                "device": "cpu", "precision": "float32",
            },
        }
    )  # fmt: skip
    (folder / "grpo.yaml").write_text(to_yaml(recipe))
    return folder / "grpo.yaml"


@pytest.mark.parametrize("name", ["scores.py:score", "scores:score", "beside the working directory"])
def test_a_function_is_found_beside_the_recipe_and_in_the_working_directory(
    name: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name.startswith("beside"):
        name = "scores.py:score"
        (tmp_path / "scores.py").write_text((written.parent / "scores.py").read_text())
        (tmp_path / "helper.py").write_text("length = len\n")
        (written.parent / "scores.py").unlink()
    recipe = load_recipe(written, [f"grpo.reward={name}"])
    assert Path(recipe.grpo.reward.removesuffix(":score")).is_absolute()
    assert find_reward(recipe.grpo.reward)("", "four", "") == 4


def test_a_run_finds_its_reward_again_and_refuses_a_changed_one(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_recipe(load_recipe(written), Silent(), force=True)
    monkeypatch.chdir("/")
    later = run.checkpoints / "step-000002"
    shutil.rmtree(later)
    assert resume_run(run.root, Silent()).metrics.read()[-1]["step"] == 2
    shutil.rmtree(later)
    (written.parent / "scores.py").write_text(GOOD + "# changed\n")
    with pytest.raises(UserError, match=r"grpo.reward .*scores.py:score has changed since the run began: restore it"):
        resume_run(run.root, Silent())
    (written.parent / "scores.py").unlink()
    with pytest.raises(UserError, match=r"scores.py:score: cannot be found: no such file"):
        resume_run(run.root, Silent())


ANSWERS = {
    "None": (lambda p, a, k: None, r"returned None \(nothing\)"),
    "NaN": (lambda p, a, k: float("nan"), r"returned nan \(a number\)"),
    "infinite": (lambda p, a, k: np.float32("inf"), "returned .*inf"),
    "text": (lambda p, a, k: "1.0", r"returned '1.0' \(text\)"),
    "list": (lambda p, a, k: [1.0, 0.0], r"returned \[1.0, 0.0\] \(a list\)"),
    "list of one": (lambda p, a, k: [1.0], r"returned \[1.0\] \(a list\)"),
    "array": (lambda p, a, k: np.ones(2), r"returned array\(\[1., 1.\]\) \(a value of type ndarray\)"),
    "other arguments": (lambda prompts, scale: 1.0, r"TypeError: .* takes 2 positional arguments but 3 were given"),
    "raises": (lambda p, a, k: 1 / 0, r"ZeroDivisionError: division by zero \(test_rewards.py, line \d+\),"),
    "raises of many lines": (lambda p, a, k: {}["a\nb"], r"KeyError: 'a\\nb' \(test_rewards.py, line \d+\),"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_no_number_is_named_with_the_answer_in_one_line(name: str) -> None:
    reward, said = ANSWERS[name]
    with pytest.raises(UserError, match=rf"grpo.reward mine: {said}.* for the answer 'forty\\ntwo'") as raised:
        checked_reward("mine", reward, "?", "forty\ntwo", "42")  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError) as long:
        checked_reward("mine", reward, "?", "very " * 1000, "42")  # type: ignore[arg-type]
    assert len(str(long.value)) < 500


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(0.5), np.int64(3), np.array(0.5), torch.tensor(0.5)])
def test_whatever_is_one_number_is_taken(value: object) -> None:
    assert checked_reward("mine", lambda p, a, k: value, "", "", "") == float(value)  # type: ignore[arg-type, return-value]


FILES = {
    "def skore(prompt, answer, known):\n    return 1.0\n": "no function 'score'; did you mean 'skore'",
    "score = 1.0\n": "no function 'score'",
    "def score(prompt, answer, known)\n": "cannot be loaded: SyntaxError: expected ':'",
    "import nothing_of_this_name\n": "cannot be loaded: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "raise RuntimeError('no key\\nset')\n": r"cannot be loaded: RuntimeError: no key set \(mine.py, line 1\)",
}


@pytest.mark.parametrize("content", FILES)
def test_a_file_without_such_a_function_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(UserError, match=FILES[content]) as raised:
        find_reward(f"{tmp_path / 'mine.py'}:score")
    assert "\n" not in str(raised.value)


def test_a_run_ends_with_the_line(written: Path) -> None:
    (written.parent / "scores.py").write_text("def score(prompt, answer, known):\n    pass\n")
    with pytest.raises(UserError, match=r"scores.py:score: returned None \(nothing\) for the answer"):
        train_recipe(load_recipe(written), Silent(), force=True)
    assert "scores" not in REWARDS
