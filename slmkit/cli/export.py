"""Models for other programs: `slm export` and `slm verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import ModelPath


def export(
    model: ModelPath,
    to: Annotated[str, typer.Option("--to", help="hf.")],
    kind: Annotated[
        str | None, typer.Option("--type", help="How weights are stored, such as Q4_K_M, int8 or bfloat16.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where the result goes; default: a name beside the model.")
    ] = None,
    shard: Annotated[float, typer.Option(min=0.001, help="Gigabytes of a file of weights, at most; for hf.")] = 5.0,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Allow other types for tensors whose rows do not divide; for gguf.")
    ] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Write it also if the program that would check it is not installed.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
) -> None:
    """Write a model for another program, and prove that it is the same there.

    The result is opened in that program. Only if it reads the same ids, renders the same chat prompts and predicts the
    same, within the bounds of its precision, does it get its name. Figures are in parity.json beside it.

    Example: slm export runs/book --to hf --type bfloat16
    """
    from slmkit.cli.show import progress_bar
    from slmkit.find import find_model_directory

    find_model_directory(model)
    from slmkit.workflows.export import Request, figures_of
    from slmkit.workflows.export import export as export_model

    request = Request(to, output, kind, unverified, allow_fallback, overwrite, shard)
    with progress_bar("export") as show:
        done = export_model(model, request, lambda line: show(line, None))
    print(f"{to}: {done.path}")
    print(f"compared: {figures_of(done.parity) if done.parity else 'no: the program is not installed'}; {done.record}")
