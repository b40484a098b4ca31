"""`slm generate`."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from slmkit.cli import options
from slmkit.cli.show import counted, load_for_generation, open_model, printable, progress_bar
from slmkit.config import UserError, one_line
from slmkit.files import read_text

if TYPE_CHECKING:
    from slmkit.generation.constraints import Grammar
    from slmkit.generation.engine import Event, Request
    from slmkit.generation.ensemble import LanguageModel
    from slmkit.generation.prompts import Row
    from slmkit.generation.speculation import Speculation
    from slmkit.tokenizer import SLMTokenizer

    Events = Iterator[tuple[int, Event]]  # what `in_order` yields

STANDARD_OUTPUT = {"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"}
RESULTS = {"sample", "text", "finish_reason", "tokens"}  # what --output adds to a row

PROMPT = "The text to continue, in quotes; - reads it from standard input; default: none."
PROMPTS = "Many prompts, one a line: text, or JSON with `prompt` or `messages`; -: standard input."
OUTPUT = "Write each text there as a line of JSON; -: standard output."
MOST = "Stop after this many tokens; default: what the model advises, or 200."
CHOICE = "The text is one of these; to be given several times."
DRAFT = "Be faster: a smaller model of the same tokenizer guesses several tokens at once."
LOOKUP = "Be faster where a text repeats itself: guess that it goes on as before."


@options.with_options(options.SAMPLING)
def generate(
    model: options.ModelPath,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help=PROMPT)] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help=PROMPTS)] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help=OUTPUT)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help=MOST)] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many continuations of each prompt.")] = 1,
    crop: Annotated[bool, typer.Option("--crop", help="Of a prompt that is too long, keep the end that fits.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None,
    json_schema: Annotated[str | None, typer.Option(metavar="FILE", help="JSON that this schema accepts.")] = None,
    regex: Annotated[str | None, typer.Option(help="The whole text matches this regular expression.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help=CHOICE)] = None,
    draft: Annotated[str | None, typer.Option(metavar="MODEL2", help=DRAFT)] = None,
    lookup: Annotated[bool, typer.Option("--lookup", help=LOOKUP)] = False,
    others: options.OtherModels = None,
    device: options.DeviceName = "auto",
    **sampling: Any,
) -> None:
    """Continue a text.

    Example: slm generate runs/quickstart/stories "Once there was a fox" --seed 1
    Example: slm generate runs/quickstart/stories -n 3 --max-new-tokens 50
    Example: echo "Once there was a fox" | slm generate runs/quickstart/stories -
    Example: slm generate runs/book --prompts prompts.txt -o texts.jsonl
    Example: slm generate runs/book "The fox had a" --choice " kite" --choice " hat"
    """
    _at_most_one({"a PROMPT": prompt, "--prompts": prompts})
    _at_most_one({"--json-schema": json_schema, "--regex": regex, "--choice": choice or None})
    _at_most_one({"--draft": draft, "--lookup": lookup or None})
    rows = _read_rows(prompt or "", prompts)
    if output is not None:
        _check_output(output, rows)
    schema = None if json_schema is None else _read_schema(json_schema)
    from slmkit.generation.sampling_settings import USUAL

    decoder, tokenizer, settings, advice = open_model(model, others, device, USUAL, sampling)
    from slmkit.generation.engine import Engine, Request
    from slmkit.generation.prompts import in_order
    from slmkit.generation.text import end_tokens

    requests, grammar = list[Request](), _grammar(tokenizer, json_schema, schema, regex, choice)
    for place, row in rows:
        ids, most = _encoded(place, row, tokenizer, decoder.max_positions, max_new_tokens, advice, crop)
        requests.append(Request(ids, most, settings, end_tokens(tokenizer), stop or [], samples, grammar))
    engine = Engine(decoder, tokenizer, speculation=_speculation(model, draft, lookup, decoder, device))
    events = in_order(engine, requests)  # what can be refused is, before there is a file
    began, contents = time.monotonic(), [row for _, row in rows]
    if output is None:
        tokens = _print(events, contents, requests)
    else:
        tokens = _write(events, contents, requests, output)
    _say_speed(tokens, time.monotonic() - began, engine.speculation)


def _at_most_one(options: dict[str, Any]) -> None:
    """Raises `UserError` if several of these options, by name, are given."""
    if sum(value is not None for value in options.values()) > 1:
        *first, last = options
        raise UserError(f"{', '.join(first)} and {last}: give one of them")


def _check_output(output: str, rows: list[tuple[str, Row]]) -> None:
    """Raises `UserError` for a file that exists, and for keys of rows that results have too."""
    if output not in STANDARD_OUTPUT and Path(output).is_file():
        raise UserError(f"{output} exists: name another file for --output, or remove it")
    for place, row in rows:
        if taken := sorted(RESULTS & row.keys()):
            raise UserError(f"{place}: --output would overwrite the key {taken[0]!r}: rename it")


def _read_rows(prompt: str, prompts: str | None) -> list[tuple[str, Row]]:
    """Each prompt with its place in a file. Raises `UserError` for one that is not UTF-8 text."""
    from slmkit.generation.prompts import read_prompts

    if prompts is None and prompt != "-":
        return [("the prompt", {"prompt": prompt})]
    is_piped = prompts in (None, "-")
    name = "standard input" if is_piped else str(prompts)
    try:
        # With a byte order mark or without.
        with _as_utf8(sys.stdin, "utf-8-sig", "strict") if is_piped else open(name, encoding="utf-8-sig") as file:
            if prompts is None:
                return [("the prompt", {"prompt": file.read().rstrip("\n")})]
            return list(read_prompts(file, name))
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text: {one_line(error)}") from None


def _read_schema(path: str) -> Any:
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise UserError(f"{path}: JSON that is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {one_line(error)}") from None


def _grammar(
    tokenizer: SLMTokenizer, path: str | None, schema: Any, regex: str | None, choices: list[str] | None
) -> Grammar | None:
    if path is None and regex is None and not choices:
        return None
    if regex == "":
        raise UserError("--regex: expected a regular expression that is not empty")
    from slmkit.generation.constraints import Grammar

    if choices:
        return Grammar.choices(tokenizer, choices)
    return Grammar.regex(tokenizer, regex) if regex is not None else Grammar.json_schema(tokenizer, schema)


def _speculation(
    model: str, draft: str | None, lookup: bool, decoder: LanguageModel, device: str
) -> Speculation | None:
    """Raises `UserError` for a draft model of another vocabulary."""
    from slmkit.files.find import find_model_directory
    from slmkit.generation.ensemble import common_tokenizer
    from slmkit.generation.speculation import DraftModel, PromptLookup

    if draft is None:
        return PromptLookup() if lookup else None
    common_tokenizer([find_model_directory(path) for path in (model, draft)])
    smaller, _ = load_for_generation(draft, device)
    if smaller.vocab_size != decoder.vocab_size:
        raise UserError(f"--draft {draft}: {smaller.vocab_size:,} logits, where {model} has {decoder.vocab_size:,}")
    return DraftModel(smaller)


def _encoded(
    place: str, row: Row, tokenizer: SLMTokenizer, context: int, most: int | None, advice: dict[str, Any], crop: bool
) -> tuple[list[int], int]:
    """The ids of a prompt and how many may follow. Raises `UserError` for too many."""
    from slmkit.generation.prompts import crop_row, encode_row
    from slmkit.model.files.generation_config import new_tokens

    try:
        ids = encode_row(tokenizer, row)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    most = most or new_tokens(advice, usual=200, prompt=0 if crop else len(ids))
    if crop and len(ids) + most > context:
        whole, ids = len(ids), crop_row(tokenizer, row, context, most)
        if len(ids) < whole:
            print(f"{place}: its first {whole - len(ids):,} of {whole:,} tokens are left out", file=sys.stderr)
    elif len(ids) >= context:
        raise UserError(
            f"{place}: {len(ids)} tokens, which fills the model's context of {context}: shorten it, or give --crop"
        )
    return ids, most


def _print(events: Events, rows: list[Row], requests: list[Request]) -> int:
    """Print each text while it comes; returns how many tokens there were.

    Where the output is no terminal, constrained texts stand there alone, for programs that read them.
    """
    console = Console(highlight=False)
    show = printable if console.is_terminal else str
    tokens = length = 0
    for number, event in events:
        request = requests[number]
        if not length and (sys.stdout.isatty() or request.grammar is None):
            heads = [f"prompt {number + 1} of {len(rows)}"] if len(rows) > 1 else []
            heads += [f"sample {event.index + 1} of {request.n}"] if request.n > 1 else []
            if heads:
                console.print(Text(f"--- {', '.join(heads)}", _style(console, "bold cyan")))
            row = rows[number]
            asked = row["prompt"] if "prompt" in row else f"{row['messages'][-1]['content']}\n"
            if console.is_terminal:
                console.print(Text(printable(asked), _style(console, "dim")), end="", soft_wrap=True)
            else:
                print(asked, end="")  # rich would change tabs and control characters
        length += event.token is not None
        print(show(event.text), end="\n" if event.finish_reason else "", flush=True)
        if event.finish_reason is not None:
            _remark(event, request, length)
            tokens, length = tokens + length, 0
    return tokens


def _write(events: Events, rows: list[Row], requests: list[Request], output: str) -> int:
    """Write each text as a line of JSON; returns how many tokens there were."""
    is_shown = output in STANDARD_OUTPUT
    is_hidden, quiet = is_shown and sys.stdout.isatty(), nullcontext()  # no bar between lines
    done, tokens, total = 0, 0, sum(request.n for request in requests)
    text, length = "", 0
    try:
        with _opened(output) as file, quiet if is_hidden else progress_bar("generating") as show:
            for number, event in events:
                row, request = rows[number], requests[number]
                is_token = event.token is not None
                text, length, tokens = text + event.text, length + is_token, tokens + is_token
                if event.finish_reason is not None:
                    sample = {"sample": event.index + 1} if request.n > 1 else {}
                    result = {**row, **sample, "text": text, "finish_reason": event.finish_reason, "tokens": length}
                    print(json.dumps(result, ensure_ascii=False), file=file, flush=True)
                    _remark(event, request, length)
                    done, text, length = done + 1, "", 0
                if show is not None:
                    show(f"{done:,} of {counted(total, 'text')}, {counted(tokens, 'token')}", done / total)
    except KeyboardInterrupt:
        if not is_shown:
            print(
                f"\n{done:,} of {counted(total, 'text')} {'is' if total == 1 else 'are'} in {output}", file=sys.stderr
            )
        raise
    if not is_shown:
        print(f"{counted(total, 'text')} in {output}")
    return tokens


def _opened(output: str) -> AbstractContextManager[IO[str]]:
    if output in STANDARD_OUTPUT:
        return _as_utf8(sys.stdout, "utf-8", "replace")
    return open(output, "w", encoding="utf-8", errors="replace")


def _as_utf8(stream: IO[str], encoding: str, errors: str) -> AbstractContextManager[IO[str]]:
    """A standard stream, which stays open, in this encoding."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding=encoding, errors=errors)
    return nullcontext(stream)


def _remark(event: Event, request: Request, length: int) -> None:
    """Say on standard error that a text is not whole. `length`: its tokens."""
    if event.error:
        print(f"slm: {event.error}", file=sys.stderr)
    elif event.finish_reason == "context" or (request.grammar is not None and event.finish_reason == "length"):
        why = "the model's context is full" if event.finish_reason == "context" else "--max-new-tokens allows more"
        print(f"note: the text is cut after {counted(length, 'token')}: {why}", file=sys.stderr)


def _say_speed(tokens: int, seconds: float, speculation: Speculation | None) -> None:
    if sys.stderr.isatty():
        console = Console(stderr=True, highlight=False)
        line = f"{counted(tokens, 'token')}, {tokens / seconds:,.1f} tokens/s"
        if speculation is not None:
            line += f", {speculation.accepted:,} of {speculation.guessed:,} guessed tokens accepted"
        console.print(line, style=_style(console, "dim"))


def _style(console: Console, style: str) -> str:
    return "" if console.no_color else style
