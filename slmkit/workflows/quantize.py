"""`slm quantize`: make models of 8 and 4 bits, and compare them with the original."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.adapt.gptq import gptq
from slmkit.adapt.load import load_model
from slmkit.adapt.quantize import DEFAULT_GROUP, GROUPS, LARGEST, expect_full, quantized_modules, round_to, to_quantize
from slmkit.adapt.quantized_files import load_quantized, save_quantized
from slmkit.adapt.swapping import linears
from slmkit.config import UserError
from slmkit.data.prepare.open_sources import items_of
from slmkit.data.sources import open_source
from slmkit.data.sources.settings import SourceSettings
from slmkit.files import write_whole
from slmkit.files.find import find_model_directory, find_tokenizer_directory
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import copy_extras, quantization_of
from slmkit.model.sizes import parameter_count
from slmkit.tokenizer import SLMTokenizer
from slmkit.workflows.bench import speed_of
from slmkit.workflows.evaluation.evaluate import evaluate
from slmkit.workflows.merge import new_directory

RESULTS = "quantization.json"
LENGTH = 512  # tokens of a row of calibration text
CALIBRATION_ROWS, HELD_OUT_ROWS, LEAST_ROWS = 64, 16, 5
PROMPTS, PROMPT, NEW = 8, 32, 32  # greedy continuations that are compared: how many, tokens of prompt, new tokens
ROUNDS = 3


@dataclass(frozen=True)
class Request:
    """What `slm quantize` was asked for: kinds of weights, columns of a group (None: `DEFAULT_GROUP`), and so on."""

    kinds: Sequence[str]
    output: str | None = None
    group: int | None = None
    embedding: str = "bfloat16"
    method: str = "gptq"
    calibration: str = "stories"
    text: str | None = None


@dataclass(frozen=True)
class Figures:
    """A model's line in the table. `agreement`: share of the original's greedy tokens that are the likeliest here."""

    name: str
    directory: str
    method: str
    bytes: int  # of the files of weights
    bits: float  # a weight
    perplexity: float  # on `Request.text`, or on text that was held out from calibration
    tokens_per_second: float  # decoding one sequence
    agreement: float
    notes: tuple[str, ...] = ()


def expect_possible(model: str, request: Request) -> list[Path]:
    """The output directories. Raises `UserError` for what cannot be done, or a directory that exists."""
    if unknown := next((kind for kind in request.kinds if kind not in LARGEST), None):
        raise UserError(f"--to {unknown}: expected {', '.join(LARGEST)}")
    if len(set(request.kinds)) < len(request.kinds):
        raise UserError(f"--to {' --to '.join(request.kinds)}: give each once")
    if request.group not in (None, *GROUPS):
        raise UserError(f"--group {request.group}: expected {', '.join(map(str, GROUPS))}")
    if request.output is not None and len(request.kinds) > 1:
        raise UserError("--output is for one --to; several get names of their own, such as MODEL-int4")
    name = model.rstrip("/") if Path(model).exists() else Path(model).name  # a folder OWNER would hide the hub's
    outputs = [Path(request.output or f"{name}-{kind}") for kind in request.kinds]
    for output in outputs:
        if output.exists():
            raise UserError(f"{output}: exists already and is not overwritten: name another --output")
    return outputs


def quantize_model(model: str, request: Request, progress: Callable[[str], None] = lambda line: None) -> list[Figures]:
    """Write a directory for each kind, and measure it and the original; figures are also in its quantization.json.

    With GPTQ each 4-bit model is also rounded to nearest; whichever has the lower loss on held-out text, after it was
    saved and loaded, is kept. Raises `UserError` for a model that is quantized already, too little calibration text,
    and output directories that exist.
    """
    outputs, directory = expect_possible(model, request), find_model_directory(model)
    tokenizer = SLMTokenizer.from_pretrained(find_tokenizer_directory(model))
    decoder, config = load_model(directory)
    expect_full(decoder, model)
    length = min(LENGTH, decoder.max_positions)
    rows = text_rows(request.calibration, tokenizer, length)
    calibration, held_out = rows[: -len(rows) // 5], rows[-len(rows) // 5 :]
    progress("measuring the original")
    prompt = min(PROMPT, length // 2)
    expected = prompt, greedy(decoder, held_out[:PROMPTS, :prompt])
    found = [_figures(model, directory, decoder, request, held_out, expected)]
    for kind, output in zip(request.kinds, outputs):
        if quantized_modules(decoder):
            decoder, config = load_model(directory)
        group = request.group or DEFAULT_GROUP[kind]
        chosen = to_quantize(decoder, kind, group, request.embedding)
        with new_directory(output) as folder:
            round_to(decoder, chosen, group)
            save_quantized(decoder, config, folder)
            best, method, notes = load_quantized(folder)[0], "round", _notes(decoder, folder)
            if kind != "int8" and request.method == "gptq":
                decoder, config = load_model(directory)
                gptq(decoder, chosen, group, calibration, functools.partial(_say_layer, progress, kind))
                save_quantized(decoder, config, folder)
                calibrated = load_quantized(folder)[0]
                after, before = loss(calibrated, held_out), loss(best, held_out)
                if after <= before:
                    best, method = calibrated, "gptq"
                else:
                    save_quantized(best, config, folder)
                    worse = f"GPTQ is worse on held-out text, {after:.4f} nats against {before:.4f}"
                    notes += (f"{worse}: rounded instead",)
            copy_extras(directory, folder)
        progress(f"measuring {output}")
        one = _figures(f"{kind}, groups of {group}", output, best, request, held_out, expected)
        found.append(replace(one, method=method, notes=notes))
        write_whole(output / RESULTS, json.dumps([asdict(each) for each in (found[0], found[-1])], indent=2) + "\n")
    return found


def _say_layer(progress: Callable[[str], None], kind: str, done: int, layers: int) -> None:
    progress(f"{kind}: layer {done} of {layers}")


def text_rows(source: str, tokenizer: SLMTokenizer, length: int) -> Tensor:
    """Rows [rows, length] of the beginning of a source of text. Raises `UserError` if it is too short to be divided."""
    ids: list[int] = []
    for document in items_of(open_source(SourceSettings(path=source)), "text"):
        ids += tokenizer.encode(document.text) + ([tokenizer.eos_token_id] if document.ends else [])
        if len(ids) >= length * (CALIBRATION_ROWS + HELD_OUT_ROWS):
            break
    rows = min(len(ids) // length, CALIBRATION_ROWS + HELD_OUT_ROWS)
    if rows < LEAST_ROWS:
        raise UserError(f"{source}: {len(ids):,} tokens are too few to calibrate with: give {LEAST_ROWS * length:,}")
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.inference_mode()
def loss(decoder: Decoder, rows: Tensor) -> float:
    """Nats a token, over all tokens of rows [rows, length] but the first."""
    nats = [
        F.cross_entropy(decoder.logits(decoder(row[None])[0, :-1]).float(), row[1:], reduction="sum").item()
        for row in rows
    ]
    return sum(nats) / (rows.size(0) * (rows.size(1) - 1))


def greedy(decoder: Decoder, prompts: Tensor, new: int = NEW) -> Tensor:
    """prompts [rows, prompt] → with the likeliest `new` tokens after them [rows, prompt + new]."""
    settings = SamplingSettings(do_sample=False)
    return generate_ids(decoder, prompts, max_new_tokens=new, stop_ids=set(), settings=settings, pad_token_id=0)


@torch.inference_mode()
def _figures(
    name: str, directory: Path, decoder: Decoder, request: Request, held_out: Tensor, expected: tuple[int, Tensor]
) -> Figures:
    prompt, ids = expected
    likeliest = decoder.logits(decoder(ids)[:, prompt - 1 : -1]).argmax(-1)  # [rows, new]
    if request.text is None:
        perplexity = math.exp(loss(decoder, held_out))
    else:
        (of_text,) = evaluate(directory, text=[SourceSettings(path=request.text)], device="cpu", cache=False)
        perplexity = of_text.score("perplexity").value
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return Figures(
        name=name, directory=str(directory), method="", bytes=size,
        bits=8 * size / parameter_count(decoder.architecture),
        perplexity=perplexity, tokens_per_second=speed_of(decoder, 1, prompt, NEW, ROUNDS)[1],
        agreement=(likeliest == ids[:, prompt:]).float().mean().item(),
    )  # fmt: skip


def _notes(decoder: Decoder, directory: Path) -> tuple[str, ...]:
    """What stays in 16 bits, and whether `transformers` reads the result."""
    quantized = quantized_modules(decoder)
    wide = [name for name in ("embedding", *linears(decoder)) if name not in quantized]
    names = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in wide)
    why = (quantization_of(directory) or {}).get("why_not_for_transformers")
    kept = f"in 16 bits: {', '.join(names)}" if wide else "nothing in 16 bits but norms"
    return (kept, *([f"only slmkit reads it: {why}"] if why else []))
