"""`slm merge`."""

from __future__ import annotations

from typing import Annotated

import typer


def merge(
    model: Annotated[str, typer.Argument(help="A model directory, or a run (its best checkpoint).")],
    adapter: Annotated[
        list[str], typer.Option("--adapter", help="A LoRA adapter, or a run of one; may be given several times.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where to write the model; else beside MODEL, as MODEL-merged.")
    ] = None,
) -> None:
    """Fold adapters into their model, which then needs them no more: the same logits, in full precision.

    Example: slm merge runs/book --adapter runs/book-chat -o book-chat
    """
    from slmkit.api.folding import fold_adapters

    directory = fold_adapters(model, adapter, output)
    print(f"model: {directory}")
    print(f"next: slm generate {directory}")
