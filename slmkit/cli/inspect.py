"""`slm inspect`."""

from __future__ import annotations

from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset, a model, a run, or OWNER/NAME of the hub.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a sequence; default: the model's context, at most 2048.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, muon or lion.")] = "adamw",
) -> None:
    """Say how large a model is, and what it needs.

    Parameters, operations a token, KV cache, and memory for training and for inference.

    Example: slm inspect llama-3.2-1b --batch 1 --length 8192
    """
    from slmkit.model.config import find_model_or_preset

    find_model_or_preset(model)  # before anything is loaded
    from slmkit.cli.show import count, gibibytes
    from slmkit.workflows.plan import inspect_model

    report = inspect_model(model, batch, length, precision, optimizer)
    print(f"{model}: {report.summary}\n")

    print("parameters")
    for name, n in report.parameters.items():
        print(f"  {name:<28}{n:>16,}  {n / report.parameter_count:6.1%}")
    print(f"  {'all':<28}{report.parameter_count:>16,}\n")

    print(f"operations a token, in rows of {report.length:,}")
    for name, n in report.operations.items():
        print(f"  {name:<28}{count(n):>16}")

    windows = f", and {report.window_bytes:,} a row for layers with a window" if report.window_bytes else ""
    print(f"\nKV cache, bytes a token in bfloat16{windows}")
    for name, n in report.cache_bytes.items():
        print(f"  {name:<28}{n:>16,}")
    print(f"  {f'one row of {report.length:,}':<28}{gibibytes(report.cache_of_a_row):>16}")

    print(f"\nmemory, {batch} × {report.length:,} tokens at once, products in {report.compute_dtype}")
    for name, n in report.memory.items():
        print(f"  {name:<28}{gibibytes(n):>16}")
