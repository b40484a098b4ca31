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
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
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
    "🙂", "👩‍🚀", "🏳️‍🌈", "🇩🇪", "👍🏽", "e\u0301", "A\u030a\u0323", "ﬁ", "ß", "ẞ", "İ", "ǅ", "한국어", "각", "日本語",
    "ไทย", "नमस्ते",
)  # fmt: skip
MOST_TIES = 16  # of greedy tokens, that are passed over
LENGTH_DECIDES = ("dynamic", "longrope")  # kinds of RoPE whose angles depend on the length of the text


class Runtime(Protocol):
    """A program that runs a model: how it reads text, and what it predicts. Use it as a context manager."""

    name: str  # as in the table of `slm verify`
    size: int  # of the files of weights, in bytes

    def encode(self, text: str) -> list[int]:
        """Ids [tokens] of a text, without beginning or end; special tokens spelled in it are ordinary text."""
        ...

    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """Natural log-probabilities, over the whole vocabulary, of the token after ids[:length].

        → float32 [lengths, vocab_size]
        """
        ...

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens after `ids` [tokens], one after another. End tokens do not stop it."""
        ...

    def encode_chat(self, messages: list[Message]) -> list[int] | None:
        """Ids [tokens] of the rendered prompt, with the generation prompt; None without a chat template."""
        return None

    def close(self) -> None:
        """Ends processes and frees memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


# -- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """How far a runtime may be from the reference."""

    log_prob: float  # the largest difference of a log-probability, in nats
    kl: float  # Kullback-Leibler divergence from the reference, the mean over positions, in nats
    greedy: bool  # whether greedy tokens must be equal


EXACT = Bounds(1e-3, 1e-5, True)
# Divergence by the bits of a weight. A wrong conversion, such as permuted rows, has several nats.
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
    prompts: list[tuple[list[int], list[int]]]  # ids [tokens], and the lengths after which the next token is predicted
    start: list[int]  # ids [tokens] after which greedy tokens are compared
    count: int  # of greedy tokens

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        tokenizer: SLMTokenizer,
        strings: int = 10_000,
        conversations: int = 200,
        count: int = 256,
    ) -> Probe:
        """Texts of all scripts; positions also past each window and past the original context, where there are some."""
        rng, most = random.Random(17), decoder.max_positions - 1
        known = [index for index in np.flatnonzero(tokenizer.known_ids).tolist() if index < decoder.vocab_size]
        edges = {layer.window or 0 for layer in decoder.architecture.layers}
        edges |= {int(getattr(rope, "original_max_position_embeddings", 0)) for rope in decoder.ropes}
        last = min(most, max(256, max(edges) + 64))
        around = (1, 2, 30, 200, last, *(edge + more for edge in edges for more in (-1, 0, 1, 40)))
        start = tokenizer.encode_prompt(SENTENCES)[: max(1, most // 2)]
        texts = probe_strings((*tokenizer.special_tokens, *tokenizer.added_words), strings)
        return cls(
            texts,
            _renderable(tokenizer, texts, conversations),
            [
                (rng.choices(known, k=last), sorted({one for one in around if 0 < one <= last})),
                (start, [*range(1, len(start) + 1, 4)]),
            ],
            start,
            min(count, most - len(start)),
        )  # fmt: skip


@cache
def letters_by_script() -> dict[str, str]:
    """The letters, marks and digits of each script, by the first word of their names in Unicode."""
    scripts: dict[str, str] = {}
    for code in range(0x20, 0x32000):
        if unicodedata.category(chr(code))[0] in "LMN":
            script = unicodedata.name(chr(code), "other").split()[0]
            scripts[script] = scripts.get(script, "") + chr(code)
    return scripts


def probe_strings(spellings: Sequence[str], count: int) -> list[str]:
    """`count` texts of 1 to 12 pieces: words of every script in turn, `PIECES`, any other characters, `spellings`."""
    rng, scripts = random.Random(23), sorted(letters_by_script().items())
    anything = [chr(code) for code in range(0x32000) if unicodedata.category(chr(code))[0] not in "C"]
    texts = []
    for (_, letters), _ in zip(itertools.cycle(scripts), range(count)):
        parts = []
        for _ in range(rng.randint(1, 12)):
            word = "".join(rng.choices(letters, k=rng.randint(1, 8)))
            other = rng.choice(rng.choice((PIECES, anything, spellings or PIECES)))
            parts.append(rng.choice((word, word, other)) + rng.choice(("", "", " ")))
        texts.append("".join(parts))
    return texts


def _renderable(tokenizer: SLMTokenizer, texts: Sequence[str], count: int) -> list[list[Message]]:
    """`count` conversations that the chat template renders, with no special token in a message; none without one."""
    if tokenizer.chat_template is None:
        return []
    rng, found = random.Random(29), []
    said = [text for text in texts if text.strip() and not any(token in text for token in tokenizer.special_tokens)]
    for number in range(count if said else 0):
        roles = [*(["system"] if number % 3 == 0 else []), *["user", "assistant"] * rng.randint(0, 2), "user"]
        messages = [{"role": role, "content": rng.choice((*PIECES[14:16], rng.choice(said)))} for role in roles]
        try:
            tokenizer.encode_chat_prompt(messages)
        except UserError:  # some templates take no system message
            continue
        found.append(messages)
    return found


@dataclass
class Answers:
    """What a runtime answers to a probe."""

    texts: list[list[int]]  # ids
    chats: list[list[int] | None]
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
        return cls(texts, [runtime.encode_chat(each) for each in probe.conversations], log_probs, greedy, speed)


@dataclass
class Parity:
    """The result of a comparison: figures of each check, and a line for each that failed."""

    reference: str
    runtime: str
    bounds: Bounds
    size: int
    tokens_per_second: float
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self, **about: Any) -> str:
        """The content of parity.json, with `about` (versions, date and fingerprints) before the figures."""
        content = {"passed": self.passed, **about, **dataclasses.asdict(self)}
        finite = json.loads(json.dumps(content), parse_constant=lambda name: None)  # JSON has neither NaN nor infinity
        return json.dumps(finite, indent=2, ensure_ascii=False) + "\n"


def compare(
    reference: Runtime, other: Runtime, probe: Probe, bounds: Bounds, expected: Answers | None = None
) -> Parity:
    """Ask both runtimes, and compare. `expected`: the reference's answers, where they are known already."""
    expected, found = expected or Answers.of(reference, probe), Answers.of(other, probe)
    parity = Parity(reference.name, other.name, bounds, other.size, found.tokens_per_second)
    _compare_ids(parity, "token ids", probe.strings, expected.texts, found.texts)
    _compare_ids(parity, "chat prompts", probe.conversations, expected.chats, found.chats)
    _compare_log_probs(parity, probe, expected, found)
    _compare_greedy(parity, reference, other, probe, expected.greedy, found.greedy)
    return parity


def _compare_ids(
    parity: Parity, check: str, asked: Sequence[Any], expected: Sequence[Any], found: Sequence[Any]
) -> None:
    wrong = [number for number, (ours, theirs) in enumerate(zip(expected, found)) if ours != theirs]
    parity.checks[check] = {"compared": len(expected), "different": len(wrong)}
    if wrong:
        first = min(wrong, key=lambda number: len(str(asked[number])))
        ours, theirs = expected[first], found[first]
        parity.failures.append(
            f"{check}: {len(wrong):,} of {len(expected):,} differ, such as {str(asked[first])[:80]!r}: "
            f"{str(ours)[:80]} in {parity.reference}, {str(theirs)[:80]} in {parity.runtime}"
        )


def _compare_log_probs(parity: Parity, probe: Probe, expected: Answers, found: Answers) -> None:
    check, furthest, divergences = "log-probabilities", (0.0, 0), []
    for (_, lengths), ours, theirs in zip(probe.prompts, expected.log_probs, found.log_probs):
        if ours.shape != theirs.shape:
            parity.failures.append(f"{check}: {theirs.shape} where the reference has {ours.shape}")
            return
        for length, p, q in zip(lengths, ours.astype(np.float64), theirs.astype(np.float64)):
            divergences.append(float((np.exp(p) * (p - q)).sum()))
            # NaN is the furthest; and probabilities that do not add up to 1 are no distribution
            apart = max(float(np.abs(p - q).max()), 0.0)
            apart = apart if np.isfinite(q).all() and abs(np.logaddexp.reduce(q)) < 1e-2 else float("inf")
            furthest = max(furthest, (apart, length))
    kl, (apart, length), bounds = float(np.mean(divergences)), furthest, parity.bounds
    parity.checks[check] = {"positions": len(divergences), "max_abs": apart, "after": length, "mean_kl": kl}
    if not np.isfinite(apart):
        parity.failures.append(f"{check}: not finite, or no distribution, after {length} tokens")
    elif apart > bounds.log_prob:
        parity.failures.append(f"{check}: {apart:.2g} nats apart after {length} tokens; bound {bounds.log_prob:g}")
    elif not kl <= bounds.kl:
        parity.failures.append(f"{check}: a mean divergence of {kl:.2g} nats; bound {bounds.kl:g}")


def _compare_greedy(
    parity: Parity, reference: Runtime, other: Runtime, probe: Probe, expected: list[int], found: list[int]
) -> None:
    """Where the reference's two likeliest tokens are closer than the bound, either may be next: both runtimes go on
    after the reference's.
    """
    equal, ties = _equal(expected, found), 0
    while equal < probe.count and parity.bounds.greedy:
        before = [*probe.start, *expected[:equal]]
        log_probs = reference.log_probs(before, [len(before)])[0]
        second, first = np.argsort(log_probs)[-2:]
        is_tie = log_probs[first] - log_probs[second] < parity.bounds.log_prob
        if not is_tie or found[equal : equal + 1] not in ([first], [second]) or ties == MOST_TIES:
            parity.failures.append(f"greedy tokens: the first {equal} of {probe.count} are equal")
            break
        ties += 1
        rest = probe.count - equal - 1
        found = expected[: equal + 1] + (other.greedy([*before, expected[equal]], rest) if rest else [])
        equal = _equal(expected, found)
    parity.checks["greedy tokens"] = {"compared": probe.count, "equal": equal, "ties": ties}


def _equal(expected: Sequence[int], found: Sequence[int]) -> int:
    """How many tokens at the beginning are equal."""
    return next((n for n, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))


# -- runtimes ---------------------------------------------------------------------------------------------------------


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
    """`transformers`, with weights in the precision of the files.

    Raises `UserError` if it is not installed, cannot read the directory, or if tensors are missing, unexpected or of
    another shape.
    """

    name = "transformers"

    def __init__(self, directory: Path) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError("transformers is not installed: pip install transformers")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                self._model, said = transformers.AutoModelForCausalLM.from_pretrained(
                    directory, dtype="auto", local_files_only=True, output_loading_info=True
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

        config = self._model.config.to_json_string()
        return _at(read, ids, lengths, any(f'"{kind}"' in config for kind in LENGTH_DECIDES))

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
