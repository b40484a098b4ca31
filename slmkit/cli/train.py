"""`slm train` and `slm resume`."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that comes with slmkit.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the recipe with every value, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Prepare everything, and stop before the first step.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Train in spite of what the x-ray finds.")] = False,
) -> None:
    """Pretrain or fine-tune: the recipe's `objective` says which.

    Example: slm train own-text data.source=book.txt output_dir=runs/book train.max_tokens=3e6
    """
    from slmkit.config import to_yaml
    from slmkit.training.recipe import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe), overrides or [])
    if print_config:
        print(to_yaml(loaded), end="")
        return
    from slmkit.api import train_recipe
    from slmkit.cli.show import TerminalReporter

    run = train_recipe(loaded, TerminalReporter(), dry_run=dry_run, force=force)
    if not dry_run:
        print(f"run: {run.root}")
        verb = "chat" if loaded.objective == "sft" else "generate"
        print(f"next: slm {verb} {run.root}")


def resume(run: Annotated[str, typer.Argument(help="A run directory, such as runs/book.")]) -> None:
    """Go on with a run that was stopped or killed, from its newest complete checkpoint.

    Example: slm resume runs/book
    """
    from slmkit.api import resume_run
    from slmkit.cli.show import TerminalReporter

    print(f"run: {resume_run(run, TerminalReporter()).root}")
