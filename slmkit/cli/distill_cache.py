"""`slm distill-cache`."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import Overrides


def distill_cache(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A recipe of objective distill: a file, or a name that `slm recipes` lists."
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Store a teacher's predictions for `slm train` to learn from.

    The likeliest tokens of each position go to the folder that `distillation.cache` names; training reads them from
    there and needs no teacher in memory. If it was stopped, the same command goes on.

    Example: slm distill-cache quickstart-distill distillation.cache=runs/taught
    """
    from slmkit.cli.show import TerminalReporter
    from slmkit.training.recipe import find_recipe, load_recipe
    from slmkit.training.recipe_checks import expect_ready

    reporter = TerminalReporter()
    loaded = load_recipe(find_recipe(recipe), overrides or [], reporter.say)
    expect_ready(loaded)
    from slmkit.api.distill_cache import cache_teacher

    stored = cache_teacher(loaded, reporter)
    assert loaded.distillation is not None
    print(f"{loaded.distillation.cache}: the {stored.k} likeliest tokens of each position, in {stored.rows:,} rows")
    print(f"next: slm train {recipe} {' '.join(overrides or [])}".rstrip())
