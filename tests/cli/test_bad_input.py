"""The user's mistakes: one line that says what is wrong and what to do, exit code 2, and nothing touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.helpers import TINY, refused, slm


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "book.txt").write_text("The fox had a kite and the kite had a fox. " * 200)
    done = slm("train", "own-text", "data.source=book.txt", "output_dir=run", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".running"
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"  \n\n", "no documents found"),
        (b"text\x00\xff\xfe" * 100, "expected UTF-8 text, found a byte that is not UTF-8 at offset"),
        (b"Too short.", "too few for one sequence"),
    ],
)
def test_text_that_cannot_be_trained_on(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "book.txt").write_bytes(content)
    line = refused("train", "own-text", "data.source=book.txt", "output_dir=run", *TINY, cwd=tmp_path)
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["own-text", "train.learing_rate=1"], "unknown key 'train.learing_rate'; did you mean 'learning_rate'?"),
        (["own-text", "model.hiden_size=1"], "did you mean 'hidden_size'?"),
        (["own-text", "train.learning_rate=fast"], "train.learning_rate"),
        (["own-text", "train.max_steps=5", "train.max_tokens=9"], "train.max_steps and train.max_tokens contradict"),
        (["own-text", "train.warmup_steps=0.05"], "set train.warmup_ratio=0.05"),
        (["own-text", "model.learning_rate=1e-3"], "learning_rate is no part of a model"),
        (["own-text"], "data.source says where text comes from"),
        (["own-txt"], "did you mean 'own-text'?"),
        (["none.yaml"], "no such recipe file"),
        (["own-text", "data.source=book.txt", "train.device=cuda:7"], "device 'cuda:7' is not available"),
        (["own-text", "data.source=book.txt", "train.sequence_length=900"], "longer than"),
        (["own-chat", "data.source=book.txt", "model.path=nowhere"], "nowhere: no such directory"),
        (["own-text", "data.source=book.txt", "model.preset=llama"], "unknown preset 'llama'"),
        (["own-text", "objective=rlhf"], "objective"),
    ],
)
def test_a_recipe_with_a_mistake(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The fox had a kite. " * 300)
    assert words in refused("train", *arguments, cwd=tmp_path)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_a_folder_of_runs(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "recipe.yaml").write_text("objective: pretrain\n")
    assert f"a folder of runs: name one of them, such as {tmp_path / 'book'}" in refused("generate", tmp_path, "x")


def test_a_missing_and_a_truncated_checkpoint(run: Path, tmp_path: Path) -> None:
    assert "no such directory" in refused("generate", tmp_path / "none", "x")
    assert "neither a model directory nor a run" in refused("generate", tmp_path, "x")
    assert "not a run" in refused("resume", tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    weights = copy / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = everything_in(copy)
    assert "damaged or cut short" in refused("generate", copy, "x")
    for path in (copy / "checkpoints").glob("step-*"):
        (path / "model.safetensors").write_bytes(b"")
    before = everything_in(copy)
    done = slm("resume", copy)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("slm: ")
    assert "no complete checkpoint" in done.stderr
    assert everything_in(copy) == before


def test_a_prompt_longer_than_the_models_context(run: Path) -> None:
    line = refused("generate", run, "fox kite " * 200)
    assert "fills the model's context of 64" in line


def test_an_empty_prompt_lets_the_model_begin(run: Path) -> None:
    done = slm("generate", run, "", "--max-new-tokens", "40", "--seed", "1")
    assert done.returncode == 0
    assert done.stdout.strip()


def test_fewer_than_no_documents_cannot_be_shown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert "invalid value for '--documents'" in refused("data", "inspect", tmp_path / "a.jsonl", "--documents", "-1")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--temperature", "-1", "--temperature: expected 0 or more and up to 1000000 (0: greedy), found -1.0"),
        ("--top-k", "-1", "--top-k: expected 0 or more (0: all tokens), found -1"),
        ("--top-p", "2", "--top-p: expected more than 0 and up to 1, found 2.0"),
        ("--min-p", "3", "--min-p: expected 0 or more and less than 1, found 3.0"),
        ("--repetition-penalty", "0", "--repetition-penalty: expected 0.01 or more and up to 100 (1: none), found 0.0"),
        ("--max-new-tokens", "many", "should be a valid integer"),
    ],
)
def test_a_sampling_value_out_of_range(run: Path, option: str, value: str, words: str) -> None:
    assert words in refused("generate", run, "x", option, value)


def test_a_tokenizer_without_text_or_room(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "book.txt").write_text("some text")
    assert "empty" in refused("tokenizer", "train", "empty.txt", "-o", "tok", cwd=tmp_path)
    assert "need 260" in refused("tokenizer", "train", "book.txt", "--vocab-size", "9", "-o", "tok", cwd=tmp_path)
    assert "tok: no such directory" in refused("tokenizer", "encode", "tok", "x", cwd=tmp_path)
    assert not (tmp_path / "tok").exists()


def test_a_command_or_option_that_is_not_there() -> None:
    assert "trian" in refused("trian")
    assert "--sede" in refused("generate", "x", "--sede", "1")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = slm("--debug", "generate", tmp_path / "none", "x")
    assert "Traceback" in done.stderr


def test_a_run_that_would_be_ruined_is_not_begun(run: Path, tmp_path: Path) -> None:
    """Answers so long that every conversation is cut: the X-ray shows it, and the reason is one line."""
    with (tmp_path / "chats.jsonl").open("w") as file:
        for number in range(40):
            answer = {"role": "assistant", "content": f"{number} " + "fox kite " * 90}
            file.write(json.dumps({"messages": [{"role": "user", "content": "Hi"}, answer]}) + "\n")
    command = ("train", "own-chat", f"model.path={run}", "data.source=chats.jsonl", "output_dir=chat")
    done = slm(*command, "--dry-run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "x-ray: rows" in done.stderr
    assert "xray.md" not in done.stderr  # its folder is gone
    assert done.stderr.splitlines()[-1].startswith("slm: training not started: ")
    assert not (tmp_path / "chat").exists()
    assert slm(*command, "--dry-run", "--force", cwd=tmp_path).returncode == 0
