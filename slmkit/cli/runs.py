"""What is done with runs: `slm runs`, `plot`, `recipes` and `push`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from slmkit.cli.options import ModelPath

WHAT = "loss, reward, right (share of right answers), preferred (share of pairs) or eval/TASK/METRIC."
LICENSE = "Its licence, as the hub spells it (apache-2.0); default: the recipe's."


def runs(folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Where to look for runs.")] = "runs") -> None:
    """List runs, and how far each of them is.

    Example: slm runs runs/quickstart
    """
    from datetime import datetime

    from slmkit.cli.show import count, print_table
    from slmkit.training.logging.list_runs import list_runs

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


def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run directories, such as runs/book.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The picture: .png, .svg or .pdf.")] = "loss.png",
    over: Annotated[Literal["tokens", "time", "steps"], typer.Option(help="The horizontal axis.")] = "tokens",
    what: Annotated[str | None, typer.Option(help=WHAT)] = None,
) -> None:
    """Draw the losses of one or more runs into a picture.

    With --what also their rewards, their shares of right answers, or of pairs ranked correctly.

    Example: slm plot runs/book --over time -o book.png
    """
    from pathlib import Path

    from slmkit.config import UserError, did_you_mean
    from slmkit.training.logging.plots import CURVES, TASKS, plot_runs

    if what is not None and what not in CURVES and not what.startswith(TASKS):
        raise UserError(f"--what {what}: {did_you_mean(what, CURVES)}")
    path = Path(output if Path(output).suffix else f"{output}.png")
    plot_runs(runs, path, over, what)
    print(path)


def recipes() -> None:
    """List the recipes that come with slmkit.

    Each is a YAML file of the folder named below the list; values can be changed on the command line, or in a copy.

    Example: slm recipes
    """
    from slmkit.training.recipe.recipe import shipped_recipes

    folder = None
    for command, kind in (("train", ""), ("merge", "merging")):
        found = shipped_recipes(kind)
        print(f"slm {command} RECIPE, with RECIPE one of")
        width = max(map(len, found)) + 4
        for name, path in sorted(found.items()):
            about = path.read_text(encoding="utf-8").partition("\n")[0].strip("# :.")
            print(f"{f'  {name}':<{width}}{about}")
            folder = folder or path.parent
        print()
    print(f"folder: {folder}")
    print("every value of one: slm train RECIPE --print-config")


def push(
    model: ModelPath,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Its name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to publish on; default: main.")] = None,
    license: Annotated[str | None, typer.Option(help=LICENSE)] = None,
) -> None:
    """Publish a model on the Hugging Face hub.

    A model card is made from its run, unless the model has a README.md and no --license is given.

    Example: slm push runs/book me/book --private
    """
    from slmkit.cli.show import suggestion
    from slmkit.files.find import find_model_directory

    find_model_directory(model)
    from slmkit.workflows.push import push_model  # imports torch: after the arguments were checked

    page = push_model(model, name, private, revision, license)
    print(f"published: {page}")
    print(f"next: {suggestion(name + (f'@{revision}' if revision else ''), model)}")
