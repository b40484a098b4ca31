"""`slm merge`: several models into one, or adapters into their model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slmkit.cli.options import Overrides, PrintConfig


def merge(
    what: Annotated[
        str,
        typer.Argument(metavar="RECIPE_OR_MODEL", help="The YAML file of a merge; with --adapter, a model or a run."),
    ],
    overrides: Overrides = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", help="Merge this adapter, or a run that trained one, into MODEL; may be given several times."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="With --adapter: where the result goes; default: MODEL-merged.")
    ] = None,
    print_config: PrintConfig = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check that the models fit together, and stop.")] = False,
) -> None:
    """Make one model of several, or merge adapters into a model.

    A recipe names the models and the method: linear, slerp, task_arithmetic, ties, dare_linear or dare_ties. `ties`
    comes with slmkit; its file, recipes/merging/ties.yaml, explains every key.

    Example: slm merge ties base_model=runs/book models.0.model=runs/chat-a models.1.model=runs/chat-b
    Example: slm merge runs/book --adapter runs/book-lora -o runs/book-whole
    """
    from slmkit.config import UserError

    if adapter and (overrides or print_config or dry_run):
        raise UserError("--adapter: KEY=VALUE, --print-config and --dry-run apply to merge recipes only")
    if adapter:
        _merge_adapters(what, adapter, output)
    elif output is not None:
        raise UserError("--output is for --adapter; for a recipe set output_dir")
    else:
        _merge(what, overrides or [], print_config, dry_run)


def _merge_adapters(model: str, adapters: list[str], output: str | None) -> None:
    from slmkit.cli.show import suggestion
    from slmkit.find import find_model_directory
    from slmkit.model.files.adapter_directory import find_adapter

    find_model_directory(model)
    for adapter in adapters:
        find_adapter(adapter)
    from slmkit.workflows.merge import merge_adapters  # imports torch: after the arguments were checked

    directory = merge_adapters(model, adapters, output)
    print(f"model: {directory}")
    print(f"next: {suggestion(directory, adapters[-1])}")


def _merge(recipe: str, overrides: list[str], print_config: bool, dry_run: bool) -> None:
    from slmkit.adapt.merge_recipe import load_merge_recipe
    from slmkit.config import to_yaml
    from slmkit.find import find_model_directory
    from slmkit.training.recipe.recipe import find_recipe

    loaded = load_merge_recipe(recipe if Path(recipe).exists() else find_recipe(recipe, "merging"), overrides)
    if print_config:
        print(to_yaml(loaded), end="")
        return
    for name in loaded.names:
        find_model_directory(name)
    from slmkit.cli.show import count, gibibytes, progress_bar, suggestion
    from slmkit.workflows.merge import prepare_merge, write_merge

    prepared = prepare_merge(loaded)
    print(
        f"{loaded.merge_method} of {len(loaded.merged)} models: {count(prepared.parameters)} parameters, "
        f"{gibibytes(prepared.bytes)} in {str(prepared.dtype).removeprefix('torch.')}"
    )
    if dry_run:
        return
    size = prepared.bytes
    with progress_bar("merging") as show:
        output = write_merge(
            prepared,
            lambda written: show(f"{written / 1e6:,.0f} of {size / 1e6:,.0f} MB", written / size, written),
        )
    print(f"model: {output}")
    print(f"next: {suggestion(output, loaded.merged[0].model)}")
