"""Preparing and feeding text, beside `tokenizers`, `datasets` and `litdata`, in one run.

python benchmarks/data.py            # three minutes on two cores; SLMKIT_LITDATA_PYTHON names a Python with litdata
"""

from __future__ import annotations

import dataclasses
import datetime
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_peers import measure_peers, plain_tokenizer
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.shards.reader import HEADER, Header, Shard, TokenShards
from slmkit.data.stream import PretrainRows, Stream
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.logging.metrics_log import environment
from slmkit.workflows.bench import ROW, ROWS, VOCABULARY, corpus, seconds, talks_of

RESULTS = Path(__file__).parent / "results" / "data.json"
ROUNDS = 5
SHARD_TOKENS = 1 << 28
TEMPLATES = ("chatml", "llama3", "gemma")
FIRST_BATCH = f"""
import sys
from slmkit.data.shards.reader import TokenShards
from slmkit.data.stream import PretrainRows, Stream
Stream(PretrainRows(TokenShards.open(sys.argv[1]), {ROW}), {ROWS}).batch(0)
"""
Result = dict[str, Any]


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
    result = side_by_side(lambda: tokenizer.encode("a" * len(ordinary)), lambda: tokenizer.encode(ordinary), rounds)
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


def conversations(texts: list[str], tokenizer: SLMTokenizer, folder: Path, rounds: int = ROUNDS) -> Result:
    """`prepare_chat` compared with rendering and encoding single conversations without writing."""
    talks, numbers = talks_of(texts), itertools.count()
    size = sum(len(message["content"]) for talk in talks for message in talk) / 1e6

    def prepare() -> None:
        prepare_chat(talks, tokenizer, folder / f"chat-{next(numbers)}")

    def one_by_one() -> None:
        for talk in talks:
            tokenizer.encode_rendered([tokenizer.render_chat(talk)])

    result = side_by_side(prepare, one_by_one, rounds)
    shares = [processor_seconds(one_by_one) / processor_seconds(prepare) for _ in range(rounds)]
    rates = {"conversations/s": round(len(talks) / result["seconds"]), "MB/s": round(size / result["seconds"], 2)}
    return result | rates | {"ratio of processor time": _median(shares, 3)}


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
    (folder / HEADER).write_text(json.dumps(dataclasses.asdict(header)))
    return TokenShards.open(folder)


def run_python(code: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def first_batch(folder: Path, rounds: int = ROUNDS) -> Result:
    """Seconds from the start of a process to its first batch, and the part spent on importing torch."""
    result = side_by_side(lambda: run_python(FIRST_BATCH, str(folder)), lambda: run_python("import torch"), rounds)
    return {"seconds": result["seconds"], "of them importing torch": result["other_seconds"]}


def measure(megabytes: float = 20, gigabytes: float = 50, rounds: int = ROUNDS) -> Iterator[tuple[str, Result]]:
    """Yields every measurement with its name. The shards of `gigabytes` are sparse files."""
    texts, tokenizer = corpus(megabytes)
    some = texts[: max(1, len(texts) // 10)]
    yield "encoding, one thread", encoding(some, tokenizer, rounds)
    yield "a megabyte of one character", one_character(texts, tokenizer, rounds)
    with tempfile.TemporaryDirectory(prefix="slmkit-bench-") as name:
        folder = Path(name)
        yield "preparation, all cores", preparation(texts, tokenizer, folder, rounds)
        for template in TEMPLATES:
            chatting = tokenizer.extended(chat_template=template)
            yield f"conversations, {template}", conversations(some, chatting, folder, rounds)
        shards = folder / "0"
        yield "loading", loading(shards)
        write_sparse_shards(folder / "large", round(gigabytes * 1e9 / 2))
        yield f"loading from {gigabytes:g} GB", loading(folder / "large")
        yield "first batch of a process", first_batch(folder / "large", rounds)


def main() -> None:
    result: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "what": f"built-in stories, vocabulary of 4,096, rows of 1,024 tokens; {ROUNDS} rounds in turn",
        "environment": environment() | {name: version(name) for name in ("datasets", "tiktoken")},
    }
    for name, figures in itertools.chain(measure(), measure_peers()):
        result[name] = figures
        print(f"{name}: {json.dumps(figures)}", flush=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
