"""`slm plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slmkit.training.planning import Outlook


def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of one that comes with slmkit; none: propose one.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…")] = None,
    hours: Annotated[float | None, typer.Option(min=0.01, help="Without a recipe: how long it may take.")] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1e4, help="Without a recipe: how much text to learn from.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    measure: Annotated[bool, typer.Option("--probe/--no-probe", help="Train 20 real steps to know the speed.")] = True,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Write the proposed recipe to this file.")
    ] = None,
) -> None:
    """Say whether a run fits, how long it takes, how much disk, and what loss to expect; or propose one.

    Example: slm plan --hours 2 -o mine.yaml
    Example: slm plan own-text data.source=book.txt model.hidden_size=384
    """
    from pathlib import Path

    from slmkit.api.planning import plan_recipe
    from slmkit.cli.show import TerminalReporter
    from slmkit.config import UserError, to_yaml
    from slmkit.training.planning import propose
    from slmkit.training.recipe import find_recipe, load_recipe

    if recipe is not None and (hours is not None or tokens is not None or output is not None):
        raise UserError("--hours, --tokens and --output are for a proposal: leave the recipe out, or them")
    if recipe is None:
        ahead = propose(hours, None if tokens is None else int(tokens), device, measure)
    else:
        values = [f"train.device={device}", *(overrides or [])]
        ahead = plan_recipe(load_recipe(find_recipe(recipe), values, TerminalReporter().say), measure)
    _show(ahead)
    if output is not None:
        Path(output).write_text(to_yaml(ahead.recipe), encoding="utf-8")
        print(f"\nrecipe: {output}; next: slm train {output} data.source=YOUR.txt")


def _show(ahead: Outlook) -> None:
    from slmkit.cli.show import count, gibibytes
    from slmkit.training.progress import clock

    expected, train = ahead.ahead, ahead.recipe.train
    config, described = ahead.config, ahead.device.describe()
    length = train.sequence_length or config.max_position_embeddings
    speed = f"{expected.tokens_per_second:,.0f} tokens/s"
    if ahead.measured is not None:
        speed += f", measured in {ahead.measured.steps} steps (by rule of thumb {ahead.guessed_rate:,.0f})"
    else:
        speed += ", by rule of thumb"
    lines = {
        "model": f"{count(expected.parameters)} parameters: {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{config.vocab_size:,} tokens, rows of {length:,}",
        "steps": f"{expected.steps:,} of {train.rows_per_step(length) * length:,}: {count(expected.tokens)} tokens",
        "learning rate": f"{train.learning_rate:g}, {train.optimizer}",
        "device": f"{described['device']}, {described['device_name']}, {described['compute_dtype']}",
        "speed": speed,
        "time": clock(expected.seconds),
        "memory": _of(expected.memory_bytes, ahead.memory_free),
        "disk": _of(expected.disk_bytes, ahead.disk_free),
        "loss": "no law says" if expected.loss is None else f"about {expected.loss:.2f} nats a token",
    }
    if expected.trained < expected.parameters:
        lines["model"] += f"; {count(expected.trained)} of an adapter are trained"
    if expected.beside:
        lines["model"] += f"; beside a model of {count(expected.beside)} that reads"
    if ahead.measured is not None:
        lines["memory"] += f"; {gibibytes(ahead.measured.memory_bytes)} measured in the steps"
    for name, value in lines.items():
        print(f"{name:<15}{value}")
    print("\nassuming")
    for assumption in ahead.assumptions:
        print(f"  {assumption}")
    if not ahead.fits:
        print(
            "\nit does not fit: lower train.micro_batch_tokens, set train.gradient_checkpointing=1, or a smaller model"
        )


def _of(needed: int, free: int) -> str:
    from slmkit.cli.show import gibibytes

    return gibibytes(needed) + (f" of {gibibytes(free)} free" if free else "")
