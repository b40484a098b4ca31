"""`slm bench train|decode|data`: how fast this machine is."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import DeviceName, new_app


def train(
    presets: Annotated[list[str] | None, typer.Argument(metavar="[PRESET]", help="Default: quickstart.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    tokens_per_step: Annotated[int, typer.Option(min=2, help="Tokens of an optimizer step.")] = 8192,
    steps: Annotated[int, typer.Option(min=4, help="How many steps; one preset takes at most a minute.")] = 20,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, muon or lion.")] = "adamw",
    device: DeviceName = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Measure how fast models are trained.

    Real optimizer steps of new models on random tokens. MFU is the share of the speed of large matrix products here.

    Example: slm bench train quickstart smollm2-135m --length 512
    """
    from slmkit.cli.show import gibibytes, print_table
    from slmkit.config import load_settings
    from slmkit.training.recipe.recipe import TrainSettings

    values = {
        "sequence_length": length, "tokens_per_step": tokens_per_step, "optimizer": optimizer, "device": device,
        "precision": precision,
    }  # fmt: skip
    settings = load_settings(TrainSettings, values, origin="slm bench train")
    from slmkit.workflows.bench import training_speed

    rows = []
    for preset in presets or ["quickstart"]:
        speed = training_speed(preset, settings, steps)
        of_step = speed.measured
        rows.append(
            (
                preset, f"{speed.parameters:,}", f"{of_step.tokens_per_second:,.0f}", f"{of_step.step_seconds:.3f}",
                f"{speed.mfu:.0%}", gibibytes(of_step.memory_bytes),
            )
        )  # fmt: skip
    columns = ("model", "parameters", "tokens/s", "seconds a step", "MFU", "memory")
    print_table(columns, rows, right=columns[1:])


def decode(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]", help="Presets, models or runs; default: quickstart.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    device: DeviceName = "auto",
) -> None:
    """Measure how fast models generate.

    Greedy decoding of 1, 4 and 16 sequences at once, the weights as they are and rounded to 8 and 4 bits. The limit
    is this machine's own: new tokens/s if a step took only as long as reading the weights. A preset has random ones.

    Example: slm bench decode quickstart smollm2-135m --new 32
    """
    from slmkit.workflows.bench import decoding_speed

    models = models or ["quickstart"]
    columns = ("model", "weights", "batch", "prompt tokens/s", "new tokens/s", "limit", "reached")
    line = f"{{:<{max(map(len, ('model', *models)))}}}  {{:<8}}  {{:>5}}  {{:>15}}  {{:>12}}  {{:>11}}  {{:>7}}"
    found = ((model, speed) for model in models for speed in decoding_speed(model, prompt, new, rounds, device))
    for number, (model, s) in enumerate(found):
        if number == 0:
            print(line.format(*columns))
        figures = (f"{s.prompt:,.0f}", f"{s.new:,.1f}", f"{s.limit:,.0f}", f"{s.reached:.0%}")
        print(line.format(model, s.weights, s.batch, *figures), flush=True)


def data(
    megabytes: Annotated[float, typer.Option(help="How much built-in text to encode.")] = 20,
    gigabytes: Annotated[
        float, typer.Option(help="Size of the shards to read from; they take no room on the disk.")
    ] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 5,
) -> None:
    """Measure how fast data is prepared and loaded.

    Encoding, preparation, loading, resuming, and the time to the first batch; medians.

    Example: slm bench data --megabytes 5 --gigabytes 1 --rounds 2
    """
    from slmkit.workflows.bench import data_speed

    for name, figures in data_speed(megabytes, gigabytes, rounds):
        print(name)
        for figure, value in figures.items():
            print(f"  {figure:<34}{value:>24,.{2 if value < 1000 else 0}f}", flush=True)


app = new_app("Measure the speed of this machine.", train, decode, data, add_completion=False)
