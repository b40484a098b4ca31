"""Benchmarks of this machine: training, generation, and data preparation and loading."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from slmkit.adapt.load import load_model
from slmkit.data import stories
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.shards.reader import HEADER, Header, Shard, TokenShards
from slmkit.data.sources import Message
from slmkit.data.stream import PretrainRows, Stream
from slmkit.device import Device, find_device, measured_peak
from slmkit.find import find_model_directory
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.config import SLMConfig
from slmkit.model.initialization import build_decoder
from slmkit.model.presets import PRESETS
from slmkit.model.sizes import flops_per_token, parameter_count
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.estimate.probe import Probe, ProbeTarget, probe
from slmkit.training.recipe.recipe import TrainSettings

BATCHES = (1, 8)  # sequences generated at once


@dataclass(frozen=True)
class TrainingSpeed:
    parameters: int
    measured: Probe
    mfu: float  # share of the measured peak of large matrix products


@dataclass(frozen=True)
class DecodingSpeed:
    """Tokens per second, over all sequences of a batch; medians of several rounds."""

    batch: int
    prompt: float  # prompt tokens, read at once
    new: float  # new tokens, one after the other


def training_speed(preset: str, settings: TrainSettings, steps: int) -> TrainingSpeed:
    """Speed of `steps` real training steps of a new model of a preset on random tokens."""
    device = find_device(settings.device, settings.precision)
    subject = ProbeTarget.fresh(SLMConfig.from_preset(preset))
    architecture = subject.inventory.architecture
    measured = probe(subject, settings, device, steps)
    flops = flops_per_token(architecture, settings.sequence_length or architecture.max_positions)
    mfu = measured.tokens_per_second * (flops.forward + flops.backward) / measured_peak(device)
    return TrainingSpeed(parameter_count(architecture), measured, mfu)


def decoding_speed(model: str, prompt: int, new: int, rounds: int, device: str) -> list[DecodingSpeed]:
    """Speed of greedy generation with a preset (random weights), a model directory or a run, for each of `BATCHES`.

    Raises `UserError` if prompt and new tokens do not fit into the model's context.
    """
    where = find_device(device)
    if model in PRESETS:
        decoder: LanguageModel = build_decoder(SLMConfig.from_preset(model), seed=0).to(where.torch_device).eval()
    else:
        decoder = load_model(find_model_directory(model), where.torch_device)[0]
    return [_decoding_speed(decoder, batch, prompt, new, rounds, where) for batch in BATCHES]


def _decoding_speed(
    decoder: LanguageModel, batch: int, prompt: int, new: int, rounds: int, device: Device
) -> DecodingSpeed:
    ids = torch.randint(200, (batch, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device.torch_device)
    greedy = SamplingSettings(do_sample=False)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        generate_ids(decoder, ids, max_new_tokens=count, stop_ids=set(), settings=greedy, pad_token_id=0).cpu()
        return time.perf_counter() - started

    seconds(2)  # warm-up: loading and allocating at first use
    times = [(seconds(1), seconds(1 + new)) for _ in range(rounds)]
    first = statistics.median(one for one, _ in times)
    more = statistics.median(max(whole - one, 1e-9) for one, whole in times)
    return DecodingSpeed(batch, batch * prompt / first, batch * new / more)


ROUNDS = 5
VOCABULARY = 4096
SHARD_TOKENS = 1 << 28
TEMPLATES = ("chatml", "llama3", "gemma")
ROW, ROWS = 1024, 128  # tokens in a row, rows in a batch

Result = dict[str, Any]


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def processor_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process."""
    started = time.process_time()
    run()
    return time.process_time() - started


def side_by_side(ours: Callable[[], object], other: Callable[[], object], rounds: int = ROUNDS) -> Result:
    """Median seconds of both, run alternately, and the ratio of the other's to ours."""
    pairs = [(seconds(ours), seconds(other)) for _ in range(rounds)]
    ratios = [theirs / mine for mine, theirs in pairs]
    return {
        "seconds": round(statistics.median(mine for mine, _ in pairs), 4),
        "other_seconds": round(statistics.median(theirs for _, theirs in pairs), 4),
        "ratio": _median(ratios, 3),
    }


def _median(values: list[float], digits: int) -> Result:
    return {
        "median": round(statistics.median(values), digits),
        "range": [round(min(values), digits), round(max(values), digits)],
    }


def corpus(megabytes: float) -> tuple[list[str], SLMTokenizer]:
    """`megabytes` of the built-in stories, and a tokenizer trained on part of it."""
    texts: list[str] = []
    size = 0
    for story in stories.tell_many(0, 10_000_000):
        texts.append(story.text)
        size += len(story.text)
        if size >= megabytes * 1e6:
            break
    tokenizer = SLMTokenizer(VOCABULARY)
    tokenizer.train(texts[:5000])
    return texts, tokenizer


def plain_tokenizer(tokenizer: SLMTokenizer) -> Tokenizer:
    """The same vocabulary as a tokenizer of the `tokenizers` library."""
    with temporary_folder() as folder:
        tokenizer.save_pretrained(folder)
        return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encoding(texts: list[str], tokenizer: SLMTokenizer, rounds: int = ROUNDS) -> Result:
    """One thread: our encoder compared with `tokenizers` called from Python, text by text; rates in MB/s."""
    plain = plain_tokenizer(tokenizer)
    size = sum(map(len, texts)) / 1e6
    result = side_by_side(
        lambda: tokenizer.encode_batch(texts, threads=1),
        lambda: [plain.encode(text, add_special_tokens=False).ids for text in texts],
        rounds,
    )
    rates = {"MB/s": size / result["seconds"], "tokenizers MB/s": size / result["other_seconds"]}
    return result | {name: round(rate, 2) for name, rate in rates.items()}


def one_character(texts: list[str], tokenizer: SLMTokenizer, rounds: int = ROUNDS) -> Result:
    """A megabyte of one letter compared with a megabyte of stories: the ratio is stories' time to the letter's."""
    ordinary = "\n".join(texts)[: 1 << 20]
    result = side_by_side(
        lambda: tokenizer.encode_array("a" * len(ordinary)), lambda: tokenizer.encode_array(ordinary), rounds
    )
    return result | {"times ordinary text": round(1 / result["ratio"]["median"], 3)}


def preparation(texts: list[str], tokenizer: SLMTokenizer, folder: Path, rounds: int = ROUNDS) -> Result:
    """`prepare_text` compared with the encoder alone, on the same texts and cores: the ratio is the encoder's share."""
    numbers = itertools.count()
    size = sum(map(len, texts)) / 1e6

    def prepare() -> None:
        prepare_text(texts, tokenizer, folder / str(next(numbers)))

    def encode() -> None:
        tokenizer.encode_batch(texts)

    result = side_by_side(prepare, encode, rounds)
    shares = [processor_seconds(encode) / processor_seconds(prepare) for _ in range(rounds)]
    return result | {"MB/s": round(size / result["seconds"], 2), "ratio of processor time": _median(shares, 3)}


def talks_of(texts: list[str]) -> list[list[Message]]:
    """Conversations of six turns, one text per turn."""
    roles = ("user", "assistant") * 3
    starts = range(0, len(texts) - len(roles) + 1, len(roles))
    return [[{"role": r, "content": text} for r, text in zip(roles, texts[start:])] for start in starts]


def conversations(texts: list[str], tokenizer: SLMTokenizer, folder: Path, rounds: int = ROUNDS) -> Result:
    """`prepare_chat` compared with rendering and encoding single conversations without writing."""
    talks, numbers = talks_of(texts), itertools.count()
    size = sum(len(message["content"]) for talk in talks for message in talk) / 1e6

    def prepare() -> None:
        prepare_chat(talks, tokenizer, folder / f"chat-{next(numbers)}")

    def one_by_one() -> None:
        for talk in talks:
            tokenizer.encode_chat_rows(talk)

    result = side_by_side(prepare, one_by_one, rounds)
    shares = [processor_seconds(one_by_one) / processor_seconds(prepare) for _ in range(rounds)]
    rates = {"conversations/s": round(len(talks) / result["seconds"]), "MB/s": round(size / result["seconds"], 2)}
    return result | rates | {"ratio of processor time": _median(shares, 3)}


def write_sparse_shards(folder: Path, tokens: int) -> TokenShards:
    """Shards of `tokens` tokens, all 0, as sparse files that take no disk space."""
    folder.mkdir(parents=True)
    names = [f"{number:05}" for number in range(-(-tokens // SHARD_TOKENS))]
    for name in names:
        (folder / f"{name}.tokens").touch()
        os.truncate(folder / f"{name}.tokens", 2 * SHARD_TOKENS)
        np.array([SHARD_TOKENS], dtype="<i8").tofile(folder / f"{name}.ends")
    header = Header(
        dtype="uint16", tokenizer="", vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=1,
        tokens=SHARD_TOKENS * len(names), documents=len(names), text_bytes=0, sources=[], masked=False,
        perfect_loss=None, shards=[Shard(name, SHARD_TOKENS, 1, {}) for name in names],
    )  # fmt: skip
    (folder / HEADER).write_text(json.dumps(asdict(header)))
    return TokenShards.open(folder)


def loading(folder: Path, batches: int = 400) -> Result:
    """Batches of random rows from shards, one core: tokens/s, growth of memory (MB), and seconds to resume."""
    opened = seconds(lambda: Stream(PretrainRows(TokenShards.open(folder), ROW), ROWS).batch(0))
    stream = Stream(PretrainRows(TokenShards.open(folder), ROW), ROWS)
    for step in range(20):
        stream.batch(step)
    before, rates, alone = _peak_memory(), [], []
    for begin in range(20, batches, 40):
        rates.append(20 * ROWS * ROW / seconds(functools.partial(_read, stream, range(begin, begin + 20))) / 1e6)
        taken = processor_seconds(functools.partial(_read, stream, range(begin + 20, begin + 40)))
        alone.append(20 * ROWS * ROW / taken / 1e6)
    grown = _peak_memory() - before
    steps = (stream.rows_in_epoch or 0) // ROWS
    positions = np.linspace(0, 3 * steps, 20, dtype=int).tolist()
    places = [seconds(functools.partial(_resumed, folder, step)) for step in positions]
    return {
        "tokens in the shards": len(TokenShards.open(folder)),
        "M tokens/s": _median(rates, 1),
        "M tokens/s of processor time": _median(alone, 1),
        "peak memory grown by MB": round(grown, 1),
        "first open and batch in ms": round(1e3 * opened, 1),
        "resume anywhere in ms": _median([1e3 * place for place in places], 2),
    }


def _read(stream: Stream, steps: range) -> None:
    for step in steps:
        stream.batch(step)


def _resumed(folder: Path, step: int) -> object:
    return Stream(PretrainRows(TokenShards.open(folder), ROW), ROWS).batch(step)


def _peak_memory() -> float:
    """Peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def first_batch(folder: Path, rounds: int = ROUNDS) -> Result:
    """Seconds from the start of a process to its first batch, and the part spent on importing torch."""
    code = (
        "import sys; from slmkit.data.shards.reader import TokenShards; "
        "from slmkit.data.stream import PretrainRows, Stream; "
        f"Stream(PretrainRows(TokenShards.open(sys.argv[1]), {ROW}), {ROWS}).batch(0)"
    )
    result = side_by_side(lambda: _run(code, str(folder)), lambda: _run("import torch"), rounds)
    return {"seconds": result["seconds"], "of them importing torch": result["other_seconds"]}


def _run(code: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def measure(megabytes: float = 20, gigabytes: float = 50, rounds: int = ROUNDS) -> Iterator[tuple[str, Result]]:
    """Yields every measurement with its name. The shards of `gigabytes` are sparse files."""
    texts, tokenizer = corpus(megabytes)
    some = texts[: max(1, len(texts) // 10)]
    yield "encoding, one thread", encoding(some, tokenizer, rounds)
    yield "a megabyte of one character", one_character(texts, tokenizer, rounds)
    with temporary_folder() as folder:
        yield "preparation, all cores", preparation(texts, tokenizer, folder, rounds)
        for name in TEMPLATES:
            chatting = tokenizer.extended(chat_template=name)
            yield f"conversations, {name}", conversations(some, chatting, folder, rounds)
        shards = folder / "0"
        yield "loading", loading(shards)
        write_sparse_shards(folder / "large", round(gigabytes * 1e9 / 2))
        yield f"loading from {gigabytes:g} GB", loading(folder / "large")
        yield "first batch of a process", first_batch(folder / "large", rounds)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slmkit-bench-") as folder:
        yield Path(folder)
