"""`slm plot`."""

from __future__ import annotations

from typing import Annotated

import typer


def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run directories, such as runs/book.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The picture to write: .png, .svg or .pdf.")
    ] = "loss.png",
    over: Annotated[str, typer.Option(help="The horizontal axis: tokens, time or steps.")] = "tokens",
    what: Annotated[
        str | None, typer.Option(help="loss, reward, right (share of right answers) or preferred (share of pairs).")
    ] = None,
) -> None:
    """Draw the losses of one or more runs into a picture.

    With --what also their rewards, their shares of right answers, or of pairs told apart.

    Example: slm plot runs/book --over time -o book.png
    """
    from pathlib import Path

    from slmkit.config import UserError, did_you_mean
    from slmkit.training.plots import CURVES, KEYS, plot_runs

    if over not in KEYS:
        raise UserError(f"--over {over}: {did_you_mean(over, KEYS)}")
    if what is not None and what not in CURVES:
        raise UserError(f"--what {what}: {did_you_mean(what, CURVES)}")
    path = Path(output if Path(output).suffix else f"{output}.png")
    plot_runs(runs, path, over, what)  # type: ignore[arg-type]
    print(path)
