"""Models for other programs: `slm export` and `slm verify`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from slmkit.cli.options import ModelPath

if TYPE_CHECKING:
    from slmkit.export.compare import Parity
    from slmkit.export.gguf_types import PlannedTensor
    from slmkit.workflows.export import Verdict

TYPE = "How weights are stored, such as Q4_K_M, int8 or bfloat16."
OUTPUT = "Where the result goes; default: a name beside the model."
SHARD = "Gigabytes of a file of weights, at most, for hf; default: 5."
FALLBACK = "Allow other types for tensors whose rows do not divide; for gguf."
UNVERIFIED = "Write it also if the program that would check it is not installed."
FILES = "GGUFs, pages and folders made of MODEL, by slmkit or another program."


def export(
    model: ModelPath,
    to: Annotated[str, typer.Option("--to", help="gguf, html, onnx, hf, ollama, mlx or space.")],
    kind: Annotated[str | None, typer.Option("--type", help=TYPE)] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help=OUTPUT)] = None,
    shard: Annotated[float | None, typer.Option(min=0.001, help=SHARD)] = None,
    allow_fallback: Annotated[bool, typer.Option("--allow-fallback", help=FALLBACK)] = False,
    unverified: Annotated[bool, typer.Option("--unverified", help=UNVERIFIED)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
) -> None:
    """Write a model for another program, and check it there.

    The result is opened in that program. Only if it reads the same ids, renders the same chat prompts and predicts the
    same, within the bounds of its precision, does it get its name. The figures are in FILE.parity.json beside a file,
    or in parity.json in a folder.

    Example: slm export runs/book --to gguf --type Q8_0
    Example: slm export runs/book --to hf --type bfloat16
    """
    from slmkit.cli.show import progress_bar
    from slmkit.files.find import find_model_directory

    find_model_directory(model)
    from slmkit.workflows.export import Request, plan_of, record_of
    from slmkit.workflows.export import export as export_model

    request = Request(to, output, kind, unverified, allow_fallback, overwrite, shard)
    if plan := plan_of(model, request):
        print_plan(plan)
    with progress_bar("export") as show:
        path, parity = export_model(model, request, show)
    print(f"{to}: {path}")
    print(f"compared: {figures(parity) if parity else 'no, since the program is not installed'}; {record_of(path)}")


def verify(
    model: ModelPath,
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE]", help=FILES)] = None,
) -> None:
    """Compare a model in every runtime that is installed.

    Token ids, chat prompts, log-probabilities, 256 greedy tokens, size and speed, in one table; exit code 1 where
    something differs beyond the bounds of its precision. With FILE only these are compared: did a conversion work?

    Example: slm verify runs/book
    Example: slm verify runs/book runs/book-F16.gguf
    """
    from slmkit.cli.show import progress_bar
    from slmkit.files.find import find_model_directory

    find_model_directory(model)
    from slmkit.workflows.export import verify as verify_model

    with progress_bar("verify") as show:
        verdicts = verify_model(model, files or [], show)
    print_verdicts(verdicts)
    if any(one.is_wrong for one in verdicts):
        raise typer.Exit(1)


def print_plan(plan: list[PlannedTensor]) -> None:
    """Types of the tensors of a GGUF: a row for those of all layers that are alike, and a line for the whole."""
    from slmkit.cli.show import print_table
    from slmkit.export.gguf import summary

    alike: dict[tuple[str, ...], list[PlannedTensor]] = {}
    for one in plan:
        name = re.sub(r"\.\d+\.", ".*.", one.name)
        alike.setdefault((name, " × ".join(map(str, one.shape)), one.type, one.reason), []).append(one)
    rows = [
        (name, str(len(each)), shape, type_, f"{sum(one.bytes for one in each):,}", reason)
        for (name, shape, type_, reason), each in alike.items()
    ]
    print_table(("tensor", "tensors", "shape", "type", "bytes", "why"), rows, right=("tensors", "bytes"))
    print(summary(plan))


def figures(parity: Parity) -> str:
    """The figures of a comparison that was passed, in one line."""
    ids, chats, _, predicted, greedy, *_ = parity.checks.values()
    return (
        f"the same ids for {ids['compared']:,} texts and {chats['compared']:,} chat prompts; log-probabilities at most "
        f"{predicted['max_abs']:.2g} nats apart, their mean divergence {predicted['mean_kl']:.2g} nats; the first "
        f"{greedy['equal']} of {greedy['compared']} greedy tokens equal"
    )


def print_verdicts(verdicts: list[Verdict]) -> None:
    """A table of what was compared, then a line for each runtime that was not, or that differs."""
    from slmkit.cli.show import print_table

    rows = []
    for one in verdicts:
        if one.parity is None:
            continue
        ids, chats, _, predicted, greedy, *_ = one.parity.checks.values()
        same = (f"{each['compared'] - each['different']:,}/{each['compared']:,}" for each in (ids, chats))
        apart = (f"{predicted[name]:.2g}" if predicted else "?" for name in ("max_abs", "mean_kl"))
        rows.append(
            (
                one.runtime, one.kind, f"{one.parity.size / 1e6:,.1f}", *same, *apart,
                f"{greedy['equal']}/{greedy['compared']}", f"{one.parity.tokens_per_second:,.0f}",
                "differs" if one.is_wrong else "same",
            )
        )  # fmt: skip
    columns = ("runtime", "weights", "MB", "ids", "prompts", "nats apart", "divergence", "greedy", "tokens/s", "")
    print_table(columns, rows, right=columns[2:9])
    for one in verdicts:
        if one.problem:
            print(f"{one.runtime} {one.kind}: {one.problem}")
