"""Speculative decoding (arXiv:2211.17192): several next tokens are guessed cheaply, and the model reads them at once.

A guess x, drawn with probability q(x), is accepted with probability min(1, p(x) / q(x)), where p is the model's. At the
first one that is not, the row gets a token of max(0, p - q), normalized, instead; behind the last one it gets one more
of p. So every token has the model's own distribution, and greedy text is the same as without guesses. It pays where a
forward pass takes as long for several tokens as for one: with one or a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.config import UserError
from slmkit.generation.ensemble import Cache, LanguageModel, evaluating
from slmkit.generation.sampling import SampledRow, draw, points, probabilities, sample, seed_of, uniform
from slmkit.model.cache import AT_ONCE
from slmkit.model.compiled import for_decoding

# A row draws three numbers per token, each of a seed of its own: its token's, a guess's, and whether that is accepted.
GUESS, VERDICT = 2**40, 2**40 + 1  # numbers of continuations that no request has


class GuessedRow(SampledRow, Protocol):
    """What guessing needs to know about a row besides."""

    ids: list[int]
    matcher: Any  # a `constraints.Matcher`, or None


class Guess(NamedTuple):
    """Next tokens, and the distributions they were drawn from [tokens, vocab_size]; None: they are certain."""

    tokens: list[int]
    chances: Tensor | None = None


class Speculation:
    """Makes guesses of up to `count` tokens; `accepted` of `guessed` tokens became text."""

    def __init__(self, count: int) -> None:
        if not 1 <= count < AT_ONCE:
            raise UserError(f"{count} tokens to guess at once: expected 1 to {AT_ONCE - 1}")
        self.count, self.guessed, self.accepted = count, 0, 0

    @property
    def acceptance(self) -> float:
        return self.accepted / max(1, self.guessed)

    def guess(self, row: GuessedRow, room: int) -> Guess:
        """What may follow the row's text, at most `room` tokens."""
        raise NotImplementedError

    def verdicts(self, row: GuessedRow, logits: Tensor, guess: Guess) -> Iterator[tuple[int, Tensor]]:
        """logits [1 + guessed, vocab_size] behind the row's last token and each guess → the row's next tokens.

        Yields each with its logits [1, vocab_size], or a key of `FAULTS`, after which the row has to end. The row has
        to have appended one before the next is asked for, since penalties and grammars depend on it.
        """
        self.guessed += len(guess.tokens)
        seed = seed_of(row.seed, VERDICT)
        for place, scores in enumerate(logits.split(1)):
            p = probabilities(scores, [row])  # [1, vocab_size]
            if p.isnan().any():
                yield int(sample(scores, [row])), scores
                return
            if place < len(guess.tokens):
                token = guess.tokens[place]
                q = _certain(token, p) if guess.chances is None else guess.chances[place]  # [vocab_size]
                if uniform(seed, len(row.ids) - row.prompt_length) * float(q[token]) < float(p[0, token]):
                    self.accepted += 1
                    yield token, scores
                    continue
                rest = (p - q).clamp(min=0)
                p = rest if rest.any() else p  # p = q but for rounding
            yield int(draw(p, points([row]))), scores
            return


class PromptLookup(Speculation):
    """Guesses that the text goes on as where its last tokens, `longest` or fewer down to two, were seen last."""

    def __init__(self, count: int = 8, longest: int = 3) -> None:
        super().__init__(count)
        self.longest = longest

    def guess(self, row: GuessedRow, room: int) -> Guess:
        ids = np.array(row.ids)
        for length in range(min(self.longest, len(ids) - 1), 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], length)  # [places, length]
            if len(found := np.flatnonzero((windows == ids[-length:]).all(1))):
                start = int(found[-1]) + length
                return Guess(row.ids[start : start + min(self.count, room)])
        return Guess([])


class DraftModel(Speculation):
    """Guesses with a smaller model of the same vocabulary, by the row's own settings and grammar.

    It reads one row at a time, into a KV cache of its own for each. Of a long text it reads `AT_ONCE` tokens at each
    guess, which stays empty until the rest is as short, so that no other row is delayed for long.
    """

    def __init__(self, draft: LanguageModel, count: int = 4) -> None:
        super().__init__(count)
        if any(rope.depends_on_length for rope in draft.ropes):
            raise UserError("a draft model whose rotation depends on the length of the text cannot take guesses back")
        self.draft = for_decoding(draft)
        # Of each row: the cache, how long the text was at the last guess, and that guess.
        self._caches: WeakKeyDictionary[GuessedRow, tuple[Cache, int, list[int]]] = WeakKeyDictionary()

    def guess(self, row: GuessedRow, room: int) -> Guess:
        length, chances, seed = len(row.ids), list[Tensor](), seed_of(row.seed, GUESS)
        count, tokens = min(self.count, room, self.draft.max_positions - length), list[int]()
        if count < 1:
            return Guess([])
        cache = self._cache(row, length + room + 1)
        with evaluating(self.draft):
            if length - cache.length(0) > AT_ONCE:
                self._read(row.ids[: cache.length(0) + AT_ONCE], cache)
                self._caches[row] = cache, length, []
                return Guess([])
            try:
                while len(tokens) < count and not (row.matcher is not None and row.matcher.is_done):
                    q = probabilities(self.draft.logits(self._read(row.ids, cache)), [row])  # [1, vocab_size]
                    if q.isnan().any():
                        break
                    token = int(draw(q, [uniform(seed, len(row.ids) - row.prompt_length)]))
                    if row.matcher is not None:
                        row.matcher.accept(token)
                    tokens.append(token)
                    chances.append(q)
                    row.ids.append(token)
            finally:
                if row.matcher is not None:
                    row.matcher.rollback(len(tokens))
                del row.ids[length:]
        self._caches[row] = cache, length, tokens
        return Guess(tokens, torch.cat(chances) if chances else None)

    def _cache(self, row: GuessedRow, length: int) -> Cache:
        """The row's cache, holding only what became its text. `length`: of the whole text to come."""
        if row not in self._caches:
            return self.draft.new_cache(1, min(length, self.draft.max_positions), AT_ONCE)
        cache, before, guessed = self._caches[row]
        same = next((n for n, pair in enumerate(zip(guessed, row.ids[before:])) if pair[0] != pair[1]), len(guessed))
        cache.truncate(0, min(cache.length(0), before + same, len(row.ids) - 1))
        return cache

    def _read(self, ids: list[int], cache: Cache) -> Tensor:
        """The hidden state [1, width] behind all of `ids`; those in the cache are not read again."""
        return self.draft(torch.tensor([ids[cache.length(0) :]], device=self.draft.device), cache)[:, -1]


def _certain(token: int, like: Tensor) -> Tensor:
    return F.one_hot(torch.tensor(token, device=like.device), like.size(-1)).to(like.dtype)
