"""`slm bench train|decode|data`: how fast this machine is."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import DeviceName, Overrides, new_app

RECIPE = "A recipe file, a name that `slm recipes` lists, or a preset."
MODELS = "Presets, models or runs; default: quickstart."


def train(
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help=RECIPE)] = "quickstart",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=4, help="How many steps; they take at most some 20 seconds.")] = 20,
) -> None:
    """Measure how fast a recipe is trained here.

    Real optimizer steps of a new model on random tokens, beside what `slm plan --no-probe` says: the speed from that
    of large matrix products, the memory by arithmetic. MFU is the share of the speed of such products.

    Example: slm bench train own-text train.sequence_length=256 train.optimizer=muon
    Example: slm bench train smollm2-135m train.sequence_length=512
    """
    from slmkit.cli.show import count, gibibytes, print_table
    from slmkit.workflows.bench import training_speed

    speed = training_speed(recipe, overrides or [], steps)
    foretold, measured, train = speed.foretold.estimate, speed.measured, speed.foretold.recipe.train
    rows, length = train.rows_per_step(speed.foretold.length), speed.foretold.length
    print(
        f"{recipe}: {count(foretold.parameters)} parameters, {rows} rows of {length:,} tokens a step, {train.optimizer}"
    )
    table = (
        ("tokens/s", f"{measured.tokens_per_second:,.0f}", f"{foretold.tokens_per_second:,.0f}"),
        ("seconds a step", f"{measured.step_seconds:.3f}", f"{rows * length / foretold.tokens_per_second:.3f}"),
        ("memory", gibibytes(measured.memory_bytes), gibibytes(foretold.memory_bytes)),
        ("MFU", *(f"{speed.mfu(of.tokens_per_second):.0%}" for of in (measured, foretold))),
    )
    columns = ("", "measured", "foretold")
    print_table(columns, table, right=columns[1:])


def decode(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]", help=MODELS)] = None,
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
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 5,
) -> None:
    """Measure how fast data is prepared and loaded.

    Encoding, preparation, loading and resuming; medians.

    Example: slm bench data --megabytes 5 --rounds 2
    """
    from slmkit.workflows.bench import data_speed

    for name, figures in data_speed(megabytes, rounds):
        print(name)
        for figure, value in figures.items():
            print(f"  {figure:<34}{value:>24,.{2 if value < 1000 else 0}f}", flush=True)


app = new_app("Measure the speed of this machine.", train, decode, data, add_completion=False)
