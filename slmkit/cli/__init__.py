"""The `slm` command. Each module here is one command: it parses, calls the library and prints.

Nothing heavy is imported before a command runs, so that `slm --help` answers at once.
"""

from __future__ import annotations

import os
import sys

import typer

from slmkit.cli import (
    bench,
    chat,
    data,
    distill_cache,
    eval,
    generate,
    inspect,
    merge,
    plan,
    plot,
    quickstart,
    runs,
    tokenizer,
    train,
)
from slmkit.config import UserError

app = typer.Typer(
    help="Grow a small language model, from raw text to a model you talk to. Start with: slm quickstart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("quickstart")(quickstart.quickstart)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.command("train")(train.train)
app.command("resume")(train.resume)
app.command("distill-cache")(distill_cache.distill_cache)
app.command("replay")(train.replay)
app.command("plan")(plan.plan)
app.command("runs")(runs.runs)
app.command("plot")(plot.plot)
app.command("eval")(eval.evaluate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("inspect")(inspect.inspect)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, a traceback only with --debug."""
    # How long an idle OpenMP thread spins before it sleeps; read when torch is loaded. The library's own default costs
    # most of the speed where another program shares the cores (3,400 instead of 6,800 tokens/s on two of them); with
    # this one 5 % is lost where none does.
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun starts, the first alone speaks
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(arguments, prog_name="slm", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        code = _explain(error)
    except KeyboardInterrupt:
        print("\nslm: stopped", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def _explain(error: Exception) -> int:
    """Print one line on stderr; returns the exit code."""
    rank = os.environ.get("RANK")
    name = f"slm: rank {rank}" if rank is not None else "slm"
    if type(error).__name__ == "RunStopped":
        if rank in (None, "0"):
            print(f"slm: {error}", file=sys.stderr)
        return 0
    if isinstance(error, BrokenPipeError):  # `slm generate … | head`
        sys.stderr.close()
        return 0
    if isinstance(error, UserError) or type(error).__name__ == "DeviceError":  # the latter's module imports torch
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # typer: a wrong option or argument
        message = " ".join(error.format_message().split())
        print(f"slm: {message} (see `slm --help`)", file=sys.stderr)
        return int(error.exit_code)
    what = " ".join(str(error).split())[:300]
    print(f"{name}: {type(error).__name__}: {what} (run again with --debug for the traceback)", file=sys.stderr)
    return 1
