"""The command line as somebody meets it: help, version, completion, and examples that can be copied and run."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slmkit.cli import app, main
from slmkit.cli.errors import explain
from slmkit.config import UserError
from tests.cli.helpers import TINY, slm

GROUPS = {"tokenizer": ("train", "encode"), "data": ("prepare", "inspect"), "bench": ("data",)}
COMMANDS = [command.name for command in app.registered_commands] + [
    f"{group} {name}" for group, names in GROUPS.items() for name in names
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command here, which is faster than in a process of its own."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def examples_of(text: str) -> list[str]:
    """The lines below `Example:` or `Examples:` at the end of a help text."""
    return [line.strip() for line in re.split(r"^  Examples?:\n", text, flags=re.MULTILINE)[1].splitlines()]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], *([group] for group in GROUPS)])
def test_help_is_laid_out_and_no_mistake(run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "\nCommands:\n" in out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "..." not in out.split("Commands:")[1]
    assert "…" not in out
    listed = out.split("Commands:\n")[1].splitlines()
    assert all(re.match(r"  \S", line) for line in listed), "a description takes more than its line"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert all("slm " in example for example in examples_of(out))


def test_version_and_module_and_completion() -> None:
    done = subprocess.run([sys.executable, "-m", "slmkit", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"slm \d+\.\d+\.\d+\n", done.stdout)
    asked = {"_SLM_COMPLETE": "complete_bash", "COMP_WORDS": "slm tra", "COMP_CWORD": "1"}
    code = "from slmkit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == ["train"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_errors_are_coloured_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    for stream, is_coloured in ((Terminal(), not no_color), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert explain(UserError("book.txt: no such file"), "train") == 2
        assert ("\x1b[" in stream.getvalue()) is is_coloured
        assert re.sub(r"\x1b\[\d*m", "", stream.getvalue()) == "slm: book.txt: no such file\n"


def test_recipes_are_listed_with_what_they_are(run) -> None:
    code, out, _ = run("recipes")
    assert code == 0
    names = [path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml")]
    assert all(re.search(rf"^  {name}  +\S.*\w", out, re.MULTILINE) for name in [*names, "ties"])
    assert max(len(line) for line in out.partition("folder: ")[0].splitlines()) <= 80


# -- the examples, run as they are ------------------------------------------------------------------------------------

SMALLER = {  # what is added to an example so that it takes seconds; everything else is as it stands in the help
    "slm train own-text": [*TINY, "train.max_steps=4"],
    "slm resume runs/book": ["train.max_tokens=8e3"],
    "slm plan own-text": ["--no-probe"],
    "slm plan --hours": ["--no-probe"],
    "slm plan llama": ["model.num_hidden_layers=1", "train.micro_batch_tokens=2048"],
    "slm eval runs/book --tasks": ["--limit", "2"],
    "slm eval oracle": None,  # needs the files of a task, and is run by tests of its own
    "slm compare --results": None,  # needs results of two models, and is run by tests of its own
    "slm inspect llama": ["--length", "512"],
    "slm quickstart": None,  # takes minutes, and is run by tests of its own
    "slm push": None,  # needs a hub, and is run against one by tests of its own
    "slm bench": None,
    "slm serve": None,  # do not end, and are run by tests of their own
    "slm ui": None,
    "SLM_API_KEYS": None,
    "slm distill-cache": None,  # after a quickstart
    "slm verify": None,  # takes minutes in all runtimes, and is run by tests of its own
    "slm export runs/book --to gguf": ["--unverified"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples speak of, in small."""
    folder = tmp_path_factory.mktemp("examples")
    text = "The fox had a kite and the kite had a fox. Once upon a time there was a fox.\n" * 200
    (folder / "prompts.txt").write_text("Once there was\nThe fox had\n")
    for name in ("book.txt", "other.txt", "books/one.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(60):
            turns = [{"role": "user", "content": f"Hi {number}"}, {"role": "assistant", "content": "A fox."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    assert slm("train", "own-text", "data.source=book.txt", "output_dir=runs/book", *TINY, cwd=folder).returncode == 0
    for copy in ("book-2", "chat-a", "chat-b", "quickstart/chat", "quickstart/stories"):
        (folder / "runs" / copy).parent.mkdir(exist_ok=True)
        (folder / "runs" / copy).symlink_to(folder / "runs" / "book")
    lora = ("train", "own-chat-lora", "model.path=runs/book", "data.source=chats.jsonl", "output_dir=runs/book-lora")
    small = ("train.sequence_length=64", "train.max_steps=2", "train.tokens_per_step=128", "train.device=cpu")
    done = slm(*lora, *small, "--force", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_examples_in_every_help_work(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    first = ["merge", "tokenizer train"]  # before others train the models further, and read the tokenizer
    for command in [*first, *(command for command in COMMANDS if command not in first)]:
        for example in examples_of(run(*command.split(), "--help")[1]):
            key = next((key for key in SMALLER if example.startswith(key)), None)
            if key is not None and SMALLER[key] is None:
                continue
            given, _, line = example.rpartition(" | ")
            words = shlex.split(line)[1:] + (SMALLER[key] or [] if key else [])
            monkeypatch.setattr(sys, "stdin", io.StringIO(shlex.split(given)[1] if given else ""))
            code, _, err = run(*words)
            assert code == 0, (example, err)
