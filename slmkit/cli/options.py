"""Arguments and options that several commands have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slmkit.data.sources.settings import SourceSettings

Options = Mapping[str, tuple[Any, Any]]  # name → annotation, such as `Annotated[int, typer.Option(…)]`, and default


def with_options(options: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command, for options that it shares with others: it gets them as keywords."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return command

    return decorate


KEYS = "Values that replace the recipe's, by dotted key."
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help=KEYS)]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the recipe with all its values, and stop.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name that `slm recipes` lists.")]
MODEL = "A model directory, a run (its best checkpoint) or OWNER/NAME on the hub."
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, such as runs/book.")]
DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
OTHER_MODELS = "Average the probabilities with this model's; may be given several times."
OtherModels = Annotated[list[str] | None, typer.Option("--with", help=OTHER_MODELS)]
SOURCE = "A setting of every source, such as text_column=body or split=test; may be repeated."
SourceOptions = Annotated[list[str] | None, typer.Option("--source", help=SOURCE)]
Precision = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]

# An option for each setting of sampling; None where it is not given.
SAMPLING: Options = {
    name: (Annotated[kind | None, typer.Option(help=about)], None)
    for name, kind, about in (
        ("temperature", float, "0: always the likeliest token; higher: more varied. By default as the model advises."),
        ("top_k", int, "Sample from the k likeliest tokens only; 0: from all."),
        ("top_p", float, "Sample from the likeliest tokens whose probabilities add up to this."),
        ("min_p", float, "Leave out tokens less likely than this times the likeliest one."),
        ("typical_p", float, "Sample from the most typical tokens whose probabilities add up to this; 1: from all."),
        ("repetition_penalty", float, "Above 1: tokens that occurred already become less likely."),
        ("presence_penalty", float, "Above 0: tokens of the new text become less likely, from their first occurrence."),
        ("frequency_penalty", float, "Above 0: tokens of the new text become less likely with every occurrence."),
        ("seed", int, "The same seed gives the same text again."),
    )
}
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


def sources_of(paths: Sequence[str | dict[str, Any]], overrides: list[str] | None) -> list[SourceSettings]:
    """Settings of all sources, given by path or settings. Raises `UserError` if a file or folder does not exist."""
    from slmkit.config import load_settings
    from slmkit.data.sources import expect_source
    from slmkit.data.sources.settings import SourceSettings

    given = [{"path": path} if isinstance(path, str) else path for path in paths]
    found = [load_settings(SourceSettings, one, overrides or []) for one in given]
    for one in found:
        expect_source(one)
    return found
