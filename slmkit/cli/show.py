"""Output helpers of several commands, and loading of a model."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from slmkit.training.logging.progress import bar_or_lines, clock

if TYPE_CHECKING:
    from slmkit.generation.ensemble import LanguageModel
    from slmkit.tokenizer import SLMTokenizer

PLAIN_EVERY = 20_000  # documents between two plain lines
PLAIN_LINES = 10  # for a count with a known total
SECONDS_BETWEEN_LINES = 10.0


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

    Gives a function of figures and of the share done (None if it is not known), for the time left; with the bytes done
    as `done_bytes` it also shows their rate.
    """
    began = shown = time.monotonic()
    with bar_or_lines(label, Console(stderr=True)) as show_line:

        def show(figures: str, share: float | None, done_bytes: int | None = None) -> None:
            nonlocal shown
            now = time.monotonic()
            if done_bytes is not None:
                figures += f", {done_bytes / max(now - began, 1e-3) / 1e6:.1f} MB/s"
            if share:
                figures += f", {clock((now - began) * (1 - share) / share)} left"
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
        cells = (
            cell.rjust(width) if name in right else cell.ljust(width) for name, cell, width in zip(columns, row, widths)
        )
        print("  ".join(cells).rstrip())


def suggestion(model: str | Path, source: str | Path | None = None) -> str:
    """A command to try the model. Its prompt is from the data of the run that made it, or made its `source`: a model
    that it was merged or copied from.
    """
    from slmkit.find import run_of
    from slmkit.training.recipe.recipe import load_recipe

    run = run_of(model if source is None else source)
    recipe = None if run is None else load_recipe(run / "recipe.yaml")
    prompts = (recipe.train.sample_prompts or [""]) if recipe else ["Once upon a time"]
    if recipe is None or recipe.reads == "text":
        return f"slm generate {model} {shlex.quote(prompts[0])}".removesuffix(" ''")
    return f"slm chat {model}" + (f"  (and ask it: {prompts[0]})" if prompts[0] else "")


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
    from slmkit.find import find_model_directory

    directories = [find_model_directory(found) for found in (path, *others)]
    from slmkit.adapt.load import load_model  # after the model was found, since it imports torch
    from slmkit.device import find_device
    from slmkit.generation.ensemble import common_tokenizer, together

    tokenizer, where = common_tokenizer(directories), find_device(device).torch_device
    loaded = [load_model(directory, where) for directory in directories]
    tokenizer.use_generation_config(loaded[0][1].for_generation())
    return together([decoder for decoder, _ in loaded]), tokenizer
