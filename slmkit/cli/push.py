"""`slm push`."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import ModelPath


def push(
    model: ModelPath,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="What it is to be called on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is visible to you alone.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to publish on; else the main one.")] = None,
) -> None:
    """Publish a model on the Hugging Face hub.

    Its model card is made from the run.

    Example: slm push runs/book me/book --private
    """
    from slmkit.api.push import push_model

    page = push_model(model, name, private, revision)
    print(f"published: {page}")
    print(f"next: slm generate {name}{f'@{revision}' if revision else ''}")
