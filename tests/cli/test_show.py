"""What the long functions say of how far they are, and how a model's text is drawn."""

from __future__ import annotations

import random
import re

import pytest
from rich.console import Console
from rich.text import Text

from slmkit.cli import show
from slmkit.cli.show import MarkdownText, TerminalReporter, printable
from tests.cli.terminal import Screen


def test_a_count_of_a_known_total_is_told_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    update = TerminalReporter().counter("reference", 1_000)
    for rows in range(16, 1_000, 16):
        update(rows, rows * 100, 0)
    update(1_000, 100_000, 0)
    lines = capsys.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 11  # a tenth each: not all 63
    assert lines[0] == "reference: 112/1,000 rows, 11,200 tokens, 0:00 left"
    assert lines[-1].startswith("reference: 1,000/1,000 rows, 100,000 tokens")


def test_without_a_total_few_documents_are_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    update = TerminalReporter().counter("tokenizing")
    update(19_999, 5, 5)
    update(20_000, 6, 6)
    assert capsys.readouterr().err == "tokenizing: 20,000 documents, 6 tokens\n"


def test_the_time_left_is_that_of_the_piece_of_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model was loaded for 100 s, and another task took 400 s: neither says how fast this one is."""
    now = iter((0.0, 10.0, 100.0, 120.0, 500.0, 530.0, 560.0))
    monkeypatch.setattr(show.time, "monotonic", lambda: next(now))
    with show.progress_bar("model") as told:
        for figures, share in (("reads", None), ("a", 0.1), ("a", 0.2), ("b", 0.1), ("b", 0.4), ("b", 0.7)):
            told(figures, share)
    lines = ["reads", "a", "a, 2:40 left", "b", "b, 1:00 left", "b, 0:30 left"]
    assert capsys.readouterr().err.splitlines() == [f"model: {line}" for line in lines]


# -- a model's text ---------------------------------------------------------------------------------------------------

WORDS = ("fox", "kite", "hill", "owl", "drum", "hen", "hat", "river", "stone", "lamp")
WORD = re.compile(rf"(?:{'|'.join(WORDS)})\d\d")
BLOCKS = (
    "# {0} {1}\n\n", "{0} {1}\n{2} *{3}* {4}\n\n", "{0} **{1}** `{2}`\n{3}\n---\n", "- {0}\n- {1}\n  - {2}\n\n",
    "{0}\n#tag {1}\n\n", "1. {0}\n\n2. {1}\n\n", "```\n{0}\n\n  {1}\n```\n", "> {0}\n> {1}\n\n{2}\n",
    "| {0} | {1} |\n|---|---|\n| {2} | {3} |\n\n", "<b>{0}</b>\n<div>\n{1}\n</div>\n\n", "[{0}]: http://{1}.example\n\n",
    "[{0}](http://{1}.example) ![{2}](x)\n\n", "&lt;{0}&#27; {1}\n\n", "    {0}\n    {1}\n\n", "***\n",
    "~~~python\n{0} = '{1}'\n", "{0} {1} {2} {3} {4} {0} {1} {2} {3} {4} {0} {1} {2} {3} {4}\n\n",
)  # fmt: skip


class ScreenFile:
    """A terminal for what is written to it; after each write it notes what the screen shows."""

    encoding = "utf-8"

    def __init__(self, columns: int, rows: int) -> None:
        self.screen, self.seen = Screen(columns, rows), [""]

    def write(self, text: str) -> None:
        self.screen.feed(text.replace("\n", "\r\n").encode())
        self.seen.append(self.screen.text)

    def flush(self) -> None:
        pass


def drawn(pieces: list[str], monkeypatch: pytest.MonkeyPatch, columns: int = 40, rows: int = 6) -> ScreenFile:
    monkeypatch.setattr(show, "SECONDS_BETWEEN_DRAWINGS", 0)
    file = ScreenFile(columns, rows)
    console = Console(file=file, force_terminal=True, width=columns, height=rows, color_system="256")
    text = MarkdownText(console, Text("model>"))
    for piece in pieces:
        text.add(piece)
    text.close()
    console.print("(end)")
    return file


@pytest.mark.parametrize("seed", range(8))
def test_markdown_in_any_pieces_ends_as_in_one_and_never_flickers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    text = "".join(
        draw.choice(BLOCKS).format(*(f"{draw.choice(WORDS)}{number}{place}" for place in range(5)))
        for number in range(draw.randint(1, 9))
    )
    cuts = sorted(draw.sample(range(len(text)), k=min(len(text), draw.randint(1, 60))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    whole = drawn([text], monkeypatch, rows=100).screen.text
    assert sorted(WORD.findall(re.sub(r"\n +", "", whole))) == sorted(WORD.findall(text)), "a word is lost"
    high, low = drawn(pieces, monkeypatch, rows=100), drawn(pieces, monkeypatch)
    for file in (high, low):  # rich puts an empty line more or less between blocks
        assert re.sub(r"\n\n+", "\n", file.screen.text) == re.sub(r"\n\n+", "\n", whole)
    shown = set[str]()
    for seen in high.seen:
        assert shown <= set(WORD.findall(seen)), "a word that was there is gone"
        shown = set(WORD.findall(seen))


def test_a_list_higher_than_the_screen_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tenth item shifts all numbers, those that have left the screen too."""
    screen = drawn(list("".join(f"1. fox{number:02d}\n" for number in range(30))), monkeypatch).screen
    assert WORD.findall(screen.text) == [f"fox{number:02d}" for number in range(30)]


def test_control_characters_are_symbols_and_writing_is_kept() -> None:
    assert printable("a\x1b[31m\x07\x7f\x9b\r\n\tb\u202e") == "a␛[31m␇␡\ufffd\n\tb\ufffd"
    kept = "שלום \u200fא\u200e 你好 👨\u200d👩\u200d👧 e\u0301\n"
    assert printable(kept) == kept
