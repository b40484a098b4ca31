"""The comparison of programs that run a model: what they are asked, what they read and predict, and how far that may be
from the reference.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import random
import re
import string
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from slmkit.config import UserError, read_table
from slmkit.export.runtimes import Loaded, Message, Runtime, Slmkit, Stored
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer

# -- what they are asked ----------------------------------------------------------------------------------------------

SENTENCES, PIECES = read_table(Path(__file__).with_name("probe.yaml")).values()
TAGGED = 20  # conversations with special tokens in a message
MOST_LETTERS = 400  # of a script, the first, which are the usual ones


@dataclass(frozen=True)
class Probe:
    """What runtimes are asked: the same for the same model and tokenizer."""

    strings: list[str]
    decomposed: frozenset[str]  # strings that the tokenizer brings into Unicode's normal form C first
    conversations: list[list[Message]]
    tagged: list[list[Message]]  # with special tokens spelled in the messages
    readings: list[list[list[int]]]  # of each: their ids as ordinary text, and as tokens, as transformers reads them
    prompts: list[tuple[list[int], list[int]]]  # ids [tokens], and the lengths after which the next token is predicted
    start: list[int]  # ids [tokens] after which greedy tokens are compared
    count: int  # of greedy tokens
    holes: frozenset[int] = frozenset()  # rows without a token, which some runtimes never choose

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
        normalizer = tokenizer._tokenizer.normalizer
        composes = normalizer is not None and normalizer.normalize_str("e\u0301") == "é"
        decomposed = frozenset(text for text in texts if composes and not unicodedata.is_normalized("NFC", text))
        count, holes = min(count, most - len(start)), frozenset(range(decoder.vocab_size)) - {*known}
        return cls(texts, decomposed, plain, tagged, readings, prompts, start, count, holes)

    @property
    def context(self) -> int:
        """The tokens of the longest text, with its continuation."""
        return max(len(self.start) + self.count, *(len(ids) + 1 for ids, _ in self.prompts))


@functools.cache
def probe_strings(spellings: tuple[str, ...], count: int) -> list[str]:
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


# -- the comparison ---------------------------------------------------------------------------------------------------

MOST_TIES = 16  # of greedy tokens, that are passed over
SMALL = 0.01  # of a tensor's largest weight: where all of a group are smaller, errors count as if one were not
NORMALISED = 1e-2  # how far the logarithm of the sum of all probabilities may be from 0


@dataclass(frozen=True)
class Bounds:
    """How far a runtime may be from the reference."""

    log_prob: float  # the largest difference of a log-probability, in nats
    kl: float  # Kullback-Leibler divergence from the reference, the mean over positions, in nats
    greedy: bool  # whether greedy tokens must be equal


EXACT = Bounds(1e-3, 1e-5, True)
# Divergence by the bits of a weight; of a wrong conversion, such as permuted rows, it is several nats.
ROUNDED = {16: 0.001, 8: 0.01, 6: 0.02, 5: 0.05, 4: 0.1, 3: 0.3, 2: 1.0}


def bounds_of(kind: str) -> Bounds:
    """The bounds for weights of a kind, as any target names it."""
    bits = bits_of(kind)
    return EXACT if bits >= 32 else Bounds(float("inf"), ROUNDED.get(bits, ROUNDED[2]), False)


def bits_of(kind: str) -> int:
    """The bits of a weight: of F32, bfloat16, Q4_K_M or int8."""
    return int((re.findall(r"\d+", kind) or ["32"])[0])


def as_stored(matrices: Iterable[Stored], loaded: Loaded) -> Decoder:
    """A copy of the decoder with the matrices of a file.

    Raises `UserError` for a group that is farther from the model's than its type rounds: root mean square of the
    differences, as a share of the group's largest weight.
    """
    rounded = copy.deepcopy(loaded.decoder)
    state = rounded.state_dict()
    for one in matrices:
        parts = [state[name] for name in one.parameters]
        whole = torch.cat(parts)  # [out, in]
        places = torch.arange(whole.numel()).view(whole.shape) if one.places is None else one.places
        if one.values.shape != places.shape:
            raise UserError(f"{one.name} has the shape {[*one.values.shape]} instead of {[*places.shape]}")
        before = whole.flatten()[places]
        padding = 0, -before.shape[-1] % one.group
        weights, apart = (F.pad(x, padding).unflatten(-1, (-1, one.group)) for x in (before, one.values - before))
        largest = weights.abs().amax(-1)
        errors = apart.square().mean(-1).sqrt() / largest.clamp(min=max(1e-30, SMALL * float(largest.max())))
        if not (error := float(errors.max())) <= farthest(bits_of(one.type)):
            found = f"{one.group} neighbours are apart by {error:.2g} of the largest"
            raise UserError(f"{one.name} in {one.type} has other weights than the model: {found}")
        whole.view(-1)[places] = one.values
        for part, fresh in zip(parts, whole.split([len(part) for part in parts])):
            part.copy_(fresh)
    return rounded


def farthest(bits: int) -> float:
    """What rounding to nearest may change, as a share of the largest of a group: half a step is 2 to the -bits."""
    return 1e-6 if bits >= 32 else 2.0**-8 if bits == 16 else 2.2 * 2.0**-bits


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
    reference: Runtime,
    other: Runtime,
    probe: Probe,
    bounds: Bounds,
    expected: Answers | None = None,
    same_weights: tuple[list[np.ndarray], Bounds] | None = None,
) -> Parity:
    """Ask both runtimes, and compare. `expected`: the reference's answers, where they are known already.
    `same_weights`: log-probabilities [lengths, vocab_size] of each prompt by the reference with the weights that the
    other runtime has, and their bounds, in which the rounding of weights has no part.
    """
    if isinstance(reference, Slmkit) and "gelu" in reference.decoder.architecture.activation:
        bounds = dataclasses.replace(bounds, log_prob=max(bounds.log_prob, getattr(other, "gelu_error", 0.0)))
    expected = expected or Answers.of(reference, probe)
    found = expected if other is reference else Answers.of(other, probe)
    readings = [ids if ids in accepted else accepted[0] for ids, accepted in zip(found.tagged, probe.readings)]
    left_out = frozenset() if other.composes else probe.decomposed
    checks = {
        "token ids": _compare_ids(probe.strings, expected.texts, found.texts, left_out),
        "chat prompts": _compare_ids(probe.conversations, expected.chats, found.chats, left_out),
        "tags in messages": _compare_ids(probe.tagged, readings, found.tagged),
        "log-probabilities": _compare_log_probs(probe, bounds, expected, found),
        "greedy tokens": _compare_greedy(reference, other, probe, bounds, expected.greedy, found.greedy),
    }
    if same_weights:
        rounded = dataclasses.replace(expected, log_probs=same_weights[0])
        checks["log-probabilities of the same weights"] = _compare_log_probs(probe, same_weights[1], rounded, found)
    return Parity(
        reference.name, other.name, bounds, other.size, found.tokens_per_second,
        {name: figures for name, (figures, _) in checks.items()},
        [f"{name}: {problem}" for name, (_, problem) in checks.items() if problem],
    )  # fmt: skip


def _compare_ids(
    asked: Sequence[Any], expected: Sequence[Any], found: Sequence[Any], left_out: frozenset[str] = frozenset()
) -> Check:
    """`left_out`: texts that are not compared, nor conversations with one."""
    said = ({one} if isinstance(one, str) else {message["content"] for message in one} for one in asked)
    kept = [number for number, texts in enumerate(said) if not texts & left_out]
    wrong = [number for number in kept if expected[number] != found[number]]
    figures, problem = {"compared": len(kept), "different": len(wrong)}, ""
    figures |= {"not in normal form C": len(asked) - len(kept)} if left_out else {}
    if wrong:
        first = min(wrong, key=lambda number: len(str(asked[number])))
        ids = [str(each[first])[:80] for each in (found, expected)]
        problem = f"{len(wrong):,} of {len(kept):,} differ: {str(asked[first])[:80]!r} is {ids[0]} and not {ids[1]}"
    return figures, problem


def _compare_log_probs(probe: Probe, bounds: Bounds, expected: Answers, found: Answers) -> Check:
    apart, problem = (0.0, 0), ""
    for (_, lengths), ours, theirs in zip(probe.prompts, expected.log_probs, found.log_probs):
        if ours.shape != theirs.shape:
            return {}, f"a vocabulary of {theirs.shape[-1]:,} instead of {ours.shape[-1]:,} tokens"
        for length, p, q in zip(lengths, ours, theirs):
            if not np.isfinite(q).all() or abs(np.log(np.exp(q.astype(np.float64)).sum())) > NORMALISED:
                return {}, f"after {length} tokens they are not finite, or no distribution"
            apart = max(apart, (float(np.abs(p - q).max()), length))
    kl, positions = mean_divergence(expected.log_probs, found.log_probs), sum(map(len, expected.log_probs))
    if apart[0] > bounds.log_prob:
        problem = f"{apart[0]:.2g} nats apart after {apart[1]} tokens, the bound is {bounds.log_prob:g}"
    elif kl > bounds.kl:
        problem = f"a mean divergence of {kl:.2g} nats, the bound is {bounds.kl:.2g}"
    return {"positions": positions, "max_abs": apart[0], "after": apart[1], "mean_kl": kl}, problem


def mean_divergence(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Kullback-Leibler divergence of log-probabilities [positions, vocab_size] each, in nats: the mean of positions."""
    p, q = (np.concatenate(each).astype(np.float64) for each in (expected, found))
    p, q = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _compare_greedy(
    reference: Runtime, other: Runtime, probe: Probe, bounds: Bounds, expected: list[int], found: list[int]
) -> Check:
    """Where the reference's two likeliest tokens are closer than the bound, either may be next, and both runtimes go on
    after the reference's: a tie. Nothing is compared from where the reference takes a row without a token.
    """
    count = next((n for n, token in enumerate(expected) if token in probe.holes), probe.count)
    expected = expected[:count]
    equal, ties, problem = _equal(expected, found), 0, ""
    while equal < count and bounds.greedy:
        before = [*probe.start, *expected[:equal]]
        log_probs = reference.log_probs(before, [len(before)])[0]
        second, first = np.argsort(log_probs)[-2:]
        is_tie = log_probs[first] - log_probs[second] < bounds.log_prob
        if not is_tie or found[equal : equal + 1] not in ([first], [second]) or ties == MOST_TIES:
            problem = f"only the first {equal} of {count} are equal"
            break
        ties += 1
        rest = count - equal - 1
        found = expected[: equal + 1] + (other.greedy([*before, expected[equal]], rest) if rest else [])
        equal = _equal(expected, found)
    return {"compared": count, "equal": equal, "ties": ties}, problem


def _equal(expected: Sequence[int], found: Sequence[int]) -> int:
    """How many tokens at the beginning are equal."""
    return next((n for n, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
