"""Benchmarks of this machine: training, generation, and data preparation and loading."""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from slmkit.adapt.load import load_model
from slmkit.adapt.quantize import quantized_modules, round_to, to_quantize
from slmkit.config import UserError, load_settings, warn_once
from slmkit.data import stories
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Message
from slmkit.data.stream import PretrainRows, Stream
from slmkit.device import find_device, measured_peak, seconds_to_read
from slmkit.files.find import find_model_directory
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.config import PRESETS, SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.estimate.probe import Probe, probe
from slmkit.training.logging.logger import StepFlops
from slmkit.training.recipe.recipe import Recipe, find_recipe, load_recipe, shipped_recipes
from slmkit.workflows.plan import RunEstimate, plan_recipe

BATCHES = (1, 4, 16)  # sequences generated at once
BITS, GROUP = ("int8", "int4"), 32  # the kinds of weights to measure, in the groups of `slm quantize`
VOCABULARY = 4096
ROW, ROWS = 1024, 128  # tokens in a row, rows in a batch


@dataclass(frozen=True)
class TrainingSpeed:
    foretold: RunEstimate  # by arithmetic, without any step
    measured: Probe

    def mfu(self, tokens_per_second: float) -> float:
        """Share of the measured peak of large matrix products."""
        flops = StepFlops(self.foretold.profile.model, self.foretold.length).of_step(1, 1)
        return tokens_per_second * flops / measured_peak(self.foretold.device)


@dataclass(frozen=True)
class DecodingSpeed:
    """Tokens per second, over all sequences of a batch; medians of several rounds."""

    weights: str  # float32, bfloat16, int8 …
    batch: int
    prompt: float  # prompt tokens
    new: float  # new tokens, one after the other in each sequence
    limit: float  # new tokens if a step took only as long as reading the weights from memory

    @property
    def reached(self) -> float:
        """The share of the limit."""
        return self.new / self.limit


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    return statistics.median(seconds(run) for _ in range(rounds))


def training_speed(name: str, overrides: Sequence[str], steps: int) -> TrainingSpeed:
    """Speed of `steps` real training steps of a new model on random tokens, beside the forecast without measuring.

    `name` is a recipe, or a preset for which there is none, with the settings that recipes have by default.
    Raises `UserError` for neither, and for a wrong override (`train.optimizer=muon`).
    """
    if name in PRESETS and name not in shipped_recipes():
        size = {"vocab_size": SLMConfig.from_preset(name).vocab_size}
        recipe = load_settings(Recipe, {"model": {"preset": name}, "tokenizer": size}, overrides)
    else:
        recipe = load_recipe(find_recipe(name), overrides)
    lengths = {"max_steps": steps, "max_tokens": None, "num_train_epochs": None}
    train = recipe.train.model_copy(update=lengths)
    foretold = plan_recipe(recipe.model_copy(update={"train": train}), measure=False)
    return TrainingSpeed(foretold, probe(foretold.profile, foretold.recipe.train, foretold.device, steps))


def decoding_speed(model: str, prompt: int, new: int, rounds: int, device: str) -> Iterator[DecodingSpeed]:
    """Speed of greedy generation for each of `BATCHES`: the model as it is, then in int8 and int4, made in memory.

    `model` is a preset (random weights), a model directory or a run. A quantized model is only measured as it is,
    and so is one whose matrices cannot be quantized, with a warning.
    Raises `UserError` if prompt and new tokens do not fit into the model's context.
    """
    found = find_device(device)
    for weights in (None, *BITS):
        if model in PRESETS:
            decoder = build_decoder(SLMConfig.from_preset(model), seed=0).to(found.torch_device).eval()
        else:
            decoder = load_model(find_model_directory(model), found.torch_device)[0]
        kinds = [module.kind for module in quantized_modules(decoder).values()]
        if weights is not None:
            if kinds:
                return
            try:
                round_to(decoder, to_quantize(decoder, weights, GROUP, "int8"), GROUP)
            except UserError:
                warn_once(f"{model}: not measured in {weights}: no matrix has columns in groups of {GROUP}")
                continue
        name = weights or statistics.mode(kinds or [str(decoder.dtype).removeprefix("torch.")])
        a_step = seconds_to_read(bytes_of_a_step(decoder), found)
        for batch in BATCHES:
            speeds = speed_of(decoder, batch, prompt, new, rounds)
            yield DecodingSpeed(name, batch, *speeds, limit=batch / a_step)


def bytes_of_a_step(decoder: Decoder) -> int:
    """Bytes of the weights that a decoding step reads: all but those of embeddings of which it looks up rows."""
    unread = ("place.",) if decoder.head is None else ("place.", "embedding.")
    tensors = itertools.chain(decoder.named_parameters(), decoder.named_buffers())
    return sum(tensor.nbytes for name, tensor in tensors if not name.startswith(unread))


def speed_of(decoder: Decoder, batch: int, prompt: int, new: int, rounds: int) -> tuple[float, float]:
    """Prompt tokens and new tokens a second of greedy generation for `batch` prompts; medians of several rounds."""
    ids = torch.randint(200, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(decoder.device)
    greedy = SamplingSettings(do_sample=False)

    def generate(count: int) -> None:
        generate_ids(decoder, ids, max_new_tokens=count, stop_ids=set(), settings=greedy, pad_token_id=0).cpu()

    generate(2)  # warm-up: loading and allocating at first use
    times = [(seconds(lambda: generate(1)), seconds(lambda: generate(1 + new))) for _ in range(rounds)]
    first = statistics.median(one for one, _ in times)
    more = statistics.median(max(whole - one, 1e-9) for one, whole in times)
    return batch * prompt / first, batch * new / more


# -- data -------------------------------------------------------------------------------------------------------------


def data_speed(megabytes: float, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields the figures of each kind of work, with its name; medians of `rounds`."""
    texts, tokenizer = corpus(megabytes)
    talks = talks_of(texts[: max(1, len(texts) // 10)])
    size, size_of_talks = sum(map(len, texts)) / 1e6, sum(len(m["content"]) for talk in talks for m in talk) / 1e6
    with tempfile.TemporaryDirectory(prefix="slmkit-bench-") as name:
        folders = (Path(name, str(number)) for number in itertools.count())
        taken = median_seconds(lambda: tokenizer.encode_batch(texts, threads=1), rounds)
        yield "encoding, one thread", {"MB/s": size / taken}
        taken = median_seconds(lambda: prepare_text(texts, tokenizer, next(folders)), rounds)
        yield "preparation, all cores", {"MB/s": size / taken}
        taken = median_seconds(lambda: prepare_chat(talks, tokenizer, next(folders)), rounds)
        yield "conversations, all cores", {"conversations/s": len(talks) / taken, "MB/s": size_of_talks / taken}
        yield "loading", loading_speed(Path(name, "0"))


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


def talks_of(texts: list[str]) -> list[list[Message]]:
    """Conversations of six turns, one text per turn."""
    roles = ("user", "assistant") * 3
    starts = range(0, len(texts) - len(roles) + 1, len(roles))
    return [[{"role": r, "content": text} for r, text in zip(roles, texts[start:])] for start in starts]


def loading_speed(folder: Path) -> dict[str, float]:
    """Batches of random rows from shards, one core: their rate, and the time to open the shards at any step."""

    def resumed(step: int) -> Stream:
        stream = Stream(PretrainRows(TokenShards.open(folder), ROW), ROWS)
        stream.batch(step)
        return stream

    stream = resumed(0)
    times = [seconds(functools.partial(stream.batch, step)) for step in range(20, 220)]
    positions = np.linspace(0, 3 * (stream.rows_in_epoch or 0) // ROWS, 20, dtype=int).tolist()
    places = [seconds(functools.partial(resumed, step)) for step in positions]
    return {
        "tokens in the shards": len(TokenShards.open(folder)),
        "M tokens/s": ROWS * ROW / statistics.median(times) / 1e6,
        "resume anywhere in ms": 1e3 * statistics.median(places),
    }
