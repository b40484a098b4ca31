"""Error messages of the command line: one line on stderr, and the exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from pathlib import Path

from slmkit.config import UserError

PACKAGE = Path(__file__).parents[1]
OUT_OF_MEMORY = "out of memory: take a smaller model, fewer tokens at once (train.micro_batch_tokens) or another device"
# Library errors caused by a file's content, by class name: importing the libraries would take long.
DAMAGED = {
    "JSONDecodeError": "a file is not valid JSON",
    "YAMLError": "a file is not valid YAML",
    "UnicodeDecodeError": "a file is not UTF-8 text",
    "UnicodeEncodeError": "a text holds characters that cannot be written",
    "BadZipFile": "a file is not a valid zip archive",
    "SafetensorError": "a file of weights is damaged or cut short",
    "ArrowInvalid": "a file is not valid parquet",
}


def explain(error: BaseException, command: str) -> int:
    """Print `error` in one line; returns the exit code: 2 for a user's mistake, 1 for a bug."""
    rank = os.environ.get("RANK")
    if isinstance(error, BrokenPipeError):  # `slm generate … | head`
        sys.stderr.close()
        return 0
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":  # a group of commands without a command
        print(error)
        return 0
    if kind == "RunStopped":
        if rank in (None, "0"):
            _say("slm", str(error), "yellow")
        return 0
    name = "slm" if rank is None else f"slm: rank {rank}"
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # typer: a wrong option or argument
        message = error.format_message().replace("Input should be", "it should be").replace("Value error, ", "")
        path = getattr(getattr(error, "ctx", None), "command_path", "slm")
        _say(name, f"{message[:1].lower()}{' '.join(message[1:].split()).rstrip('.')} (see `{path} --help`)")
        return int(error.exit_code)
    message = in_words(error)
    _say(name, message or _internal(error, command))
    return 2 if message else 1


def in_words(error: BaseException) -> str | None:
    """The message of an expected error; None for a bug."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split())
    if isinstance(error, UserError) or "DeviceError" in kinds:  # the latter's module imports torch
        return re.sub(r"\[Errno \d+\] ", "", text)  # from a quoted system error
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    if isinstance(error, ModuleNotFoundError) and not (error.name or "slmkit").startswith("slmkit"):
        return f"this needs the package {error.name}, which is not installed: pip install {error.name}"
    if isinstance(error, OSError):
        reason = (error.strerror or text or "cannot be read or written").lower()
        more = ": free some space, then give the same command again" if error.errno == errno.ENOSPC else ""
        return (f"{error.filename}: " if error.filename else "") + reason + more
    return next((f"{words}: {text}"[:300] for kind, words in DAMAGED.items() if kind in kinds), None)


def _internal(error: BaseException, command: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if Path(frame.filename).is_relative_to(PACKAGE)), frames[-1])
    path = Path(frame.filename)
    file = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path.name
    text = " ".join(str(error).split())[:300] or "no message"
    if isinstance(error, KeyError):
        text = f"there is no entry {text}"
    return (
        f"internal error in {file}:{frame.lineno} during `slm {command}`: {text}; "
        "please report it with the output of --debug"
    )


def _say(name: str, message: str, style: str = "red") -> None:
    """Print the message; on a terminal the name is coloured, unless NO_COLOR is set."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((f"{name}:", style), " ", message), soft_wrap=True)
