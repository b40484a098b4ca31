"""`slm generate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from slmkit.cli import options
from slmkit.cli.show import counted, load_for_generation, open_model, printable
from slmkit.config import UserError

if TYPE_CHECKING:
    from slmkit.generation.constraints import Grammar
    from slmkit.generation.engine import Event, Request
    from slmkit.generation.ensemble import LanguageModel
    from slmkit.generation.prompts import Row
    from slmkit.generation.speculation import Speculation
    from slmkit.tokenizer import SLMTokenizer


Prompt = Annotated[
    str | None,
    typer.Argument(metavar="[PROMPT]", help="The text to continue; - reads it from standard input; default: none."),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Many prompts, one a line: text, or JSON with `prompt` or `messages`; -: standard input.",
    ),
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="FILE", help="Write each text there as a line of JSON.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Stop after this many tokens; default: what the model advises, or 200.")
]
Samples = Annotated[int, typer.Option("--samples", "-n", min=1, help="How many continuations of each prompt.")]
Crop = Annotated[bool, typer.Option("--crop", help="Of a prompt that is too long, keep the end that fits.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")]
JSONSchema = Annotated[str | None, typer.Option(metavar="FILE", help="The text is JSON that this schema accepts.")]
Regex = Annotated[str | None, typer.Option(help="The whole text matches this regular expression.")]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL2", help="Be faster: a smaller model of the same tokenizer guesses several tokens at once."
    ),
]
Lookup = Annotated[
    bool, typer.Option("--lookup", help="Be faster where a text repeats itself: guess that it goes on as before.")
]
Choice = Annotated[list[str] | None, typer.Option(help="The text is one of these; to be given several times.")]


def generate(
    context: typer.Context,
    model: options.ModelPath,
    prompt: Prompt = None,
    prompts: Prompts = None,
    output: Output = None,
    max_new_tokens: MaxNewTokens = None,
    samples: Samples = 1,
    crop: Crop = False,
    stop: Stop = None,
    json_schema: JSONSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    draft: Draft = None,
    lookup: Lookup = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.Penalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    others: options.OtherModels = None,
    device: options.DeviceName = "auto",
) -> None:
    """Continue a text.

    Example: slm generate runs/quickstart/stories "Once there was a fox" --seed 1
    Example: slm generate runs/quickstart/stories -n 3 --max-new-tokens 50
    Example: echo "Once there was a fox" | slm generate runs/quickstart/stories -
    Example: slm generate runs/book --prompts prompts.txt -o texts.jsonl
    Example: slm generate runs/book "The fox had a" --choice " kite" --choice " hat"
    """
    if prompt is not None and prompts is not None:
        raise UserError("a PROMPT and --prompts: give one of them")
    if sum(map(bool, (json_schema, regex, choice))) > 1:
        raise UserError("--json-schema, --regex and --choice: give one of them")
    if draft is not None and lookup:
        raise UserError("--draft and --lookup: give one of them")
    if output is not None and Path(output).is_file():
        raise UserError(f"{output} exists: name another file for --output, or remove it")
    rows = _read_rows(prompt or "", prompts)
    schema = _read_schema(json_schema) if json_schema else None
    decoder, tokenizer, settings, advice = open_model(model, others, device, options.USUAL, context.params)
    from slmkit.generation.engine import Engine, Request
    from slmkit.generation.prompts import in_order
    from slmkit.generation.text import end_tokens

    requests, grammar = list[Request](), _grammar(tokenizer, schema, regex, choice)
    for place, row in rows:
        ids, most = _encoded(place, row, tokenizer, decoder.max_positions, max_new_tokens, advice, crop)
        requests.append(Request(ids, most, settings, end_tokens(tokenizer), stop or [], samples, grammar))
    engine = Engine(decoder, tokenizer, speculation=_speculation(model, draft, lookup, decoder, device))
    events = in_order(engine, requests)  # what can be refused is, before there is a file
    with open(output, "w", encoding="utf-8", errors="replace") if output else nullcontext() as file:
        _write(events, [row for _, row in rows], requests, file, engine.speculation)
    if output:
        print(f"{counted(len(rows) * samples, 'text')} in {output}")


def _read_rows(prompt: str, prompts: str | None) -> list[tuple[str, Row]]:
    """Each prompt with its place in a file."""
    from slmkit.generation.prompts import read_prompts

    if prompts is None:
        return [("the prompt", {"prompt": sys.stdin.read().rstrip("\n") if prompt == "-" else prompt})]
    if prompts == "-":
        return list(read_prompts(sys.stdin, "standard input"))
    with open(prompts, encoding="utf-8") as file:
        return list(read_prompts(file, prompts))


def _read_schema(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _grammar(tokenizer: SLMTokenizer, schema: Any, regex: str | None, choices: list[str] | None) -> Grammar | None:
    if schema is None and not regex and not choices:
        return None
    from slmkit.generation.constraints import Grammar

    if choices:
        return Grammar.choices(tokenizer, choices)
    return Grammar.regex(tokenizer, regex) if regex else Grammar.json_schema(tokenizer, schema)


def _speculation(
    model: str, draft: str | None, lookup: bool, decoder: LanguageModel, device: str
) -> Speculation | None:
    """Raises `UserError` for a draft model of another vocabulary."""
    from slmkit.find import find_model_directory
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
        print(f"{place}: its first {whole - len(ids):,} of {whole:,} tokens are left out", file=sys.stderr)
    elif len(ids) >= context:
        raise UserError(
            f"{place}: {len(ids)} tokens, which fills the model's context of {context}: shorten it, or give --crop"
        )
    return ids, most


def _write(
    events: Iterator[tuple[int, Event]],
    rows: list[Row],
    requests: list[Request],
    file: IO[str] | None,
    speculation: Speculation | None,
) -> None:
    """Write each text as a line of JSON, or print it while it comes. `events`: what `in_order` yields."""
    console, began, tokens = Console(highlight=False), time.monotonic(), 0
    show = printable if console.is_terminal else str
    text, length = "", 0
    for number, event in events:
        row, request = rows[number], requests[number]
        if not length and file is None:
            heads = [f"prompt {number + 1} of {len(rows)}"] if len(rows) > 1 else []
            heads += [f"sample {event.index + 1} of {request.n}"] if request.n > 1 else []
            if heads:
                console.print(Text(f"--- {', '.join(heads)}", "bold cyan"))
            asked = row["prompt"] if "prompt" in row else f"{row['messages'][-1]['content']}\n"
            if console.is_terminal:
                console.print(Text(printable(asked), "dim"), end="", soft_wrap=True)
            else:
                print(asked, end="")  # rich would change tabs and control characters
        text, length = text + event.text, length + (event.token is not None)
        if file is None:
            print(show(event.text), end="\n" if event.finish_reason else "", flush=True)
        if event.finish_reason is None:
            continue
        if file is not None:
            sample = {"sample": event.index + 1} if request.n > 1 else {}
            result = {**row, **sample, "text": text, "finish_reason": event.finish_reason, "tokens": length}
            print(json.dumps(result, ensure_ascii=False), file=file, flush=True)
        if event.error:
            print(f"slm: {event.error}", file=sys.stderr)
        elif event.finish_reason == "context" or (request.grammar is not None and event.finish_reason == "length"):
            why = "the model's context is full" if event.finish_reason == "context" else "--max-new-tokens allows more"
            print(f"note: the text is cut after {counted(length, 'token')}: {why}", file=sys.stderr)
        tokens, text, length = tokens + length, "", 0
    if sys.stderr.isatty():
        speed = tokens / (time.monotonic() - began)
        line = f"{counted(tokens, 'token')}, {speed:,.1f} tokens/s"
        if speculation is not None:
            line += f", {speculation.accepted:,} of {speculation.guessed:,} guessed tokens accepted"
        Console(stderr=True, highlight=False).print(line, style="dim")
