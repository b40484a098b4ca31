"""`slm merge`."""

from __future__ import annotations

from typing import Annotated

import typer


def merge(
    recipe: Annotated[str, typer.Argument(help="A merge's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the recipe with every value, and stop.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compare the models, and stop before the merge.")] = False,
) -> None:
    """Make one model of several: linear, slerp, task_arithmetic, ties, dare_linear, dare_ties.

    Example: slm merge recipes/merging/ties.yaml models.0.model=runs/a models.1.model=runs/b output_dir=runs/both
    """
    from slmkit.api.merging import load_merge_recipe, prepare_merge, write_merge
    from slmkit.cli.progress import WritingProgress
    from slmkit.cli.show import count, gibibytes
    from slmkit.config import to_yaml

    loaded = load_merge_recipe(recipe, overrides or [])
    if print_config:
        print(to_yaml(loaded), end="")
        return
    prepared = prepare_merge(loaded)
    print(
        f"{loaded.merge_method} of {len(loaded.merged)} models: {count(prepared.parameters)} parameters, "
        f"{gibibytes(prepared.bytes)} in {str(prepared.dtype).removeprefix('torch.')}"
    )
    if dry_run:
        return
    with WritingProgress("merging", prepared.bytes) as progress:
        output = write_merge(prepared, progress)
    print(f"model: {output}")
    print(f"next: slm generate {output}")
