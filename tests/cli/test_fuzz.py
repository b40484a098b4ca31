"""Anything in the place of a file, a folder or a number: one line in our words and exit code 2."""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path

import pytest
import typer

from slmkit import cli
from slmkit.cli import main
from slmkit.cli.errors import explain, in_words
from tests.cli.helpers import TINY, slm

COMMAND = typer.main.get_command(cli.app)  # of all commands, which are made anew for each call otherwise
PYTHONS = {name for name in dir(builtins) if name.endswith(("Error", "Exception"))}
PYTHONS |= {"Errno", "Traceback", "JSONDecodeError", "SafetensorError", "ValidationError", "NoneType", "<class", "dict"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders that are not what a command expects, and a run that is one."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "empty").write_text("")
    (folder / "empty.txt").write_text("")
    (folder / "empty.jsonl").write_text("")
    (folder / "empty.yaml").write_text("")
    (folder / "emptyfolder").mkdir()
    (folder / "bytes.txt").write_bytes(bytes(range(256)) * 40)
    (folder / "bytes.jsonl").write_bytes(b"\xff\xfe{}\n" * 9)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00: [")
    (folder / "broken.json").write_text('{"a": ')
    (folder / "broken.jsonl").write_text('{"text": \n[1, 2]\nnull\n')
    (folder / "broken.parquet").write_text("PAR1 and nothing")
    (folder / "broken.txt.gz").write_bytes(b"\x1f\x8b and nothing")
    (folder / "broken.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd and nothing")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "odd.yaml").write_text("objective: [1]\nmodel: 3\ntrain: yes\n")
    for name, files in {
        "model": {"config.json": "{", "model.safetensors": "", "tokenizer.json": "{"},
        "listmodel": {"config.json": "[]", "model.safetensors": "x" * 99, "tokenizer.json": "[]"},
        "halfmodel": {"config.json": '{"model_type": "nosuch"}'},
        "adapter": {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
        "badrun": {"recipe.yaml": "train: 3", "metrics.jsonl": "{", "plan.json": "[", "checkpoints/x": ""},
        "emptyrun": {"recipe.yaml": "", "checkpoints/x": ""},
        "shards": {"header.json": "{}"},
    }.items():
        for file, content in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(content)
    (folder / "book.txt").write_text("The fox had a kite and the kite had a fox. " * 200)
    small = (*TINY, "train.max_steps=2")
    assert slm("train", "own-text", "data.source=book.txt", "output_dir=run", *small, cwd=folder).returncode == 0
    return folder


THINGS = [
    "nosuch", "no/such/thing.txt", "", " ", "ünïcödé 🦊", "\udcff", "-", "x" * 300, "\x00", "*", "emptyfolder", "empty",
    "model", "halfmodel", "adapter", "badrun", "emptyrun", "shards", "book.txt", "bytes.txt", "list.yaml",
    "listmodel", "odd.yaml", "empty.yaml", "bytes.yaml",
]  # fmt: skip
TEXTS = [
    "empty.txt", "bytes.txt", "empty.jsonl", "bytes.jsonl", "broken.json", "broken.jsonl", "broken.parquet",
    "broken.txt.gz", "broken.txt.zst", "emptyfolder", "model",
]  # fmt: skip
COMMANDS = [
    ["generate", "THING", "x"], ["chat", "THING"], ["inspect", "THING"], ["resume", "THING"],
    ["replay", "THING", "--step", "1"], ["plot", "THING", "-o", "out.png"], ["train", "THING"], ["plan", "THING"],
    ["merge", "THING"], ["merge", "THING", "--adapter", "run"], ["distill-cache", "THING"],
    ["tokenizer", "encode", "THING", "x"], ["data", "inspect", "THING"],
    ["data", "prepare", "book.txt", "--tokenizer", "THING", "-o", "out"], ["eval", "THING", "--data", "book.txt"],
    ["train", "own-chat", "data.source=book.txt", "model.path=THING"],
]  # fmt: skip
OF_TEXT = [
    ["tokenizer", "train", "TEXT", "-o", "out"],
    ["train", "own-text", "data.source=TEXT", "output_dir=out", *TINY],
    ["data", "prepare", "TEXT", "--tokenizer", "run", "-o", "out"],
    ["data", "prepare", "TEXT", "--chat", "--tokenizer", "run", "-o", "out"],
    ["eval", "run", "--data", "TEXT"],
]
NUMBERS = [
    *(["generate", "run", "x", option, value]
      for option in ("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "-n",
                     "--seed")
      for value in ("-1", "nan", "many", "")),
    *(["replay", "run", "--step", value] for value in ("-1", "0", "999", "x")),
    *(["inspect", "run", option, value] for option in ("--batch", "--length") for value in ("-1", "0", "x")),
    ["inspect", "run", "--precision", "int3"], ["inspect", "run", "--optimizer", "sgd"],
    ["inspect", "run", "--length", "9999999"], ["generate", "run", "x", "--device", "tpu"],
    ["plan", "--hours", "-1"], ["plan", "--tokens", "0"], ["plan", "--hours", "1", "--tokens", "1e6"],
    ["plot", "run", "--over", "moon"], ["plot", "run", "--what", "moon"],
    ["plot", "run", "-o", "no/such/folder/out.png"],
    ["tokenizer", "train", "book.txt", "--vocab-size", "-5", "-o", "out"],
    ["quickstart", "--minutes", "-1", "-o", "out"], ["data", "inspect", "run/data/train", "--length", "-1"],
    ["data", "prepare", "book.txt", "--tokenizer", "run", "-o", "out", "--workers", "-1"],
    ["data", "prepare", "book.txt", "--tokenizer", "run", "-o", "out", "--shard-characters", "0"],
    ["data", "prepare", "book.txt", "--tokenizer", "run", "-o", "out", "--shuffle", "x"],
    ["data", "prepare", "book.txt", "--tokenizer", "run", "-o", "book.txt"],
    ["tokenizer", "train", "book.txt", "--vocab-size", "300", "-o", "book.txt"],
    ["train", "own-text", "data.source=book.txt", "output_dir=book.txt/run", *TINY],
    ["train", "own-text", "data.source=book.txt", "=3"], ["train", "own-text", "data.source=book.txt", "..=3"],
]  # fmt: skip


def outcome(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a command that has to be refused."""
    monkeypatch.setattr(sys, "argv", ["slm", *arguments])
    monkeypatch.setattr(cli, "app", COMMAND)
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 2, (arguments, err)
    line = err.splitlines()[-1]
    assert line.startswith("slm: "), (arguments, err)
    found = [word for word in PYTHONS if re.search(rf"(?<![\w'])\{word}\b" if word[0] == "<" else rf"\b{word}\b", line)]
    assert not found, (arguments, line)
    assert len(re.findall("^slm: ", err, re.MULTILINE)) == 1, err
    assert len(line) < 1000
    return line


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_anything_in_the_place_of_a_model_run_or_recipe(command: list[str], folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    is_fine = {"book.txt"} if command[:2] == ["data", "inspect"] else set()
    for thing in sorted({*THINGS} - is_fine):
        outcome([word.replace("THING", thing) for word in command], monkeypatch, capsys)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", OF_TEXT, ids=lambda command: " ".join(command[:3]))
def test_anything_in_the_place_of_text(command: list[str], folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    for text in TEXTS:
        outcome([word.replace("TEXT", text) for word in command], monkeypatch, capsys)
        assert not (folder / "out").exists(), text


def test_anything_in_the_place_of_a_number(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    for command in NUMBERS:
        outcome(command, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: no such file or directory"),
        (OSError(28, "No space left on device", "run/x"), "run/x: no space left on device: free some space"),
        (PermissionError(13, "Permission denied", "x"), "x: permission denied"),
        (IsADirectoryError(21, "Is a directory", "x"), "x: is a directory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "out of memory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "a file is not UTF-8 text"),
        (type("SafetensorError", (Exception,), {})("header"), "a file of weights is damaged"),
        (ModuleNotFoundError("x", name="wandb"), "this needs the package wandb, which is not installed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_does_is_said_in_words(error: Exception, words: str) -> None:
    assert (in_words(error) or "").startswith(words)


def test_an_error_of_our_own_says_where_and_how_to_report_it(capsys) -> None:
    with pytest.raises(KeyError) as caught:
        {}["step"]
    assert explain(caught.value, "train") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("slm: internal error in test_fuzz.py:")
    assert "during `slm train`" in line
    assert "--debug" in line
    assert "KeyError" not in line
