"""`slm push`."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import ModelPath


def push(
    model: ModelPath,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Its name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to publish on; default: main.")] = None,
) -> None:
    """Publish a model on the Hugging Face hub.

    A model card is made from its run.

    Example: slm push runs/book me/book --private
    """
    from slmkit.cli.show import suggestion
    from slmkit.find import find_model_directory

    find_model_directory(model)
    from slmkit.workflows.push import push_model  # imports torch: after the arguments were checked

    page = push_model(model, name, private, revision)
    print(f"published: {page}")
    print(f"next: {suggestion(name + (f'@{revision}' if revision else ''), model)}")
