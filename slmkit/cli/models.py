"""What is done with models: `slm inspect`, `merge` and `quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from slmkit.cli.options import ModelPath, Overrides, PrintConfig

LENGTH = "Tokens in a sequence; default: the model's context, at most 2048."
WHAT = "The YAML file of a merge; with --adapter, a model or a run."
ADAPTER = "Merge this adapter, or a run that trained one, into MODEL; may be given several times."
MERGED = "With --adapter: where the result goes; default: MODEL-merged."
KINDS = "int8, int4 or nf4; several make several directories, in one table."
QUANTIZED = "Where the result goes; default: MODEL-int4 and so on."
GROUP = "Weights with one scale: 32, 64 or 128; default: 32, for nf4 64."
EMBEDDING = "int8: smaller and faster, and only slmkit reads the result."
METHOD = "For 4 bits; gptq, unless rounding is better on held-out text."
CALIBRATION = "Text like what the model will write: a file, folder, URL, or the built-in stories."
TEXT = "Text for the perplexity; default: calibration text that was held out."


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset, a model, a run, or OWNER/NAME of the hub.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    length: Annotated[int | None, typer.Option(min=1, help=LENGTH)] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, muon or lion.")] = "adamw",
) -> None:
    """Say how large a model is, and what it needs.

    Parameters, operations a token, KV cache, and memory for training and for inference.

    Example: slm inspect llama-3.2-1b --batch 1 --length 8192
    """
    from slmkit.model.config import find_model_or_preset

    find_model_or_preset(model)  # before anything is loaded
    from slmkit.cli.show import count, gibibytes
    from slmkit.workflows.plan import inspect_model

    report = inspect_model(model, batch, length, precision, optimizer)
    print(f"{model}: {report.summary}\n")

    print("parameters")
    for name, n in report.parameters.items():
        print(f"  {name:<28}{n:>16,}  {n / report.parameter_count:6.1%}")
    print(f"  {'all':<28}{report.parameter_count:>16,}\n")

    print(f"operations a token, in rows of {report.length:,}")
    for name, n in report.operations.items():
        print(f"  {name:<28}{count(n):>16}")

    windows = f", and {report.window_bytes:,} a row for layers with a window" if report.window_bytes else ""
    print(f"\nKV cache, bytes a token in bfloat16{windows}")
    for name, n in report.cache_bytes.items():
        print(f"  {name:<28}{n:>16,}")
    print(f"  {f'one row of {report.length:,}':<28}{gibibytes(report.cache_of_a_row):>16}")

    print(f"\nmemory, {batch} × {report.length:,} tokens at once, products in {report.compute_dtype}")
    for name, n in report.memory.items():
        print(f"  {name:<28}{gibibytes(n):>16}")


def merge(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_MODEL", help=WHAT)],
    overrides: Overrides = None,
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help=ADAPTER)] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help=MERGED)] = None,
    print_config: PrintConfig = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check that the models fit together, and stop.")] = False,
) -> None:
    """Make one model of several, or merge adapters into a model.

    A recipe names the models and the method: linear, slerp, task_arithmetic, ties, dare_linear or dare_ties. `ties`
    comes with slmkit; its file, recipes/merging/ties.yaml, explains every key.

    Example: slm merge ties base_model=runs/book models.0.model=runs/chat-a models.1.model=runs/chat-b
    Example: slm merge runs/book --adapter runs/book-lora -o runs/book-whole
    """
    from slmkit.config import UserError

    if adapter and (overrides or print_config or dry_run):
        raise UserError("--adapter: KEY=VALUE, --print-config and --dry-run apply to merge recipes only")
    if adapter:
        _merge_adapters(what, adapter, output)
    elif output is not None:
        raise UserError("--output is for --adapter; for a recipe set output_dir")
    else:
        _merge(what, overrides or [], print_config, dry_run)


def _merge_adapters(model: str, adapters: list[str], output: str | None) -> None:
    from slmkit.cli.show import suggestion
    from slmkit.files.find import find_model_directory
    from slmkit.model.files.adapter_directory import find_adapter

    find_model_directory(model)
    for adapter in adapters:
        find_adapter(adapter)
    from slmkit.workflows.merge import merge_adapters  # imports torch: after the arguments were checked

    directory = merge_adapters(model, adapters, output)
    print(f"model: {directory}")
    print(f"next: {suggestion(directory, adapters[-1])}")


def _merge(recipe: str, overrides: list[str], print_config: bool, dry_run: bool) -> None:
    from slmkit.adapt.merge_recipe import load_merge_recipe
    from slmkit.config import to_yaml
    from slmkit.files.find import find_model_directory
    from slmkit.training.recipe.recipe import find_recipe

    loaded = load_merge_recipe(recipe if Path(recipe).exists() else find_recipe(recipe, "merging"), overrides)
    if print_config:
        print(to_yaml(loaded), end="")
        return
    for name in loaded.names:
        find_model_directory(name)
    from slmkit.cli.show import count, gibibytes, progress_bar, suggestion
    from slmkit.workflows.merge import prepare_merge, write_merge

    prepared = prepare_merge(loaded)
    print(
        f"{loaded.merge_method} of {len(loaded.merged)} models: {count(prepared.parameters)} parameters, "
        f"{gibibytes(prepared.bytes)} in {str(prepared.dtype).removeprefix('torch.')}"
    )
    if dry_run:
        return
    size = prepared.bytes
    with progress_bar("merging") as show:
        output = write_merge(
            prepared,
            lambda written: show(f"{written / 1e6:,.0f} of {size / 1e6:,.0f} MB", written / size, written),
        )
    print(f"model: {output}")
    print(f"next: {suggestion(output, loaded.merged[0].model)}")


def quantize(
    model: ModelPath,
    to: Annotated[list[str], typer.Option("--to", help=KINDS)],
    output: Annotated[str | None, typer.Option("--output", "-o", help=QUANTIZED)] = None,
    group: Annotated[int | None, typer.Option(help=GROUP)] = None,
    embedding: Annotated[Literal["bfloat16", "int8"], typer.Option(help=EMBEDDING)] = "bfloat16",
    method: Annotated[Literal["gptq", "round"], typer.Option(help=METHOD)] = "gptq",
    calibration: Annotated[str, typer.Option(help=CALIBRATION)] = "stories",
    text: Annotated[str | None, typer.Option(help=TEXT)] = None,
) -> None:
    """Make a model smaller: weights of 8 or 4 bits.

    Writes a model directory that all commands read, and transformers where it has the format; prints size, bits a
    weight, perplexity, speed, and the share of greedy tokens that stay the same, beside those of the original.

    Example: slm quantize runs/book --to int8 --to int4 --calibration book.txt
    """
    from slmkit.cli.show import print_table, progress_bar, suggestion
    from slmkit.files.find import find_model_directory

    find_model_directory(model)
    from slmkit.workflows.quantize import RESULTS, Request, quantize_model  # imports torch: after the model was found

    request = Request(to, output, group, embedding, method, calibration, text)
    with progress_bar("quantize") as show:
        found = quantize_model(model, request, show)
    rows = [
        (
            one.name, one.method or "-", f"{one.bytes / 1e6:,.1f}", f"{one.bits:.2f}", f"{one.perplexity:.3f}",
            f"{one.tokens_per_second:,.0f}", f"{one.agreement:.1%}",
        )
        for one in found
    ]  # fmt: skip
    columns = ("model", "method", "MB", "bits a weight", "perplexity", "tokens/s", "same tokens")
    print_table(columns, rows, right=columns[2:])
    for one in found[1:]:
        print(f"{one.directory}: {'; '.join(one.notes)}; figures: {RESULTS}")
    print(f"next: {suggestion(found[-1].directory, model)}")
