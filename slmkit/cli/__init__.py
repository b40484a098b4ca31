"""The `slm` command. Each module here is one command: it parses, calls the library and prints.

Heavy imports happen only when a command runs, so that `slm --help` is fast.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated

import typer

from slmkit import __version__
from slmkit.cli import bench, chat, data, evaluate, export, generate, models

# isort: split
from slmkit.cli import plan, quickstart, runs, serve, tokenizer, train
from slmkit.cli.errors import explain
from slmkit.cli.options import new_app

app = new_app(
    "Train small language models, from raw text to a model you talk to.\n\nStart with: slm quickstart",
    quickstart.quickstart, runs.recipes, train.train, train.resume, runs.runs, runs.plot, evaluate.report, runs.push,
    train.replay, plan.plan, generate.generate, chat.chat, serve.serve, serve.ui, evaluate.eval_, evaluate.compare,
    models.inspect, models.merge, models.quantize, export.export, export.verify, train.distill_cache,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"slm {__version__}")
        raise typer.Exit


@app.callback()
def slm(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, of any command.")] = False,
) -> None:
    """What all commands have in common; `main` reads --debug itself, wherever it stands."""


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, a traceback only with --debug."""
    # How long an idle OpenMP thread spins before it sleeps; read when torch is loaded. With the library's default,
    # speed drops if another program shares the cores (3,400 instead of 6,800 tokens/s on two cores); with this value
    # it is 5 % lower if none does.
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    if os.environ.get("RANK", "0") != "0":  # only rank 0 prints under torchrun
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # replaces characters that the terminal cannot show
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that files and children are tidied
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, prog_name="slm", standalone_mode=False)
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        code = explain(error, _command(arguments))
    except KeyboardInterrupt:
        print("\nslm: stopped", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def _command(arguments: list[str]) -> str:
    """The command's name among the arguments, such as `data prepare`."""
    names = [argument for argument in arguments[:2] if not argument.startswith("-")]
    return " ".join(names if names[:1] in (["data"], ["tokenizer"], ["bench"]) else names[:1])
