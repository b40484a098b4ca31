"""How good a model is: `slm eval`, `compare` and `report`."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from slmkit.cli.options import DeviceName, Precision, SourceOptions, sources_of


def eval_(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model directories, adapters or runs.")],
    data: Annotated[list[str], typer.Option("--data", "-d", help="A file, folder, URL or data set of the hub.")],
    source: SourceOptions = None,
    chat: Annotated[bool, typer.Option(help="The data is conversations; the assistant's turns are predicted.")] = False,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row; default: the model's longest, at most 2,048.")
    ] = None,
    device: DeviceName = "auto",
    precision: Precision = "auto",
) -> None:
    """Measure the loss of models on any text.

    Prints loss, perplexity and bits per byte. Models with different tokenizers can be compared by their bits per byte.

    Example: slm eval runs/book runs/book-2 --data other.txt
    """
    from slmkit.cli.show import TerminalReporter, print_table, progress_bar
    from slmkit.find import find_model_directory

    sources = sources_of(data, source)
    for model in models:
        find_model_directory(model)
    from slmkit.workflows.evaluation.evaluate import evaluate_text  # imports torch: after the arguments were checked

    reporter, rows = TerminalReporter(), []
    for model, one in itertools.product(models, sources):
        with progress_bar(f"{model} on {one.label}") as show:
            found = evaluate_text(
                model, one, chat=chat, length=length, device=device, precision=precision,
                progress=lambda done, rows: show(f"{done:,} of {rows:,} rows", done / rows),
            )  # fmt: skip
        for line in found.left_out:
            reporter.say(line)
        counts = (f"{number:,}" for number in (found.documents, found.report.tokens, found.length))
        losses = f"{found.report.loss:.4f}", f"{found.report.perplexity:.2f}", f"{found.bits_per_byte:.4f}"
        rows.append((model, one.label, *counts, *losses))
    columns = ("model", "data", "documents", "predicted tokens", "row", "loss (nats)", "perplexity", "bits per byte")
    print_table(columns, rows, right=columns[2:])
