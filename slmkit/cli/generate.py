"""`slm generate`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from slmkit.cli.options import USUAL, DeviceName, MinP, ModelPath, OtherModels, Penalty, Seed, Temperature, TopK, TopP
from slmkit.cli.show import open_model, printable
from slmkit.config import UserError

if TYPE_CHECKING:
    from slmkit.generation.ensemble import LanguageModel
    from slmkit.generation.prompts import Row
    from slmkit.generation.sampling_settings import SamplingSettings
    from slmkit.tokenizer import SLMTokenizer


def generate(
    model: ModelPath,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="The text to continue; - reads it from standard input; default: none."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Many prompts, one a line: plain, or JSON with `prompt` or `messages`; - reads standard input.",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write a line of JSON for each text.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many tokens; default: what the model advises, or 200.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many continuations of each prompt.")] = 1,
    crop: Annotated[bool, typer.Option("--crop", help="Of a prompt that is too long, use the end that fits.")] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None,
    seed: Seed = None,
    others: OtherModels = None,
    device: DeviceName = "auto",
) -> None:
    """Continue a text.

    Example: slm generate runs/quickstart/stories "Once there was a fox" --seed 1
    Example: slm generate runs/quickstart/stories -n 3 --max-new-tokens 50
    Example: echo "Once there was a fox" | slm generate runs/quickstart/stories -
    Example: slm generate runs/book --prompts prompts.txt -o texts.jsonl
    """
    if prompt is not None and prompts is not None:
        raise UserError("a PROMPT and --prompts: give one of them")
    if output is not None and Path(output).is_file():
        raise UserError(f"{output}: this file exists; name another for --output, or remove it")
    rows = _read_rows(prompt or "", prompts)
    decoder, tokenizer, settings, advice = open_model(
        model, others, device, seed, USUAL, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
    )  # fmt: skip
    jobs = []
    for place, row in rows:
        ids, most = _encoded(place, row, tokenizer, decoder.max_positions, max_new_tokens, advice, crop)
        jobs += [(row, ids, most, None if seed is None else seed + number) for number in range(samples)]
    with open(output, "w", encoding="utf-8", errors="replace") if output else nullcontext() as file:
        _write(jobs, decoder, tokenizer, settings, stop or [], file)
    if output:
        print(f"{len(jobs):,} texts in {output}")


def _read_rows(prompt: str, prompts: str | None) -> list[tuple[str, Row]]:
    """Each prompt with its place in a file."""
    from slmkit.generation.prompts import read_prompts

    if prompts is None:
        return [("the prompt", {"prompt": sys.stdin.read().rstrip("\n") if prompt == "-" else prompt})]
    if prompts == "-":
        return list(read_prompts(sys.stdin, "standard input"))
    with open(prompts, encoding="utf-8") as file:
        return list(read_prompts(file, prompts))


def _encoded(
    place: str, row: Row, tokenizer: SLMTokenizer, context: int, most: int | None, advice: dict[str, Any], crop: bool
) -> tuple[list[int], int]:
    """The ids of a prompt and how many may follow. Raises `UserError` for too many."""
    from slmkit.generation.prompts import crop_row, encode_row
    from slmkit.model.files.generation_config import new_tokens

    ids = encode_row(tokenizer, row)
    most = most or new_tokens(advice, usual=200, prompt=0 if crop else len(ids))
    if crop and len(ids) + most > context:
        whole, ids = len(ids), crop_row(tokenizer, row, context, most)
        print(f"{place}: its first {whole - len(ids):,} of {whole:,} tokens were left out", file=sys.stderr)
    elif len(ids) >= context:
        raise UserError(
            f"{place}: {len(ids)} tokens, which fills the model's context of {context}: shorten it, or give --crop"
        )
    return ids, most


def _write(
    jobs: list[tuple[Row, list[int], int, int | None]], decoder: LanguageModel, tokenizer: SLMTokenizer,
    settings: SamplingSettings, stop: list[str], file: IO[str] | None,
) -> None:  # fmt: skip
    from slmkit.generation.generator import TextStream

    began, tokens = time.monotonic(), 0
    show = printable if sys.stdout.isatty() else str
    for place, (row, ids, most, seed) in enumerate(jobs):
        drawn = settings.model_copy(update={"seed": seed})
        stream = TextStream(decoder, tokenizer, ids, settings=drawn, max_new_tokens=most, stop=stop)
        if file:
            text = "".join(stream)
            content = {"text": text, "finish_reason": stream.finish_reason, "tokens": stream.tokens}
            file.write(json.dumps(row | content, ensure_ascii=False) + "\n")
            file.flush()
        else:
            if len(jobs) > 1:
                print(f"--- {place + 1} of {len(jobs)}")
            print(show(row.get("prompt", "")), end="", flush=True)
            for piece in stream:
                print(show(piece), end="", flush=True)
            print()
        tokens += stream.tokens
        if stream.finish_reason == "context":
            print(f"the model's context of {decoder.max_positions} tokens ends the text here", file=sys.stderr)
    if sys.stderr.isatty():
        print(f"{tokens:,} tokens, {tokens / (time.monotonic() - began):,.1f} tokens/s", file=sys.stderr)
