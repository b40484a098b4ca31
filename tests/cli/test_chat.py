"""`slm chat` at a real pseudo-terminal, as a person sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slmkit.tokenizer import SLMTokenizer
from tests.cli import terminal as terminals
from tests.cli.helpers import refused, slm
from tests.cli.scripted import save_scripted_model
from tests.cli.terminal import Terminal

MARKDOWN = [
    "# A title\n\nSome ", "*slanted", "* and **strong", "** words.\n\n- one", "\n- two\n", "\n```\ncode = ", "1\n```",
]  # fmt: skip
HOSTILE = [  # colours, a cleared screen, a changed title, a device query, an 8-bit sequence, a bell, and false prompts
    "red\x1b[31m", "clear\x1b[2J\x1b[H", "title\x1b]0;pwned\x07", "query\x1b[6n", "c1\x9b31m", "back\rward\x08\x7f",
    "override\u202eevas/", "\n\nyou> /save stolen.json\n", "\n    you> indented\n", "\n> you> quoted\n",
    "&#27;[32mgreen", " end",
]  # fmt: skip
SLOW = """
import time
from slmkit.generation.engine import Engine
step = Engine.step
Engine.step = lambda engine: time.sleep(0.02) or step(engine)
"""
ALWAYS_DRAWN = """
from slmkit.cli import show
show.SECONDS_BETWEEN_DRAWINGS = 0
"""
Opener = Callable[..., Terminal]
ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_scripted_model(folder / "markdown", MARKDOWN)
    save_scripted_model(folder / "hostile", HOSTILE)
    save_scripted_model(folder / "either", ["It is a", " fox."], ["It was an", " owl."])
    save_scripted_model(folder / "endless", ["One and", " two and", " three and "], ends=False)
    save_scripted_model(folder / "long", [f"- item {number}\n" for number in range(60)])
    save_scripted_model(folder / "wide", ["שלום עולם, ", "你好，世界。", "é̂ ", "\n\nمرحبا"])
    return folder


@pytest.fixture
def at_terminal() -> Iterator[Opener]:
    opened: list[Terminal] = []

    def open_one(*arguments: str | Path, **options: Any) -> Terminal:
        opened.append(Terminal(*arguments, **options))
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.close()


def test_an_answer_is_rendered_as_markdown_with_colours_and_speed(at_terminal: Opener, folder: Path) -> None:
    terminal = at_terminal("chat", "markdown", cwd=folder)
    said = terminal.say("hi")
    assert re.fullmatch(
        r" hi\nmodel>\n +A title\n\n  Some slanted and strong words\.\n\n   • one\n   • two\n\n\n   code = 1\n\n"
        r"\(8 tokens in \d+\.\d s, [\d,.]+ tokens/s\)",
        said,
    ), said
    screen = terminal.screen
    assert screen.style_of("slanted").italics
    assert screen.style_of("strong").bold
    assert {screen.style_of(word).fg for word in ("you>", "model>", "Some")} == {"cyan", "magenta", "default"}
    assert b"\x1b[2m(8 tokens" in terminal.raw  # dim, which the emulator does not know
    assert not terminal.raw.rpartition(b"\x1b[?25h")[2].count(b"\x1b[?25l"), "the cursor is hidden"
    assert terminal.leave() == 0


@pytest.mark.parametrize(
    ("options", "environment"), [(["--plain"], {}), ([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"})]
)
def test_plain_where_it_is_asked_for(
    at_terminal: Opener, folder: Path, options: list[str], environment: dict[str, str]
) -> None:
    terminal = at_terminal("chat", "markdown", *options, cwd=folder, **environment)
    said = terminal.say("hi")
    whole = "".join(MARKDOWN).replace("\n", "\n  ")
    assert said.partition("\n(8 tokens in ")[0] == re.sub(" +\n", "\n", f" hi\nmodel> {whole}")
    assert terminal.leave() == 0
    of_readline = {b"\x1b[?2004h", b"\x1b[?2004l"}  # brackets around what is pasted
    assert set(ESCAPE.findall(terminal.raw)) <= of_readline


@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_nothing_that_a_model_says_controls_the_terminal(at_terminal: Opener, folder: Path, options: list[str]) -> None:
    terminal = at_terminal("chat", "hostile", *options, cwd=folder)
    said = terminal.say("hi")
    for sequence in (
        b"\x1b[31m",
        b"\x1b[2J",
        b"\x1b]0;",
        b"\x07",
        b"\x1b[6n",
        b"\xc2\x9b",
        b"\x08",
        b"\xe2\x80\xae",
        b"\x1b[32m",
    ):
        assert sequence not in terminal.raw, sequence
    for word in ("red", "clear", "title", "pwned", "query", "c1", "back", "override", "stolen.json", "green", "end"):
        assert said.count(word) == 1, word
    assert [line for line in said.splitlines() if line.startswith(("you>", "...>"))] == []
    assert terminal.leave() == 0
    assert not (folder / "stolen.json").exists()


@pytest.mark.parametrize("environment", [{}, {"LINES": "24", "COLUMNS": "120"}])  # of the terminal it was started in
def test_an_answer_higher_than_the_screen_is_there_once_and_whole(
    at_terminal: Opener, folder: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """Drawn anew for each token."""
    monkeypatch.setattr(terminals, "SLM", terminals.SLM.replace("main()\n", f"{ALWAYS_DRAWN}main()\n"))
    terminal = at_terminal("chat", "long", cwd=folder, rows=12, **environment)
    said = terminal.say("hi")
    assert re.findall(r"• (item \d+)\n", said) == [f"item {number}" for number in range(60)]
    assert terminal.leave() == 0


def test_letters_of_two_columns_and_from_right_to_left(at_terminal: Opener, folder: Path) -> None:
    terminal = at_terminal("chat", "wide", cwd=folder)
    said = terminal.say("你好")
    assert "\n  שלום עולם, 你好，世界。é̂\n\n  مرحبا\n" in said
    assert terminal.leave() == 0


def test_commands(at_terminal: Opener, folder: Path, tmp_path: Path) -> None:
    terminal = at_terminal("chat", folder / "either", "--seed", "1", cwd=tmp_path)
    assert "(nothing was asked yet)" in terminal.say("/undo")
    assert "(nothing was asked yet)" in terminal.say("/retry")
    assert "(system message: none)" in terminal.say("/system")
    assert "(system message: Be kind.)" in terminal.say("/system Be kind.")
    said = terminal.say("What is it?")
    answers = ["It is a fox.", "It was an owl."]
    first = next(answer for answer in answers if answer in said)
    tries = [terminal.say("/retry") for _ in range(8)]
    assert all(any(answer in one for one in tries) for answer in answers), tries
    assert "(saved to chat.json)" in terminal.say("/save")
    kept = next(answer for answer in answers if answer in tries[-1])
    assert json.loads((tmp_path / "chat.json").read_text())["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": kept},
    ]
    assert "(taken back: What is it?)" in terminal.say("/undo")
    assert first in terminal.say("What is it?"), "the seed gives the same answer again"
    assert "(system message: none)" in terminal.say("/system -")
    assert "(forgotten)" in terminal.say("/reset")
    assert "(going on with chat.json: 3 messages)" in terminal.say("/load")
    assert "(none.json: no such file)" in terminal.say("/load none.json")
    assert "(unknown command /nope: /help lists them)" in terminal.say("/nope")
    assert all(f"\n  /{name}" in terminal.say("/help") for name in ("retry", "undo", "system", "save", "load", "quit"))
    assert terminal.leave("/quit\r") == 0


def test_only_files_of_this_chat_are_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("precious")
    (tmp_path / "link.jsonl").symlink_to("data.jsonl")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for name in ("chat.json", "mine.json"):
        (tmp_path / name).write_text(json.dumps({"messages": exchange}))
    before = (tmp_path / "chat.json").read_text()
    lines = (
        "/save empty", "hi", "/save", "/save data.jsonl", "/save link.jsonl", "/save /dev/full", "/save .",
        "/save none/x", "/load deep.json", "/load /dev/zero", "/load mine.json", "more", "/save", "/save mine.json",
        "/save new.json", "/save ./new.json", f"/save {'x' * 300}", "/quit now", "never",
    )  # fmt: skip
    words = ("chat", folder / "either", "--system", "Be kind.")
    done = slm(*words, cwd=tmp_path, stdin="".join(f"{line}\n" for line in lines))
    assert done.returncode == 0, done.stderr
    said = dict.fromkeys(lines, "")
    for line in done.stdout.split("you> ")[1:]:
        asked, _, answer = line.partition("\n")
        said[asked] += answer
    assert said["/save empty"] == "(nothing was asked yet, so there is no conversation to save)\n"
    assert said["/save"] == (
        "(chat.json exists, and is not of this chat; name another file: /save FILE)\n(saved to mine.json)\n"
    )
    for line in ("/save data.jsonl", "/save link.jsonl"):
        assert f"({line[6:]} exists, and is not of this chat" in said[line]
    assert said["/save /dev/full"] == "(/dev/full: the conversation cannot be saved: is no regular file)\n"
    assert said["/save ."] == "(.: the conversation cannot be saved: is a folder)\n"
    assert said["/save none/x"] == "(none/x: the conversation cannot be saved: there is no folder none)\n"
    assert "file name too long" in said[f"/save {'x' * 300}"]
    assert "nested too deeply" in said["/load deep.json"]
    assert said["/load /dev/zero"] == "(/dev/zero: not a regular file)\n"
    assert said["/load mine.json"] == (
        "(going on with mine.json: 2 messages; the system message is gone, since the file has none: "
        "/system TEXT sets it)\n"
    )
    assert said["/save mine.json"] == "(saved to mine.json)\n"
    assert [said[line] for line in ("/save new.json", "/save ./new.json")] == [
        "(saved to new.json)\n", "(saved to ./new.json)\n",
    ]  # fmt: skip
    assert (said["/quit now"], said["never"]) == ("", "")
    assert (tmp_path / "data.jsonl").read_text() == "precious"
    assert (tmp_path / "chat.json").read_text() == before
    assert len(json.loads((tmp_path / "mine.json").read_text())["messages"]) == 4


def test_the_same_answer_is_not_given_again_for_certain(at_terminal: Opener, folder: Path) -> None:
    terminal = at_terminal("chat", "either", "--temperature", "0", cwd=folder)
    terminal.say("hi")
    assert "(at temperature 0 the answer is always the same" in terminal.say("/retry")
    assert terminal.leave() == 0


def test_messages_of_several_lines(at_terminal: Opener, folder: Path, tmp_path: Path) -> None:
    terminal = at_terminal("chat", folder / "either", cwd=tmp_path)
    terminal.wait_for("you>")
    terminal.type("one \\\r")
    terminal.wait_for("...>")
    terminal.type("two\r")
    terminal.wait_for("two\nmodel>", "\nyou>")
    terminal.type('"""/not a\r\rcommand"""\r')
    terminal.wait_for('command"""\nmodel>', "\nyou>")
    terminal.type("\x1b[200~pasted\nlines\x1b[201~\r")
    terminal.wait_for("lines\nmodel>", "\nyou>")
    terminal.say("/save talk.json")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [one["content"] for one in messages[::2]] == ["one \ntwo", "/not a\n\ncommand", "pasted\nlines"]
    assert terminal.leave() == 0


def test_lines_are_edited_and_remembered(at_terminal: Opener, folder: Path, tmp_path: Path) -> None:
    terminal = at_terminal("chat", folder / "either", cwd=tmp_path)
    terminal.say("What isit?\x1b[D\x1b[D\x1b[D ")  # three to the left
    terminal.type("\x1b[A")  # the line before
    terminal.wait_for("you> What is it?", "you> What is it?")
    terminal.type("\r")
    terminal.wait_for("", "\nyou>")
    terminal.say("/save talk.json")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [one["content"] for one in messages[::2]] == ["What is it?"] * 2
    assert terminal.leave() == 0


@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_ctrl_c_stops_an_answer_and_gives_up_a_line(
    at_terminal: Opener, folder: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model so slow that its answer goes on for a minute and more."""
    monkeypatch.setattr(terminals, "SLM", terminals.SLM.replace("main()\n", f"{SLOW}main()\n"))
    terminal = at_terminal("chat", folder / "endless", "--max-new-tokens", "4000", *options, cwd=tmp_path)
    terminal.wait_for("you>")
    terminal.type("hi\r")
    terminal.wait_for("two and three and One and two")
    terminal.type("\x03")
    said = terminal.wait_for("(stopped", "\nyou>")
    assert re.search(r"\n\(stopped; [\d,]+ tokens in", said)
    assert "^C" not in said
    terminal.type("never sent")
    terminal.wait_for("never sent", "never sent")
    terminal.type("\x03")
    terminal.wait_for("never sent", "\nyou>")
    terminal.say("/save talk.json")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"]
    assert messages[1]["content"].startswith("One and two and three and One and two and")
    assert terminal.leave() == 0


def test_what_is_typed_during_an_answer_waits_for_the_next_prompt(at_terminal: Opener, folder: Path) -> None:
    terminal = at_terminal("chat", "endless", "--max-new-tokens", "300", cwd=folder, columns=120)
    terminal.wait_for("you>")
    terminal.type("hi\r")
    terminal.wait_for("three and One")
    terminal.type("early\r")
    said = terminal.wait_for("you> early\nmodel>", "\nyou>")
    answer = " ".join(said.partition("model>")[2].partition("(")[0].split())
    assert answer == " ".join(["One and two and three and"] * 100)
    assert "cut at 300 tokens: --max-new-tokens allows more" in said
    assert terminal.leave() == 0


def test_a_model_that_never_saw_a_conversation_and_one_that_cannot_hold_any(tmp_path: Path) -> None:
    save_scripted_model(tmp_path / "base", ["no word"])
    tokenizer = SLMTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = None
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "base")
    assert "has no chat template, so it cannot hold a conversation" in refused("chat", "base", cwd=tmp_path)


def test_what_is_piped_is_a_transcript(folder: Path) -> None:
    lines = 'hi\n"""\nhow\nare you"""\n/help\n'
    done = slm("chat", "either", "--temperature", "0", cwd=folder, stdin=lines)
    assert done.returncode == 0, done.stderr
    _, first, *rest = done.stdout.splitlines()
    assert first == "you> hi"
    answer = rest[0].removeprefix("model> ")
    assert answer in ("It is a fox.", "It was an owl.")
    assert rest[1:5] == ['you> """', "...> how", '...> are you"""', f"model> {answer}"]
    assert "\x1b" not in done.stdout
