"""`slm plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from slmkit.cli.options import DeviceName, Overrides

if TYPE_CHECKING:
    from slmkit.training.estimate.cluster import ClusterEstimate
    from slmkit.workflows.plan import RunEstimate

RECIPE = "A recipe file, or a name that `slm recipes` lists; none: propose one."
PROBE = "Measure the speed in a few training steps, or estimate it."


def plan(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help=RECIPE)] = None,
    overrides: Overrides = None,
    hours: Annotated[float | None, typer.Option(min=0.01, help="Without a recipe: hours of training.")] = None,
    tokens: Annotated[float | None, typer.Option(min=1e4, help="Without a recipe: tokens to train on.")] = None,
    device: DeviceName = "auto",
    measure: Annotated[bool, typer.Option("--probe/--no-probe", help=PROBE)] = True,
    output: Annotated[str | None, typer.Option("--output", "-o", help="A file for the proposed recipe.")] = None,
    gpus: Annotated[int | None, typer.Option(min=2, help="Plan a step on this number of GPUs, with FSDP.")] = None,
    gpu: Annotated[str, typer.Option(help="With --gpus: a100, h100 or h200.")] = "h100",
) -> None:
    """Predict a run's time, memory, disk and loss.

    With a recipe: of that run, on this machine. Without one: proposes the model with the lowest expected loss for so
    many hours or tokens.

    Example: slm plan --hours 1 data.source=book.txt -o mine.yaml
    Example: slm plan own-text data.source=book.txt model.hidden_size=192
    Example: slm plan llama-3.2-1b --gpus 64 train.sequence_length=2048
    """
    from slmkit.cli.show import TerminalReporter
    from slmkit.training.recipe.recipe import find_recipe, load_recipe

    if recipe is not None and "=" in recipe and (hours is not None or tokens is not None):
        overrides, recipe = [recipe, *(overrides or [])], None  # there is no recipe: the first argument is an override
    _expect_what_fits_together(recipe, hours, tokens, output, gpus)
    reporter = TerminalReporter()
    loaded = None
    if recipe is not None:
        loaded = load_recipe(find_recipe(recipe), [f"train.device={device}", *(overrides or [])], reporter.say)
    from slmkit.workflows.plan import plan_on_gpus, plan_recipe, propose  # imports torch: after the arguments

    if loaded is not None and gpus is not None:
        _show_on_gpus(*plan_on_gpus(loaded, gpus, gpu), gpu)
        return
    reporter.say("looking at this machine")
    if loaded is None:
        result = propose(hours, None if tokens is None else int(tokens), device, measure, reporter.say, overrides or [])
    else:
        result = plan_recipe(loaded, measure, reporter.say)
    _show(result)
    if recipe is None:
        _write(result, output)


def _write(result: RunEstimate, output: str | None) -> None:
    """Write the proposed recipe, or say how to."""
    from pathlib import Path

    from slmkit.config import to_yaml

    if output is None:
        print("\nto train it, write the recipe to a file: the same command with -o mine.yaml")
        return
    Path(output).write_text(to_yaml(result.recipe), encoding="utf-8")
    named = result.recipe.data.source or result.recipe.data.sources
    print(f"\nrecipe: {output}; next: slm train {output}" + ("" if named else " data.source=YOUR.txt"))


def _expect_what_fits_together(
    recipe: str | None, hours: float | None, tokens: float | None, output: str | None, gpus: int | None
) -> None:
    from slmkit.config import UserError

    if recipe is not None and (hours is not None or tokens is not None or output is not None):
        raise UserError("--hours, --tokens and --output are for a proposal: give either a recipe or these options")
    if gpus is not None and recipe is None:
        raise UserError("--gpus is for a recipe: slm plan RECIPE --gpus 8")
    if recipe is None and (hours is None) == (tokens is None):
        raise UserError("name a recipe to plan, or what to propose one for: --hours 1, or --tokens 1e8")


def _show(result: RunEstimate) -> None:
    from slmkit.cli.show import count, gibibytes
    from slmkit.training.logging.progress import clock

    expected, train, measured = result.estimate, result.recipe.train, result.measured
    config, described = result.config, result.device.describe()

    def of_free(needed: int, free: int) -> str:
        return gibibytes(needed) + (f" of {gibibytes(free)} free" if free else "")

    lines = {
        "model": f"{count(expected.parameters)} parameters: {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{config.vocab_size:,} tokens, rows of {result.length:,}",
        "steps": f"{expected.steps:,} of {train.rows_per_step(result.length) * result.length:,} tokens: "
        f"{count(expected.tokens)} tokens",
        "text": _text(result),
        "learning rate": f"{train.learning_rate:g}, {train.optimizer}",
        "device": f"{described['device']}, {described['device_name']}, {described['compute_dtype']}",
        "speed": f"{expected.tokens_per_second:,.0f} tokens/s, ",
        "time": clock(expected.seconds),
        "memory": of_free(expected.memory_bytes, result.memory_free),
        "disk": of_free(expected.disk_bytes, result.disk_free),
        "loss": _loss(result),
    }
    if expected.trained < expected.parameters:
        lines["model"] += f"; {count(expected.trained)} of them in an adapter, which alone is trained"
    if expected.frozen_parameters:
        lines["model"] += f"; and a second model of {count(expected.frozen_parameters)} that is not trained"
    if measured is None:
        lines["speed"] += "estimated from the speed of matrix products; --probe measures it"
    else:
        lines["speed"] += f"measured in {measured.steps} steps (estimate without measuring: {result.guessed_rate:,.0f})"
        lines["memory"] += f"; {gibibytes(measured.memory_bytes)} measured in the same steps"
    for name, value in lines.items():
        print(f"{name:<15}{value}")
    print("\nassumptions", *result.assumptions, sep="\n  ")
    if not result.fits:
        print(
            "\nit does not fit: lower train.micro_batch_tokens, set train.gradient_checkpointing=1, or shrink the model"
        )


def _text(result: RunEstimate) -> str:
    from slmkit.cli.show import count

    if result.text is None or result.epochs is None:
        return f"as much as the steps need: {count(result.estimate.tokens)} tokens, if each is read once"
    text = f"about {count(result.text)} tokens, read {result.epochs:,.{0 if result.epochs > 10 else 1}f} times (epochs)"
    return text + ("; beyond some 16 times little is learned" if result.epochs > 16 else "")


def _loss(result: RunEstimate) -> str:
    if result.estimate.loss is not None:
        return f"about {result.estimate.loss:.2f} nats a token"
    if result.recipe.objective != "pretrain" or result.recipe.model.path is not None:
        return "not estimated: the published laws are about pretraining from scratch"
    return "not estimated: for so few tokens the published laws do not hold"


def _show_on_gpus(step: ClusterEstimate, tokens: int, gpu: str) -> None:
    from slmkit.cli.show import count, gibibytes
    from slmkit.training.logging.progress import clock

    waits, writes = step.checkpoint_seconds
    lines = {
        "GPUs": f"{step.gpus} of {gpu}; of each {step.micro_batches} micro-batches of {step.rows} rows a step",
        "a step": f"{step.step_seconds * 1e3:,.1f} ms for {step.tokens:,} tokens: products "
        f"{step.products * 1e3:,.1f}, waiting for communication {step.waiting * 1e3:,.1f}, "
        f"update {step.update * 1e3:,.1f}, agreement of hosts {step.agreement * 1e3:,.1f}",
        "communication": f"{step.communication * 1e3:,.1f} ms: {gibibytes(step.gathered_bytes)} of weights gathered, "
        f"{gibibytes(step.reduced_bytes)} of gradients reduced",
        "memory": f"{gibibytes(step.memory_bytes)} of each GPU",
        "checkpoint": f"{gibibytes(step.checkpoint_bytes)}; the run waits {waits:.1f} s for each, and "
        f"{writes:.0f} s of writing follow in the background",
        "speed": f"{step.tokens_per_second:,.0f} tokens/s, MFU {step.mfu:.0%}",
        "time": f"{clock(tokens / step.tokens_per_second)} for {count(tokens)} tokens, without evaluations",
    }
    for name, value in lines.items():
        print(f"{name:<15}{value}")
    print("\nby calculation, from published rates of the hardware: docs/cluster.md")
