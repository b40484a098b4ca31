"""How a command's docstring becomes its help: what it does, and examples that can be copied as they stand."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import typer

EXAMPLE = "Example: "


def new_app(about: str, **options: Any) -> typer.Typer:
    """A group of commands; alone it prints its help."""
    return typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None, **options)


def add_command(app: typer.Typer, name: str, command: Callable[..., None]) -> None:
    """The docstring's first sentence is the command's line in the list of commands, so it must be short.

    Lines that begin with `Example: ` are shown under the options, one a line, whatever their length.
    """
    lines = (inspect.getdoc(command) or "").splitlines()
    about = "\n".join(line for line in lines if not line.startswith(EXAMPLE)).strip()
    examples = [f"  {line.removeprefix(EXAMPLE)}" for line in lines if line.startswith(EXAMPLE)]
    app.command(
        name,
        help=about,
        short_help=re.split(r"(?<=\.)\s", about, maxsplit=1)[0],
        epilog="\n".join(("\b", "Examples:" if len(examples) > 1 else "Example:", *examples)),
    )(command)
