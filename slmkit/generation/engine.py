"""The engine: requests of any kind share the forward passes of one model.

    handle = engine.insert(request)
    while engine.is_busy:
        for event in engine.step(): ...
    engine.remove(handle)                 # before its end

A step appends one token to every running row, and reads at most `AT_ONCE` tokens of prompts, so that a long prompt
delays nobody for long. What a row gets depends on its request alone, not on the other rows, or when they come and go.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.config import UserError
from slmkit.generation.ensemble import LanguageModel, evaluating
from slmkit.generation.sampling import (
    FAULTS,
    LogProbabilities,
    log_probabilities,
    prompt_log_probabilities,
    sample,
    seed_of,
)
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.slots import Pool, Pools, common
from slmkit.generation.speculation import Guess, Speculation
from slmkit.generation.text import Spelling, TextTail, TextTokenizer
from slmkit.model.cache import AT_ONCE
from slmkit.model.compiled import for_decoding

# A stop token or string, `max_new_tokens` reached, the model's context is full, or an error of this row.
FinishReason = Literal["stop", "length", "context", "error"]
# A prompt that shares this many tokens with one that is being read waits, and copies them.
WORTH_WAITING = 32
MOST_CONTINUATIONS = 65_536
Logprobs = list[tuple[int, float]]  # ids and natural logarithms of their probabilities


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. Log-probabilities are the model's own, before any sampling rule."""

    prompt: Sequence[int]  # ids [prompt]
    max_new_tokens: int
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    stop_ids: Set[int] = frozenset()  # a token that ends the text
    stop: Sequence[str] = ()  # strings that end the text, and are not part of it
    n: int = 1  # continuations, each with a seed of its own
    grammar: Any = None  # a `constraints.Grammar`: what the text must be
    logprobs: int | None = None  # with each token its log-probability, and those of this many likeliest tokens
    prompt_logprobs: int | None = None  # the same for the prompt, with the first token
    prefix_group: str = ""  # the beginning of an earlier text is reused only if that was of the same group


@dataclass(frozen=True)
class Event:
    """A new token of a row, or the end of a row without one."""

    handle: int
    index: int  # of the continuation, from 0 to n - 1
    token: int | None
    text: str = ""  # characters that became complete, and belong to no stop string
    finish_reason: FinishReason | None = None  # of the row's last event
    error: str = ""  # why, if that is "error"
    logprobs: Logprobs = field(default_factory=list)  # the token first, then the likeliest
    prompt_logprobs: Sequence[Logprobs] = ()  # of each token of the prompt but the first
    cached_tokens: int = 0  # with a row's first event: how many of its prompt were known from another text, not read


class Row:
    """One continuation: everything that belongs to it alone, and leaves with it."""

    def __init__(self, handle: int, index: int, request: Request, tail: TextTail | None, known: Tensor) -> None:
        """`known` bool [vocab_size]: the only ids that are drawn."""
        self.handle, self.index, self.request, self.tail = handle, index, request, tail
        self.ids, self.prompt_length = list(request.prompt), len(request.prompt)
        self.settings, self.seed = request.settings, seed_of(request.settings.seed, index)
        self.known, self.knows_all = known, bool(known.all())
        self.matcher = None if request.grammar is None else request.grammar.start(len(known)).prepare()
        self.pool: Pool  # once it is admitted, with
        self.slot: int
        self.cached_tokens = 0
        self.reads_whole = index == 0 and request.prompt_logprobs is not None  # none of the prompt from another slot
        self.prompt_logprobs: list[Logprobs] = []

    @property
    def allowed(self) -> Tensor | None:
        """The ids that may come next, bool [vocab_size]; None: all."""
        if self.matcher is None:
            return None if self.knows_all else self.known
        return self.matcher.allowed().to(self.known.device) & self.known

    @property
    def new_tokens(self) -> int:
        return len(self.ids) - self.prompt_length

    def accept(self, token: int, room: int) -> tuple[str, FinishReason | None]:
        """Append a token; returns the text that became complete, and why the row ends. `room`: of the context."""
        self.ids.append(token)
        reason: FinishReason | None = None
        if token in self.request.stop_ids:
            reason = "stop"
        elif self.new_tokens == self.request.max_new_tokens:
            reason = "length"
        elif len(self.ids) >= room:
            reason = "context"
        if self.matcher is not None and reason != "stop":
            self.matcher.accept(token)
            reason = "stop" if self.matcher.is_done else reason
            self.matcher.prepare()  # the next mask, while the model computes
        if self.tail is None:
            return "", reason
        text, stopped = self.tail.add(token, reason is not None)
        return text, "stop" if stopped else reason


class Engine:
    """Continues many texts at once with one model. For one thread at a time.

    `max_rows`: rows that run at the same time, the others wait in the order of their insertion. `memory`: bytes for
    the KV cache; None: no limit. `tokenizer`: for text and stop strings; None: ids alone. `known` bool [ids]: the
    only ids that are drawn; default: the tokenizer's. `reuse`: begin with the keys and values of an earlier text that
    begins alike; after a change of the weights make another engine. `speculation` guesses several tokens of a row at
    once, which is faster for a few rows of a large model.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        tokenizer: TextTokenizer | None = None,
        *,
        max_rows: int = 16,
        memory: int | None = None,
        known: np.ndarray | None = None,
        reuse: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise UserError(f"max_rows {max_rows!r}: expected a whole number from 1")
        if memory is not None and not memory >= 0:
            raise UserError(f"memory {memory!r}: expected a number of bytes, or None")
        # One way for all prompts and one for all new tokens: a row's results must not depend on how many others run.
        self.decoder, self.compiled = decoder, for_decoding(decoder)
        self.tokenizer, self.context = tokenizer, decoder.max_positions
        self._spelling = None if tokenizer is None else Spelling(tokenizer)
        self.pools = Pools(decoder, max_rows, memory, reuse)
        self.speculation = speculation
        if speculation is not None and not self.pools.in_pieces:
            raise UserError("this model's rotation depends on the length of the text, so it cannot take guesses back")
        known = getattr(tokenizer, "known_ids", None) if known is None else known
        known = np.ones(decoder.vocab_size, bool) if known is None else known
        self._known = _of_size(known, decoder.vocab_size).to(decoder.device)
        self._handles, self._waiting = itertools.count(), deque[Row]()

    @property
    def is_busy(self) -> bool:
        return self.waiting_rows + self.running_rows > 0

    @property
    def running_rows(self) -> int:
        """Rows in a slot, also those whose prompt is still read."""
        return sum(len(pool.rows) for pool in self.pools)

    @property
    def waiting_rows(self) -> int:
        """Rows without a slot."""
        return len(self._waiting)

    def insert(self, request: Request) -> int:
        """Begin a request; returns its handle, which its events bear.

        Raises `UserError` for an empty prompt, one that leaves no room in the context, one that needs more memory than
        there is, and for numbers out of range.
        """
        request = _checked(request, self.decoder.vocab_size)
        check_room(self.context, len(request.prompt), request.max_new_tokens, request.prompt_logprobs is not None)
        if self.tokenizer is None and (request.stop or request.grammar is not None):
            raise UserError("stop strings and grammars need a tokenizer: Engine(decoder, tokenizer)")
        self.pools.expect(self._length(request))
        handle = next(self._handles)
        for index in range(request.n):
            tail = None if self._spelling is None else TextTail(self._spelling, request.prompt, request.stop)
            self._waiting.append(Row(handle, index, request, tail, self._known))
        return handle

    def remove(self, handle: int) -> None:
        """End a request at once; its slots are free. A handle that has ended is no error."""
        self._waiting = deque(row for row in self._waiting if row.handle != handle)
        with torch.inference_mode():
            for pool in self.pools:
                for row in [row for row in pool.rows if row.handle == handle]:
                    pool.leave(row)

    def step(self) -> list[Event]:
        """Append a token to every running row, and read on in the prompts of those that wait."""
        with evaluating(self.decoder):
            for pool in self.pools:  # a step that failed may have read a row's last token, or guesses
                for row in pool.rows[: pool.running]:
                    pool.cache.truncate(row.slot, len(row.ids) - 1)
            events = [] if self.speculation is None else self._speculate(self.speculation)
            ready = self._decode() if self.speculation is None else []
            return events + [event for rows, logits in ready + self._read() for event in self._choose(rows, logits)]

    def _decode(self) -> list[tuple[list[Row], Tensor]]:
        """One forward pass for the running rows of each pool: rows, and their logits [rows, vocab_size]."""
        ready = []
        for pool in self.pools:
            if rows := pool.rows[: pool.running]:
                last = self._tensor([[row.ids[-1]] for row in rows])  # [rows, 1]
                hidden = self.compiled(last, pool.cache[: len(rows)])[:, -1]
                ready.append((rows, self.compiled.logits(hidden)))
        return ready

    def _speculate(self, speculation: Speculation) -> list[Event]:
        """In place of `_decode`: guess what follows each row, and read it with the last token, which gives several."""
        events = []
        for pool in self.pools:
            rooms = [(row, self._length(row.request) - len(row.ids) - 1) for row in pool.rows[: pool.running]]
            guesses = [(row, speculation.guess(row, room)) for row, room in rooms]
            read: list[tuple[Row, Guess, Tensor]] = []
            for _, group in itertools.groupby(guesses, key=lambda pair: len(pair[1].tokens)):
                rows, of_rows = zip(*group)
                ids = self._tensor([[row.ids[-1], *guess.tokens] for row, guess in zip(rows, of_rows)])
                hidden = self.compiled(ids, pool.cache[rows[0].slot : rows[-1].slot + 1])  # [rows, 1 + guessed, width]
                read += zip(rows, of_rows, self.compiled.logits(hidden))
            for row, guess, logits in read:
                for token, scores in speculation.verdicts(row, logits, guess):
                    events.append(self._event(row, token, scores))
                    if events[-1].finish_reason:
                        break
                # Without the guesses that were rejected. A row with an error has left an empty slot.
                pool.cache.truncate(row.slot, min(pool.cache.length(row.slot), len(row.ids) - 1))
        return events

    def _read(self) -> list[tuple[list[Row], Tensor]]:
        """Read at most `AT_ONCE` tokens of prompts: rows whose prompt is read, with their next logits."""
        ready, room = [], AT_ONCE
        while room > 0 and (rows := self._next_to_read(room)):
            pool, count = rows[0].pool, room if self.pools.in_pieces else self.context
            pasts = [self._past(row) for row in rows]
            pieces = [row.ids[past : past + count] for row, past in zip(rows, pasts)]
            for row, past in zip(rows, pasts):
                pool.cache.truncate(row.slot, past)
            ids = self._tensor([*itertools.zip_longest(*pieces, fillvalue=0)]).T  # [rows, longest piece]
            hidden = self.decoder(ids, pool.cache[rows[0].slot : rows[-1].slot + 1])  # [rows, longest piece, width]
            room -= ids.numel()
            for row, past, piece, states in zip(rows, pasts, pieces, hidden):
                pool.cache.truncate(row.slot, past + len(piece))
                if row.reads_whole:
                    following = row.ids[past + 1 : past + len(piece) + 1]
                    row.prompt_logprobs += self._logprobs(states[: len(following)], following, row.request)
            if pasts[0] + len(pieces[0]) == rows[0].prompt_length:  # else it is alone, and longer than one pass
                last = torch.stack([states[len(piece) - 1] for piece, states in zip(pieces, hidden)])
                ready.append((rows, self.compiled.logits(last)))
                pool.running += len(rows)
        return ready

    def _next_to_read(self, room: int) -> list[Row]:
        """Rows of one pool whose prompts fit into one pass of `room` tokens, or one alone that may need more passes."""
        rows: list[Row] = []
        past = unread = 0  # the most of any row
        while row := self._first_unread(rows):
            past = max(past, self._past(row))
            unread = max(unread, row.prompt_length - self._past(row))
            # Shorter prompts are padded: the pass appends `unread` columns to every row.
            fits = unread * (len(rows) + 1) <= room and past + unread <= row.pool.cache.max_length
            if rows and not (fits and row.pool is rows[0].pool and self.pools.in_pieces):
                break
            rows.append(row)
            if not fits:
                break
        return rows

    def _first_unread(self, rows: Sequence[Row]) -> Row | None:
        """The next row to read besides `rows`, in a slot. One that begins as one of them waits to copy that."""
        for pool in self.pools:
            for row in pool.rows[pool.running :]:
                if row not in rows:
                    return row
        if not self._waiting:
            return None
        row = self._waiting[0]
        alike = (other for other in rows if other.request.prefix_group == row.request.prefix_group)
        if any(common(row.ids, other.ids, WORTH_WAITING) == WORTH_WAITING for other in alike):
            return None
        return self._waiting.popleft() if self.pools.admit(row, self._length(row.request)) else None

    def _past(self, row: Row) -> int:
        """How many tokens of a row's prompt are read, or known; the last one is always read for its logits."""
        return min(row.pool.cache.length(row.slot), row.prompt_length - 1)

    def _logprobs(self, hidden: Tensor, ids: list[int], request: Request) -> list[Logprobs]:
        """hidden [tokens, width] and the ids that followed [tokens] → the log-probabilities of each."""
        if not ids:
            return []
        top = request.prompt_logprobs or 0
        return listed(prompt_log_probabilities(self.decoder.logits, hidden, self._tensor(ids), top), ids)

    def _length(self, request: Request) -> int:
        """Positions that a row of the request may need."""
        return min(len(request.prompt) + request.max_new_tokens, self.context)

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> Iterator[Event]:
        """logits [rows, vocab_size] → the event of each row."""
        for row, token, scores in zip(rows, sample(logits, rows).tolist(), logits.split(1)):
            yield self._event(row, token, scores)

    def _event(self, row: Row, token: int, logits: Tensor) -> Event:
        """Append a token, chosen from logits [1, vocab_size], to a row. One that has ended leaves its slot."""
        read, cached, row.prompt_logprobs, row.cached_tokens = row.prompt_logprobs, row.cached_tokens, [], 0
        if row.request.max_new_tokens == 0:
            row.pool.leave(row)
            return Event(row.handle, row.index, None, "", "length", prompt_logprobs=read, cached_tokens=cached)
        of_token: Logprobs = []
        try:
            if token in FAULTS:
                raise UserError(FAULTS[token])
            if row.request.logprobs is not None:
                of_token = listed(log_probabilities(logits, self._tensor([token]), row.request.logprobs), [token])[0]
            text, reason = row.accept(token, self.context)
        except UserError as error:  # of this row alone: its logits, or a grammar that has become too large
            row.pool.leave(row, keep=False)
            return Event(row.handle, row.index, None, "", "error", str(error), cached_tokens=cached)
        if reason is not None:
            row.pool.leave(row)
        return Event(row.handle, row.index, token, text, reason, "", of_token, read, cached)

    def _tensor(self, ids: Any) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.decoder.device)


def listed(found: LogProbabilities, ids: Sequence[int]) -> list[Logprobs]:
    """The log-probabilities of each token: its own first, then the likeliest."""
    likeliest = zip(found.top_ids.tolist(), found.top.tolist())
    return [[(token, own), *zip(*best)] for token, own, best in zip(ids, found.chosen.tolist(), likeliest)]


def _checked(request: Request, vocab_size: int) -> Request:
    """The request with plain numbers. Raises `UserError` for a value of another type, or out of range."""
    ids = {"prompt": request.prompt, "stop_ids": request.stop_ids}
    found: dict[str, Any] = {}
    for name, values in ids.items():
        try:
            found[name] = [operator.index(value) for value in values if not isinstance(value, bool)]
            is_wrong = len(found[name]) < len(values)
        except TypeError:
            is_wrong = True
        if is_wrong:
            raise UserError(f"{name}: expected a list of token ids, found {values!r:.60}")
    if wrong := [token for token in found["prompt"] if not 0 <= token < vocab_size]:
        raise UserError(f"token {wrong[0]} of the prompt: the model has {vocab_size:,} tokens, from 0")
    bounds = {"max_new_tokens": (0, 2**31), "n": (1, MOST_CONTINUATIONS)}
    bounds |= dict.fromkeys(("logprobs", "prompt_logprobs"), (0, vocab_size))
    for name, (least, most) in bounds.items():
        value = getattr(request, name)
        if value is None and name.endswith("logprobs"):
            continue
        try:
            found[name] = operator.index(value)
        except TypeError:
            found[name] = -1
        if isinstance(value, bool) or not least <= found[name] <= most:
            raise UserError(f"{name} {value!r}: expected a whole number from {least} to {most:,}")
    if not isinstance(request.settings, SamplingSettings):
        raise UserError(f"settings: expected SamplingSettings, found {request.settings!r:.60}")
    if request.grammar is not None and not hasattr(request.grammar, "start"):
        raise UserError(f"grammar: expected a constraints.Grammar, found {request.grammar!r:.60}")
    if not isinstance(request.prefix_group, str):
        raise UserError(f"prefix_group: expected text, found {request.prefix_group!r:.60}")
    request.settings.expect_ids_below(vocab_size)
    return replace(request, **found | {"stop_ids": frozenset(found["stop_ids"])})


def check_room(context: int, prompt: int, max_new_tokens: int, scores: bool = False) -> None:
    """Raises `UserError` for an empty prompt, or one without room for a new token, which `scores` do without."""
    least = 0 if scores else 1
    if prompt == 0:
        raise UserError("an empty prompt: give at least one token, such as the end-of-text token")
    if prompt > context - least:
        raise UserError(f"a prompt of {prompt} tokens fills the model's context of {context}: shorten it")
    if max_new_tokens < least:
        raise UserError(f"max_new_tokens {max_new_tokens}: expected {least} or more")


def _of_size(known: np.ndarray, vocab_size: int) -> Tensor:
    """bool [ids] → bool [vocab_size], False beyond the known ids."""
    return F.pad(torch.from_numpy(known), (0, max(0, vocab_size - len(known))))[:vocab_size]
