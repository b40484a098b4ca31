"""Programs that run a model, and the comparison of what they read and predict with the reference."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

from slmkit.config import UserError, one_line
from slmkit.export.probe import Message, Probe
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer

MOST_TIES = 16  # of greedy tokens, that are passed over
NORMALISED = 1e-2  # how far the logarithm of the sum of all probabilities may be from 0


class Runtime(Protocol):
    """A program that runs a model: how it reads text, and what it predicts. Use it as a context manager."""

    name: str  # as in the table of `slm verify`
    size: int  # of the files of weights, in bytes
    composes: bool = True  # whether it brings text into normal form C where the tokenizer does

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
        return

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
ROUNDED = {16: 0.001, 8: 0.01, 6: 0.02, 5: 0.05, 4: 0.1, 3: 0.3, 2: 1.0}


def bounds_of(kind: str) -> Bounds:
    """The bounds for weights of a kind, as any target names it."""
    bits = bits_of(kind)
    return EXACT if bits >= 32 else Bounds(float("inf"), ROUNDED.get(bits, ROUNDED[2]), False)


def bits_of(kind: str) -> int:
    """The bits of a weight: of F32, bfloat16, Q4_K_M or int8."""
    return int((re.findall(r"\d+", kind) or ["32"])[0])


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
    _model: Any

    def __init__(self, directory: Path, dtype: str = "auto") -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError("transformers is not installed: pip install transformers")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                loading: Any = transformers.AutoModelForCausalLM.from_pretrained
                self._model, said = loading(directory, dtype=dtype, local_files_only=True, output_loading_info=True)
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # those of safetensors and tokenizers have no other base
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
