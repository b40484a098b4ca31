"""Arguments and options that several commands have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slmkit.data.sources.settings import SourceSettings

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="Values that replace the recipe's, by dotted key.")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the recipe with all its values, and stop.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name that `slm recipes` lists.")]
ModelPath = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model directory, a run (its best checkpoint) or OWNER/NAME on the hub."),
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, such as runs/book.")]
DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Temperature = Annotated[
    float | None,
    typer.Option(help="0: always the likeliest token; higher values: more varied. By default as the model advises."),
]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens only; 0: from all.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the likeliest tokens whose probabilities add up to this.")
]
MinP = Annotated[float | None, typer.Option(help="Leave out tokens less likely than this times the likeliest one.")]
TypicalP = Annotated[
    float | None,
    typer.Option(help="Sample from the most typical tokens whose probabilities add up to this; 1: from all."),
]
Penalty = Annotated[float | None, typer.Option(help="Above 1: tokens that occurred already become less likely.")]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Above 0: tokens of the new text become less likely, from their first occurrence.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Above 0: tokens of the new text become less likely with every occurrence.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text again.")]
OtherModels = Annotated[
    list[str] | None,
    typer.Option("--with", help="Average the probabilities with this model's; may be given several times."),
]

SourceOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--source", help="A setting of every source, such as text_column=body or split=test; may be repeated."
    ),
]
Precision = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]

# Defaults of sampling if neither the user nor the model sets them.
USUAL = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.0}


EXAMPLE = "Example: "


def new_app(about: str, *commands: Callable[..., None], **options: Any) -> typer.Typer:
    """A group of commands, named after their functions; without a command it prints its help.

    The first sentence of a command's docstring is shown in the list of commands, so it must be short. Lines that begin
    with `Example: ` are shown under the options, one per line, without wrapping.
    """
    app = typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None, **options)
    for command in commands:
        lines = (inspect.getdoc(command) or "").splitlines()
        about = "\n".join(line for line in lines if not line.startswith(EXAMPLE)).strip()
        examples = [f"  {line.removeprefix(EXAMPLE)}" for line in lines if line.startswith(EXAMPLE)]
        app.command(
            command.__name__.strip("_").replace("_", "-"),
            help=about,
            short_help=re.split(r"(?<=\.)\s", about, maxsplit=1)[0],
            epilog="\n".join(("\b", "Examples:" if len(examples) > 1 else "Example:", *examples)),
        )(command)
    return app


def sources_of(paths: list[str], overrides: list[str] | None) -> list[SourceSettings]:
    """Settings of all sources. Raises `UserError` if a file or folder does not exist."""
    from slmkit.config import load_settings
    from slmkit.data.sources import expect_source
    from slmkit.data.sources.settings import SourceSettings

    found = [load_settings(SourceSettings, {"path": path}, overrides or []) for path in paths]
    for one in found:
        expect_source(one)
    return found
