"""Programs that run a model, and the comparison of what they read and predict with the reference."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import random
import re
import string
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

from slmkit.config import UserError, one_line
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer

Message = dict[str, str]
SENTENCES = (
    "Once upon a time a small fox lived at the edge of a forest. Every morning it went down to the river, "
    "and every evening it told its sister what it had seen there."
)
# Text that tokenizers read differently from each other: contractions, numbers, spaces, line ends, code, emoji.
PIECES = (
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\x00", "\x1b[0m",
    "'s", "'LL", "’re", "don't", "I'M", "1", "12", "123", "1234567", "3.14", "1,000", "٣٤٥", "२०२६", "Ⅷ", "½", "x²",
    "for i in range(10):\n    print(i)", "</div>", "a_b.c(d)[0] += 1;", "{\"k\": [1, null]}", "//", "#!", "\\n", "===",
    "🙂", "👩‍🚀", "🏳️‍🌈", "🇩🇪", "👍🏽", "e\u0301", "A\u030a\u0323", "ﬁ", "ß", "ẞ", "İ", "ǅ", "한국어", "日本語です",
    "我们在这里", "각", "ไทย", "नमस्ते",
)  # fmt: skip
MOST_TIES = 16  # of greedy tokens, that are passed over
MOST_LETTERS = 400  # of a script, the first, which are the usual ones
NORMALISED = 1e-2  # how far the logarithm of the sum of all probabilities may be from 0
TAGGED = 20  # conversations with special tokens in a message


class Runtime(Protocol):
    """A program that runs a model: how it reads text, and what it predicts. Use it as a context manager."""

    name: str  # as in the table of `slm verify`
    size: int  # of the files of weights, in bytes

    def encode(self, text: str) -> list[int]:
        """Ids [tokens] of a text, without beginning or end; special tokens spelled in it are ordinary text."""

    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """Natural log-probabilities, over the whole vocabulary, of the token after ids[:length].

        → float32 [lengths, vocab_size]
        """

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens after `ids` [tokens], one after another. End tokens do not stop it."""

    def encode_chat(self, messages: list[Message]) -> list[int] | None:
        """Ids [tokens] of the rendered prompt, with the generation prompt; None without a chat template."""
        return None

    def close(self) -> None:
        """Ends processes and frees memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


@dataclass(frozen=True)
class Bounds:
    """How far a runtime may be from the reference."""

    log_prob: float  # the largest difference of a log-probability, in nats
    kl: float  # Kullback-Leibler divergence from the reference, the mean over positions, in nats
    greedy: bool  # whether greedy tokens must be equal


EXACT = Bounds(1e-3, 1e-5, True)
# Divergence by the bits of a weight; of a wrong conversion, such as permuted rows, it is several nats.
ROUNDED = {16: 0.01, 8: 0.02, 6: 0.05, 5: 0.1, 4: 0.3, 3: 1.0, 2: 2.0}


def bounds_of(kind: str) -> Bounds:
    """The bounds for weights of a kind that any target names, such as F32, bfloat16, Q4_K_M or int8."""
    bits = int((re.findall(r"\d+", kind) or ["32"])[0])
    return EXACT if bits >= 32 else Bounds(float("inf"), ROUNDED.get(bits, ROUNDED[2]), False)


@dataclass(frozen=True)
class Probe:
    """What runtimes are asked: the same for the same model and tokenizer."""

    strings: list[str]
    conversations: list[list[Message]]
    tagged: list[list[Message]]  # with special tokens spelled in the messages
    readings: list[list[list[int]]]  # of each: their ids as ordinary text, and as tokens, as transformers reads them
    prompts: list[tuple[list[int], list[int]]]  # ids [tokens], and the lengths after which the next token is predicted
    start: list[int]  # ids [tokens] after which greedy tokens are compared
    count: int  # of greedy tokens

    @classmethod
    def of(
        cls, decoder: Decoder, tokenizer: SLMTokenizer, strings: int = 10_000, conversations: int = 200,
        count: int = 256,
    ) -> Probe:  # fmt: skip
        """Texts of all scripts; positions also past each window and past the original context, where there are some."""
        rng, most = random.Random(17), decoder.max_positions - 1
        known = [index for index in np.flatnonzero(tokenizer.known_ids).tolist() if index < decoder.vocab_size]
        edges = {layer.window or 0 for layer in decoder.architecture.layers}
        edges |= {int(getattr(rope.scaling, "original_max_position_embeddings", 0)) for rope in decoder.ropes}
        last = min(most, max(256, max(edges) + 64))
        lengths = {1, 2, 30, 200, last, *(edge + more for edge in edges for more in (-1, 0, 1, 40))}
        start = tokenizer.encode_prompt(SENTENCES)[: max(1, most // 2)]
        texts = probe_strings((*tokenizer.special_tokens, *tokenizer.added_words), strings)
        plain, tagged = _conversations(tokenizer, texts, conversations)
        prompts = [
            (rng.choices(known, k=last), sorted(length for length in lengths if 0 < length <= last)),
            (start, [*range(1, len(start) + 1, 4)]),
        ]
        readings = [[ids, _read_openly(tokenizer, ids)] for ids in map(tokenizer.encode_chat_prompt, tagged)]
        return cls(texts, plain, tagged, readings, prompts, start, min(count, most - len(start)))

    @property
    def context(self) -> int:
        """The tokens of the longest text, with its continuation."""
        return max(len(self.start) + self.count, *(len(ids) + 1 for ids, _ in self.prompts))


def probe_strings(spellings: Sequence[str], count: int) -> list[str]:
    """`count` texts of up to 12 pieces: words of each script, of English, `PIECES`, any characters, `spellings`."""
    rng, scripts = random.Random(23), dict[str, list[str]]()
    anything = [*filter(str.isprintable, map(chr, range(0x32000)))]
    for character in anything:
        if unicodedata.category(character)[0] in "LMN":  # a script is the first word of a letter's name
            scripts.setdefault(unicodedata.name(character, "other").split()[0], []).append(character)
    endless = [itertools.cycle(rng.sample(some := each[:MOST_LETTERS], len(some))) for each in scripts.values()]
    texts = []
    for letters in itertools.islice(itertools.cycle(endless), count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.5:
                part = "".join(itertools.islice(letters, rng.randint(1, 8)))
            else:
                part = rng.choice(
                    rng.choice((SENTENCES.split(), string.printable, PIECES, anything, spellings or PIECES))
                )
            parts.append(part + rng.choice(("", "", " ")))
        texts.append("".join(parts))
    return texts


def _conversations(
    tokenizer: SLMTokenizer, texts: Sequence[str], count: int
) -> tuple[list[list[Message]], list[list[Message]]]:
    """Conversations that the chat template renders: about `count` without special tokens in a message, a few with."""
    if tokenizer.chat_template is None:
        return [], []
    rng, found, special = random.Random(29), list[list[Message]](), (*tokenizer.special_tokens,)
    said = [text for text in texts if text.strip() and not any(token in text for token in special)] or ["Hello!"]
    for number in range(count):
        roles = [*["system"] * (number % 3 == 0), *["user", "assistant"] * rng.randint(0, 2), "user"]
        messages = [{"role": role, "content": rng.choice(said)} for role in roles]
        with contextlib.suppress(UserError):  # some templates take no system message
            if (ids := tokenizer.encode_chat_prompt(messages)) and messages not in found:
                found.append(messages)
    is_open = found and _read_openly(tokenizer, ids) == ids
    tagged = [[{"role": "user", "content": f"What does {token} mean?"}] for token in special[:TAGGED]]
    return found, tagged if is_open else []


def _read_openly(tokenizer: SLMTokenizer, ids: list[int]) -> list[int]:
    """The ids [tokens] of the text of `ids` with special tokens recognised wherever they are spelled."""
    return tokenizer.encode(tokenizer.decode(ids), allow_special=True)


@dataclass
class Answers:
    """What a runtime answers to a probe."""

    texts: list[list[int]]  # ids
    chats: list[list[int] | None]
    tagged: list[list[int] | None]
    log_probs: list[np.ndarray]  # of each prompt [lengths, vocab_size]
    greedy: list[int]
    tokens_per_second: float

    @classmethod
    def of(cls, runtime: Runtime, probe: Probe) -> Answers:
        log_probs = [runtime.log_probs(ids, lengths) for ids, lengths in probe.prompts]
        began = time.perf_counter()
        greedy = runtime.greedy(probe.start, probe.count)
        speed = len(greedy) / (time.perf_counter() - began)
        texts = [runtime.encode(text) for text in probe.strings]
        chats, tagged = ([runtime.encode_chat(each) for each in asked] for asked in (probe.conversations, probe.tagged))
        return cls(texts, chats, tagged, log_probs, greedy, speed)


@dataclass(frozen=True)
class Parity:
    """The result of a comparison: figures of each check, and a line for each that failed."""

    reference: str
    runtime: str
    bounds: Bounds
    size: int
    tokens_per_second: float
    checks: dict[str, dict[str, Any]]
    failures: list[str]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self, **about: Any) -> str:
        """The content of parity.json, with `about` (versions, date and fingerprints) before the figures."""
        content = {"passed": self.passed, **about, **dataclasses.asdict(self)}
        finite = json.loads(json.dumps(content), parse_constant=lambda name: None)  # JSON has neither NaN nor infinity
        return json.dumps(finite, indent=2, ensure_ascii=False) + "\n"


Check = tuple[dict[str, Any], str]  # figures, and in which way it failed; empty: it passed


def compare(
    reference: Runtime, other: Runtime, probe: Probe, bounds: Bounds, expected: Answers | None = None
) -> Parity:
    """Ask both runtimes, and compare. `expected`: the reference's answers, where they are known already."""
    expected = expected or Answers.of(reference, probe)
    found = expected if other is reference else Answers.of(other, probe)
    readings = [ids if ids in accepted else accepted[0] for ids, accepted in zip(found.tagged, probe.readings)]
    checks = {
        "token ids": _compare_ids(probe.strings, expected.texts, found.texts),
        "chat prompts": _compare_ids(probe.conversations, expected.chats, found.chats),
        "tags in messages": _compare_ids(probe.tagged, readings, found.tagged),
        "log-probabilities": _compare_log_probs(probe, bounds, expected, found),
        "greedy tokens": _compare_greedy(reference, other, probe, bounds, expected.greedy, found.greedy),
    }
    return Parity(
        reference.name, other.name, bounds, other.size, found.tokens_per_second,
        {name: figures for name, (figures, _) in checks.items()},
        [f"{name}: {problem}" for name, (_, problem) in checks.items() if problem],
    )  # fmt: skip


def _compare_ids(asked: Sequence[Any], expected: Sequence[Any], found: Sequence[Any]) -> Check:
    wrong = [number for number, (ours, theirs) in enumerate(zip(expected, found)) if ours != theirs]
    figures, problem = {"compared": len(expected), "different": len(wrong)}, ""
    if wrong:
        first = min(wrong, key=lambda number: len(str(asked[number])))
        ids = [str(each[first])[:80] for each in (found, expected)]
        problem = f"{len(wrong):,} of {len(expected):,} differ: {str(asked[first])[:80]!r} is {ids[0]} and not {ids[1]}"
    return figures, problem


def _compare_log_probs(probe: Probe, bounds: Bounds, expected: Answers, found: Answers) -> Check:
    furthest, divergences = (0.0, 0), []
    for (_, lengths), ours, theirs in zip(probe.prompts, expected.log_probs, found.log_probs):
        if ours.shape != theirs.shape:
            return {}, f"a vocabulary of {theirs.shape[-1]:,} instead of {ours.shape[-1]:,} tokens"
        for length, p, q in zip(lengths, ours.astype(np.float64), theirs.astype(np.float64)):
            totals = [float(np.log(np.exp(each).sum())) for each in (p, q)]  # 0 for probabilities that add up to 1
            if not np.isfinite(q).all() or abs(totals[1]) > NORMALISED:
                return {}, f"after {length} tokens they are not finite, or no distribution"
            divergences.append(float((np.exp(p) * (p - totals[0] - q + totals[1])).sum()))
            furthest = max(furthest, (float(np.abs(p - q).max()), length))
    kl, (apart, length), problem = float(np.mean(divergences)), furthest, ""
    if apart > bounds.log_prob:
        problem = f"{apart:.2g} nats apart after {length} tokens, the bound is {bounds.log_prob:g}"
    elif kl > bounds.kl:
        problem = f"a mean divergence of {kl:.2g} nats, the bound is {bounds.kl:g}"
    return {"positions": len(divergences), "max_abs": apart, "after": length, "mean_kl": kl}, problem


def _compare_greedy(
    reference: Runtime, other: Runtime, probe: Probe, bounds: Bounds, expected: list[int], found: list[int]
) -> Check:
    """Where the reference's two likeliest tokens are closer than the bound, either may be next, and both runtimes go on
    after the reference's: a tie.
    """
    equal, ties, problem = _equal(expected, found), 0, ""
    while equal < probe.count and bounds.greedy:
        before = [*probe.start, *expected[:equal]]
        log_probs = reference.log_probs(before, [len(before)])[0]
        second, first = np.argsort(log_probs)[-2:]
        is_tie = log_probs[first] - log_probs[second] < bounds.log_prob
        if not is_tie or found[equal : equal + 1] not in ([first], [second]) or ties == MOST_TIES:
            problem = f"only the first {equal} of {probe.count} are equal"
            break
        ties += 1
        rest = probe.count - equal - 1
        found = expected[: equal + 1] + (other.greedy([*before, expected[equal]], rest) if rest else [])
        equal = _equal(expected, found)
    return {"compared": probe.count, "equal": equal, "ties": ties}, problem


def _equal(expected: Sequence[int], found: Sequence[int]) -> int:
    """How many tokens at the beginning are equal."""
    return next((n for n, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))


class Slmkit(Runtime):
    """slmkit's own decoder, quantized or not. `size`: of its files of weights, in bytes."""

    def __init__(self, decoder: Decoder, tokenizer: SLMTokenizer, size: int, name: str = "slmkit") -> None:
        self.decoder, self.tokenizer, self.size, self.name = decoder, tokenizer, size, name

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def encode_chat(self, messages: list[Message]) -> list[int] | None:
        return self.tokenizer.encode_chat_prompt(messages) if self.tokenizer.chat_template else None

    @torch.inference_mode()
    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        def read(part: Sequence[int], places: list[int]) -> torch.Tensor:
            hidden = self.decoder(torch.tensor([part]))[0, places]
            return self.decoder.logits(hidden)  # [places, vocab_size]

        return _at(read, ids, lengths, any(rope.depends_on_length for rope in self.decoder.ropes))

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        cache, fresh, found = self.decoder.new_cache(1, len(ids) + count, len(ids)), list(ids), list[int]()
        for _ in range(count):
            hidden = self.decoder(torch.tensor([fresh]), cache)[0, -1]
            fresh = [int(self.decoder.logits(hidden).argmax())]
            found += fresh
        return found


class Transformers(Runtime):
    """`transformers`, with weights in the precision of the files unless `dtype` names another.

    Raises `UserError` if it is not installed, cannot read the directory, or misses or does not know a tensor.
    """

    name = "transformers"

    def __init__(self, directory: Path, dtype: str = "auto") -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError("transformers is not installed: pip install transformers")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                self._model, said = transformers.AutoModelForCausalLM.from_pretrained(
                    directory, dtype=dtype, local_files_only=True, output_loading_info=True
                )
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise UserError(f"transformers cannot read {directory}: {one_line(error)[:300]}") from None
        wrong = {kind: sorted(map(str, said[kind])) for kind in said if kind.endswith("_keys") and said[kind]}
        if wrong:
            raise UserError(f"transformers finds wrong tensors in {directory}: {str(wrong)[:300]}")
        self._model.eval()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_chat(self, messages: list[Message]) -> list[int] | None:
        if self._tokenizer.chat_template is None:
            return None
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    @torch.inference_mode()
    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        def read(part: Sequence[int], places: list[int]) -> torch.Tensor:
            return self._model(torch.tensor([part]), logits_to_keep=torch.tensor(places)).logits[0]

        return _at(read, ids, lengths, '"dynamic"' in self._model.config.to_json_string())  # its kind of RoPE

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        fresh, cache, found = list(ids), None, list[int]()
        for _ in range(count):
            out = self._model(torch.tensor([fresh]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            fresh, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
            found += fresh
        return found


def _at(read: Any, ids: Sequence[int], lengths: Sequence[int], each_apart: bool) -> np.ndarray:
    """Log-probabilities [lengths, vocab_size] by `read`, (ids, places) → logits [places, vocab_size]: in one pass, or
    with `each_apart` one for each length.
    """
    passes = [[length] for length in lengths] if each_apart else [list(lengths)]
    logits = torch.cat([read(ids[: max(each)], [length - 1 for length in each]) for each in passes])
    return logits.float().log_softmax(-1).numpy()
