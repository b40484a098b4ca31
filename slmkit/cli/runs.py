"""`slm runs`."""

from __future__ import annotations

from typing import Annotated

import typer


def runs(folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Where to look for runs.")] = "runs") -> None:
    """List runs, and how far each of them is.

    Example: slm runs runs/quickstart
    """
    from datetime import datetime

    from slmkit.cli.show import count, print_table
    from slmkit.training.overview import list_runs

    found = list_runs(folder)
    if not found:
        print(f"no runs in {folder}; `slm train` and `slm quickstart` make some")
        return
    print_table(
        ("run", "objective", "size", "steps", "loss", "changed", "state"),
        [
            (
                str(run.root),
                run.objective,
                "" if run.parameters is None else count(run.parameters),
                f"{run.step}" + (f"/{run.steps}" if run.steps and run.steps != run.step else ""),
                "" if run.validation_loss is None else f"{run.validation_loss:.3f}",
                datetime.fromtimestamp(run.changed).strftime("%m-%d %H:%M"),
                run.state,
            )
            for run in found
        ],
        right=("size", "steps", "loss"),
    )
    print("size: parameters; loss: the lowest validation loss")
