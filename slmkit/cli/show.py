"""Output helpers of several commands, and loading of a model."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from slmkit.config import UserError
from slmkit.training.logging.progress import bar_or_lines, clock

if TYPE_CHECKING:
    from slmkit.generation.ensemble import LanguageModel
    from slmkit.generation.sampling_settings import SamplingSettings
    from slmkit.tokenizer import SLMTokenizer

PLAIN_EVERY = 20_000  # documents between two plain lines
PLAIN_LINES = 10  # for a count with a known total
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.08
INDENT = "  "  # of a model's text, so that nothing in it looks like a prompt, which begins at the left edge
WIDEST_TEXT = 100  # columns
# Control characters (an escape sequence begins with one) as symbols; those that reverse the writing as U+FFFD.
VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421, 0x0D: None}
VISIBLE |= dict.fromkeys((*range(0x80, 0xA0), 0x202D, 0x202E), 0xFFFD)


class TerminalReporter:
    """Prints progress on stderr: one live line on a terminal, a few plain ones elsewhere. Under `torchrun` only on
    rank 0.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
        self.is_counting = False  # a live line is unfinished

    def say(self, line: str | Text) -> None:
        if self.is_counting:
            self.is_counting = False
            self.console.print()
        self.console.print(line, soft_wrap=True, markup=False)

    def warn(self, line: str) -> None:
        self.say(Text.assemble(("warning:", "yellow"), " ", line))

    def counter(self, label: str, total: int | None = None) -> Callable[[int, int, int], None]:
        """A callback for documents, tokens and bytes of text done; with a `total`, for rows."""
        shown, first, began = 0, -1, time.monotonic()
        every = max(1, total // PLAIN_LINES) if total else PLAIN_EVERY

        def update(documents: int, tokens: int, text_bytes: int) -> None:
            nonlocal shown, first, began
            if first < 0:  # rows done before a resume took no time in this process
                first, began = documents, time.monotonic()
            line = f"{label}: {counted(documents, 'document')}, {tokens:,} tokens"
            if total:
                line = f"{label}: {documents:,}/{total:,} rows, {tokens:,} tokens"
                if documents > first:
                    seconds = (time.monotonic() - began) / (documents - first) * (total - documents)
                    line += f", {clock(seconds)} left"
            if self.console.is_terminal:
                self.is_counting = True
                sys.stderr.write(f"\r{line}\x1b[K")
                sys.stderr.flush()
            elif documents - shown >= every or documents == total:
                shown = documents
                self.say(line)

        return update


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, elsewhere a plain line every few seconds.

    Gives a function of figures and of the share done (None if it is not known), for the time left, which is measured
    from the first share of each piece of work on; with the bytes done as `done_bytes` it also shows their rate.
    """
    began = shown = time.monotonic()
    start, last = (began, 0.0), 0.0  # when a piece of work had its first share, and that; the last share
    with bar_or_lines(label, Console(stderr=True)) as show_line:

        def show(figures: str, share: float | None = None, done_bytes: int | None = None) -> None:
            nonlocal shown, start, last
            now = time.monotonic()
            if done_bytes is not None:
                figures += f", {done_bytes / max(now - began, 1e-3) / 1e6:.1f} MB/s"
            if not share or not last or share < last:
                start = now, share or 0.0
            elif share > start[1]:
                figures += f", {clock((now - start[0]) * (1 - share) / (share - start[1]))} left"
            last = share or 0.0
            is_due = now - shown >= SECONDS_BETWEEN_LINES
            shown = now if is_due else shown
            show_line(figures, share, is_due)

        yield show


def counted(number: int, noun: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count(number: int) -> str:
    """1234567 → 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> None:
    """Print a table with columns as wide as their content; those named in `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    for row in (columns, *rows):
        cells = (one.rjust(size) if name in right else one.ljust(size) for name, one, size in zip(columns, row, widths))
        print("  ".join(cells).rstrip())


def suggestion(model: str | Path, source: str | Path | None = None) -> str:
    """A command to try the model. Its prompt is from the data of the run that made it, or made its `source`: a model
    that it was merged or copied from.
    """
    from slmkit.files.find import run_of
    from slmkit.training.recipe.recipe import load_recipe

    run = run_of(model if source is None else source)
    recipe = None if run is None else load_recipe(run / "recipe.yaml")
    prompts = (recipe.train.sample_prompts or [""]) if recipe else ["Once upon a time"]
    if recipe is None or recipe.reads == "text":
        return f"slm generate {model} {shlex.quote(prompts[0])}".removesuffix(" ''")
    return f"slm chat {model}" + (f"  (and ask it: {prompts[0]})" if prompts[0] else "")


def printable(text: str) -> str:
    """Text of a model or a file, safe to print: control characters but tabs and line ends become symbols."""
    return text.translate(VISIBLE)


class PlainText:
    """Prints a model's text piece by piece after a label. All its lines but the first are indented."""

    def __init__(self, label: str) -> None:
        print(label, end="")

    def add(self, piece: str) -> None:
        print(printable(piece).replace("\n", f"\n{INDENT}"), end="", flush=True)

    def close(self) -> None:
        print()


class MarkdownText:
    """Draws a model's growing Markdown below a label: finished blocks once, the last one again when it has grown.

    A drawing is one write that overwrites the changed lines without erasing them first, so nothing flickers. Of an
    unfinished block that is higher than the screen only the end is drawn until it is finished. HTML, references and
    entities are shown as they are written, and the target of a link beside it, so no text is hidden.
    """

    def __init__(self, console: Console, label: Text) -> None:
        from markdown_it import MarkdownIt

        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self._parser.disable(["reference", "entity", "image", "autolink"])
        self._console, self._rest = console, ""  # the text of the blocks that may still change
        self._is_begun, self._drawn = False, 0.0
        console.print(label)
        console.show_cursor(False)
        self._lines: list[str] = []  # on the screen, above the cursor, that may still change

    def add(self, piece: str) -> None:
        self._rest += printable(piece)
        if time.monotonic() - self._drawn >= SECONDS_BETWEEN_DRAWINGS:
            self._draw(self._first_open_line())

    def close(self) -> None:
        self._draw(self._rest.count("\n") + 1)
        self._console.show_cursor(True)

    def _first_open_line(self) -> int:
        """The line at which the last block begins; a line without its end may still change what the others are."""
        tokens = self._parser.parse(self._rest[: self._rest.rfind("\n") + 1])
        return max((token.map[0] for token in tokens if token.level == 0 and token.map), default=0)

    def _draw(self, first_open_line: int) -> None:
        lines = self._rest.split("\n")
        finished = self._rendered("\n".join(lines[:first_open_line]))
        self._is_begun |= bool(finished)
        self._rest = "\n".join(lines[first_open_line:])
        last = self._rendered(self._rest)[1 - self._console.height :]
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._lines, finished + last)))
        up = f"\r\x1b[{len(self._lines) - same}A" if len(self._lines) > same else "\r"
        # Without automatic wrapping, since a terminal may find a character wider than this library does.
        changed = "".join(f"{line}\x1b[K\n" for line in (finished + last)[same:])
        self._console.file.write(f"{up}\x1b[?7l{changed}\x1b[J\x1b[?7h")
        self._console.file.flush()
        self._lines, self._drawn = last, time.monotonic()

    def _rendered(self, text: str) -> list[str]:
        """The lines of a text, with an empty one before them if they follow others."""
        from rich.markdown import Markdown

        markdown = Markdown("", hyperlinks=False)
        markdown.parsed = self._parser.parse(text)
        for token in markdown.parsed:
            for child in token.children or []:
                if child.type == "softbreak":  # a poem keeps its lines
                    child.type = "hardbreak"
        with self._console.capture() as captured:
            self._console.print(markdown, width=min(self._console.width - len(INDENT) - 1, WIDEST_TEXT), end="")
        drawn = "\n".join((INDENT + line).rstrip() for line in captured.get().split("\n")).strip("\n")
        if not drawn:
            return []
        return ["", *drawn.split("\n")] if self._is_begun else drawn.split("\n")


def show_run(root: Path) -> None:
    """Print a run's folder and the next commands, at the end of commands that train."""
    print(f"run: {root}")
    print(f"next: {suggestion(root)}")


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def load_for_generation(path: str, device: str, others: Sequence[str] = ()) -> tuple[LanguageModel, SLMTokenizer]:
    """The model and tokenizer of a model directory, adapter or run, on `device`; with `others`, an ensemble of all.

    Raises `UserError` for a missing or damaged model, and if tokenizers differ.
    """
    from slmkit.files.find import find_model_directory

    directories = [find_model_directory(found) for found in (path, *others)]
    from slmkit.adapt.load import load_model  # after the model was found, since it imports torch
    from slmkit.device import find_device
    from slmkit.generation.ensemble import common_tokenizer, together

    tokenizer, where = common_tokenizer(directories), find_device(device).torch_device
    loaded = [load_model(directory, where) for directory in directories]
    tokenizer.use_generation_config(loaded[0][1].for_generation())
    return together([decoder for decoder, _ in loaded]), tokenizer


def open_model(
    model: str, others: list[str] | None, device: str, usual: dict[str, float], sampling: Mapping[str, Any]
) -> tuple[LanguageModel, SLMTokenizer, SamplingSettings, dict[str, Any]]:
    """The model with its tokenizer, how to sample from it, and its `generation_config.json`.

    `sampling` has the command's settings of sampling, None where one is not given.
    """
    from slmkit.files.find import find_model_directory
    from slmkit.generation.sampling_settings import SamplingSettings
    from slmkit.model.files.generation_config import read_generation_config

    directory = find_model_directory(model)
    try:
        settings = SamplingSettings.for_model(directory, usual=usual, **sampling)  # before the model is loaded
    except UserError as error:
        name, _, problem = str(error).partition(":")
        if sampling.get(name) is None:
            raise
        raise UserError(f"--{name.replace('_', '-')}:{problem}") from None
    return *load_for_generation(model, device, others or []), settings, read_generation_config(directory)
