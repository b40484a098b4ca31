"""`slm quantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import ModelPath


def quantize(
    model: ModelPath,
    to: Annotated[
        list[str], typer.Option("--to", help="int8, int4 or nf4; several make several directories, in one table.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where the result goes; default: MODEL-int4 and so on.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Weights with one scale: 32, 64 or 128; default: 32, for nf4 64.")
    ] = None,
    embedding: Annotated[
        str, typer.Option(help="bfloat16, or int8: smaller and faster, and only slmkit reads the result.")
    ] = "bfloat16",
    method: Annotated[
        str, typer.Option(help="For 4 bits: gptq, unless rounding is better on held-out text; or round.")
    ] = "gptq",
    calibration: Annotated[
        str, typer.Option(help="Text like what the model will write: a file, folder, URL, or the built-in stories.")
    ] = "stories",
    text: Annotated[
        str | None, typer.Option(help="Text for the perplexity; default: calibration text that was held out.")
    ] = None,
) -> None:
    """Make a model smaller: weights of 8 or 4 bits.

    Writes a model directory that all commands read, and transformers where it has the format; prints size, bits a
    weight, perplexity, speed, and the share of greedy tokens that stay the same, beside those of the original.

    Example: slm quantize runs/book --to int8 --to int4 --calibration book.txt
    """
    from slmkit.cli.show import print_table, progress_bar, suggestion
    from slmkit.find import find_model_directory

    find_model_directory(model)
    from slmkit.workflows.quantize import RESULTS, Request, quantize_model  # imports torch: after the model was found

    request = Request(to, output, group, embedding, method, calibration, text)
    with progress_bar("quantize") as show:
        found = quantize_model(model, request, lambda line: show(line, None))
    rows = [
        (
            one.name, one.method or "-", f"{one.bytes / 1e6:,.1f}", f"{one.bits:.2f}", f"{one.perplexity:.3f}",
            f"{one.tokens_per_second:,.0f}", f"{one.agreement:.1%}",
        )
        for one in found
    ]  # fmt: skip
    columns = ("model", "method", "MB", "bits a weight", "perplexity", "tokens/s", "same tokens")
    print_table(columns, rows, right=columns[2:])
    for one in found[1:]:
        print(f"{one.directory}: {'; '.join(one.notes)}; figures: {RESULTS}")
    print(f"next: {suggestion(found[-1].directory, model)}")
