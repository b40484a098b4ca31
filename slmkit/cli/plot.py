"""`slm plot`."""

from __future__ import annotations

from typing import Annotated

import typer


def plot(
    runs: Annotated[list[str], typer.Argument(help="Run directories, such as runs/book.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The picture to write.")] = "loss.png",
    over: Annotated[str, typer.Option(help="What losses are drawn over: tokens, time, steps.")] = "tokens",
) -> None:
    """Draw the losses of several runs over each other.

    Example: slm plot runs/book runs/book-2 --over time -o both.png
    """
    from pathlib import Path

    from slmkit.config import UserError, did_you_mean
    from slmkit.training.plots import KEYS, plot_runs

    if over not in KEYS:
        raise UserError(f"--over {over}: {did_you_mean(over, KEYS)}")
    path = Path(output if Path(output).suffix else f"{output}.png")
    plot_runs(runs, path, over)  # type: ignore[arg-type]
    print(path)
