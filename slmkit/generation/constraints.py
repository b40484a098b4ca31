"""Constrained output: JSON schemas, regular expressions and choices, enforced by a mask over the vocabulary.

llguidance (Microsoft, in Rust) parses the bytes of the text so far and marks every token that may follow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from slmkit.config import UserError, importing, kind_of_value
from slmkit.generation.json_schema import check_pattern, grammar_of_schema
from slmkit.tokenizer import SLMTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

LONGEST = 65_536  # characters of a schema, a regular expression, or all choices
PROBE = '{"a b": [1, "cd"]}'


class Vocabulary:
    """A tokenizer's tokens as llguidance reads them: the bytes of each id, none of special and unused ids.

    Raises `UserError` if the bytes of the tokens in a row are not the text.
    """

    is_tokenizer_wrapper, bos_token_id = True, None  # llguidance asks for these and for `tokens`, `eos_token_id`, …

    def __init__(self, tokenizer: SLMTokenizer, stops: Iterable[int], suppressed: Iterable[int]) -> None:
        ids = tokenizer.encode(PROBE)
        if b"".join(map(tokenizer.token_bytes, ids)).strip() != tokenizer.decode(ids).strip().encode():
            raise UserError(
                "constrained output: this tokenizer's text is not the bytes of its tokens in a row (as in WordPiece), "
                "so no mask over tokens would be exact: use a BPE tokenizer"
            )
        with importing("constrained output needs llguidance: pip install slmkit[constrain]"):
            from llguidance import LLTokenizer
        self.encode, self.eos_token_id, self.stops = (
            tokenizer.encode_continuation,
            tokenizer.eos_token_id,
            sorted(stops),
        )
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *self.stops})
        none = {*self.special_token_ids, *suppressed, *np.flatnonzero(~tokenizer.known_ids).tolist()}
        self.tokens = [b"" if index in none else tokenizer.token_bytes(index) for index in range(len(tokenizer))]
        self.library = LLTokenizer(self, eos_token=self.stops)  # type: ignore[arg-type]

    def __call__(self, text: str) -> list[int]:
        """Ids [tokens] of text that a grammar forces: of its many spellings, only this one is allowed."""
        ids = self.encode(text)
        # Some normalizers change the text.
        return ids if self.joined(ids) == text.encode() else self.library.greedy_tokenize(text)

    def joined(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.tokens[index] for index in ids)


_vocabulary = lru_cache(maxsize=8)(Vocabulary)


def _vocabulary_of(tokenizer: Any) -> Vocabulary:
    if not isinstance(tokenizer, SLMTokenizer):
        name = type(tokenizer).__name__
        raise UserError(
            f"constrained output needs the bytes of each token, which {name} does not tell: use SLMTokenizer"
        )
    return _vocabulary(tokenizer, frozenset(tokenizer.stop_token_ids), tuple(tokenizer.suppressed))


class Grammar:
    """A compiled constraint, shared by rows and threads: each row has a `Matcher` of its own, from `start`.

    Compiling takes milliseconds, and once per tokenizer up to a second; the last 128 are kept. The constructors raise
    `UserError`, one line, for what cannot be enforced, and for a tokenizer that does not tell the bytes of its tokens.
    """

    def __init__(self, vocabulary: Vocabulary, what: str, text: str) -> None:
        """`text` is a grammar for llguidance; `what` is its name in errors."""
        from llguidance import LLMatcher, LLParserLimits

        if len(text) > LONGEST:
            raise UserError(f"{what} of {len(text):,} characters: at most {LONGEST:,} are compiled")
        # By default the library fills a table of all tokens for every long lexeme, which takes a second.
        limits = LLParserLimits(max_lexer_states=50_000, precompute_large_lexemes=False, verbose_errors=False)
        self.vocabulary = vocabulary
        self._beginning = LLMatcher(vocabulary.library, text, log_level=0, limits=limits)
        if not self._beginning.is_error():
            self._beginning.compute_bitmask()  # fails if nothing can follow
        if self._beginning.is_error():
            raise UserError(f"{what}: {_reason(self._beginning)}")

    @classmethod
    def json_schema(cls, tokenizer: Any, schema: Any) -> Grammar:
        """JSON that a schema (draft 2020-12, a mapping) accepts, with at most one space between structural tokens.

        Whole numbers are within ±(2^53 - 1) unless the schema has bounds, and other numbers have at most nine decimals
        and no exponent: a model that repeats digits would never end.
        """
        vocabulary = _vocabulary_of(tokenizer)
        as_given = _compiled(vocabulary, "JSON schema", grammar_of_schema(schema))
        try:
            return _compiled(vocabulary, "JSON schema", grammar_of_schema(schema, bounded=True))
        except UserError:  # the schema's own bounds, spread over several parts, are outside of these
            return as_given

    @classmethod
    def json_object(cls, tokenizer: Any) -> Grammar:
        """Any JSON object. Its strings, lists and nesting have no bound, so neither has the output."""
        return cls.json_schema(tokenizer, {"type": "object"})

    @classmethod
    def regex(cls, tokenizer: Any, pattern: Any) -> Grammar:
        r"""Text that the whole pattern matches, as `re.fullmatch` does, where `\\d`, `\\w` and `\\s` are ASCII.

        Look-around, references to groups, and anchors that are not at the edges are refused.
        """
        vocabulary = _vocabulary_of(tokenizer)
        check_pattern(pattern, "regex")
        from llguidance import regex_to_lark

        return _compiled(vocabulary, "regex", f"start: /{regex_to_lark(pattern, 'dws') or '(?:)'}/")

    @classmethod
    def choices(cls, tokenizer: Any, texts: Sequence[str]) -> Grammar:
        """Exactly one of the texts."""
        vocabulary = _vocabulary_of(tokenizer)
        if not isinstance(texts, list | tuple) or not texts:
            raise UserError(
                f"choices: expected a list of one or more texts, found {kind_of_value(texts)} {texts!r:.60}"
            )
        if wrong := [text for text in texts if not isinstance(text, str) or not text]:
            raise UserError(f"choices: expected texts that are not empty, found {wrong[0]!r:.60}")
        # Characters by their numbers, so that none has a meaning.
        spelled = (re.sub("[^a-zA-Z0-9]", lambda match: f"\\x{{{ord(match[0]):x}}}", text) for text in texts)
        grammar = _compiled(vocabulary, "choices", f"start: /{'|'.join(spelled)}/")
        if wrong := [text for text in texts if vocabulary.joined(vocabulary(text)) != text.encode()]:
            raise UserError(f"choices: {wrong[0]!r:.60} cannot be spelled with the tokens of this tokenizer")
        return grammar

    def start(self, vocab_size: int | None = None) -> Matcher:
        """The state at the beginning of a text. `vocab_size`: of the model's logits; None: the tokenizer's."""
        return Matcher(self.vocabulary, self._beginning.deep_copy(), vocab_size or len(self.vocabulary.tokens))


_compiled = lru_cache(maxsize=128)(Grammar)


def _reason(state: LLMatcher) -> str:
    """Why llguidance refuses, in one line; its own messages point at the place in several."""
    error = state.get_error()
    if "NoExtensionBias" in error:
        return "a $ref leads back to itself and nowhere else, so no text ends"
    found = re.search(r"^error: (.*)", error, re.MULTILINE)
    return f"{found[1] if found else error.split('(in regex): ')[-1].splitlines()[0]:.200}"


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "mask")


class Matcher:
    """The state of one text. One thread at a time may use it."""

    def __init__(self, vocabulary: Vocabulary, state: LLMatcher, vocab_size: int) -> None:
        self.vocabulary, self.vocab_size = vocabulary, vocab_size
        self._state, self._is_ended = state, False  # ended: by a stop token
        self._mask: Future[Tensor] | None = None

    def prepare(self) -> Self:
        """Begin to compute the next mask in another thread, while the model's forward pass runs."""
        self._mask = self._mask or _pool().submit(self._allowed)
        return self

    def allowed(self) -> Tensor:
        """Which tokens may follow, bool [vocab_size]: the stop tokens exactly where the text may end.

        None may where this vocabulary cannot spell what the grammar asks, or llguidance's limits are exceeded.
        """
        return self._allowed() if self._mask is None else self._mask.result()

    def _allowed(self) -> Tensor:
        state, size = self._state, len(self.vocabulary.tokens)
        bits = np.zeros((size + 31) // 32, dtype=np.int32)
        if not state.is_stopped():
            state.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)  # without the interpreter's lock
        if state.is_error():
            bits[:] = 0
        # In numpy: torch would use all threads for so little, and wait for them.
        mask = np.zeros(max(size, self.vocab_size), dtype=bool)
        mask[:size] = np.unpackbits(bits.view(np.uint8), count=size, bitorder="little")
        mask[self.vocabulary.stops] = state.is_accepting()
        return torch.from_numpy(mask[: self.vocab_size])

    def _idle(self) -> LLMatcher:
        """llguidance's state, once no other thread computes with it."""
        if self._mask is not None:
            self._mask.exception()  # waits
        return self._state

    def accept(self, token: int) -> None:
        """Append a token to the text. Raises `UserError` for one that is not allowed, which changes nothing."""
        state = self._idle()
        if token in self.vocabulary.stops and self.may_end and not self._is_ended:
            self._is_ended = True
        elif self._is_ended or state.is_error() or not state.try_consume_tokens([token]):
            why = _reason(state) if state.is_error() else f"token {token} is not allowed here"
            raise UserError(f"constrained output: {why}")
        self._mask = None

    @property
    def may_end(self) -> bool:
        """Whether the text is complete; more may follow, unless `is_done`."""
        return self._idle().is_accepting()

    @property
    def is_done(self) -> bool:
        """Whether a stop token ended the text, or nothing else can follow."""
        return self._is_ended or (self._idle().is_stopped() and self.may_end)

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens. Raises `UserError` if there are fewer."""
        if count:
            state, others = self._idle(), count - self._is_ended
            if others and not state.rollback(others):
                raise UserError(f"constrained output: {count} tokens cannot be taken back ({_reason(state)})")
            self._is_ended, self._mask = False, None
