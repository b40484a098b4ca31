"""`slm distill-cache`."""

from __future__ import annotations

from typing import Annotated

import typer


def distill_cache(
    recipe: Annotated[str, typer.Argument(help="A recipe of objective distill, or the name of one that is shipped.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…")] = None,
) -> None:
    """Ask a recipe's teacher once, and store its likeliest tokens: training with them needs no teacher in memory.

    It goes to `distillation.cache`, which `slm train` reads then. The same command goes on where it was stopped.

    Example: slm distill-cache quickstart-distill distillation.cache=runs/taught
    """
    from slmkit.api.distill_cache import cache_teacher
    from slmkit.cli.show import TerminalReporter
    from slmkit.training.recipe import find_recipe, load_recipe

    reporter = TerminalReporter()
    loaded = load_recipe(find_recipe(recipe), overrides or [], reporter.say)
    stored = cache_teacher(loaded, reporter)
    assert loaded.distillation is not None
    print(f"{loaded.distillation.cache}: the {stored.k} likeliest tokens of each position, in {stored.rows:,} rows")
    print(f"next: slm train {recipe} {' '.join(overrides or [])}".rstrip())
