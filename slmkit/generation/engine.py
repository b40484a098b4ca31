"""The engine: requests of any kind share the forward passes of one model.

    handle = engine.insert(request)
    while engine.is_busy:
        for event in engine.step(): ...
    engine.remove(handle)                 # before its end

A step appends one token to every running row, and reads at most `at_once` tokens of prompts, so that a long prompt
delays nobody for long. What a row gets depends on its request alone, not on the other rows, or when they come and go.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.config import UserError
from slmkit.generation.ensemble import LanguageModel, evaluating
from slmkit.generation.request import Request, check_room, checked
from slmkit.generation.sampling import (
    FAULTS,
    LogProbabilities,
    log_probabilities,
    prompt_log_probabilities,
    sample,
    seed_of,
)
from slmkit.generation.slots import Pool, Pools, common
from slmkit.generation.speculation import Guess, Speculation
from slmkit.generation.text import Spelling, TextTail, TextTokenizer
from slmkit.model.cache import AT_ONCE
from slmkit.model.compiled import for_decoding

# A stop token or string, `max_new_tokens` reached, the model's context is full, or an error of this row.
FinishReason = Literal["stop", "length", "context", "error"]
# A prompt that shares this many tokens with one that is being read waits, and copies them.
WORTH_WAITING = 32
Logprobs = list[tuple[int, float]]  # ids and natural logarithms of their probabilities


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
        # Nothing is read for a prompt's last token if no token follows it.
        self.to_read = max(1, self.prompt_length - (request.max_new_tokens == 0))
        # What is scored is read here, the tokens before may be known from another slot.
        self.scores = index == 0 and request.prompt_logprobs is not None
        self.reads_from = min(self.to_read, request.scored_from if self.scores else self.to_read) - 1
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
    once, which is faster for a few rows of a large model. `at_once`: tokens of prompts that a step reads.
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
        at_once: int = AT_ONCE,
    ) -> None:
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise UserError(f"max_rows {max_rows!r}: expected a whole number from 1")
        if memory is not None and not memory >= 0:
            raise UserError(f"memory {memory!r}: expected a number of bytes, or None")
        # One way for all prompts and one for all new tokens: a row's results must not depend on how many others run.
        self.decoder, self.compiled = decoder, for_decoding(decoder)
        self.tokenizer, self.context = tokenizer, decoder.max_positions
        self._spelling = None if tokenizer is None else Spelling(tokenizer)
        self.pools, self.at_once = Pools(decoder, max_rows, memory, reuse, at_once), at_once
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
        request = checked(request, self.decoder.vocab_size)
        check_room(self.context, len(request.prompt), request.max_new_tokens, request.prompt_logprobs is not None)
        if self.tokenizer is None and (request.stop or request.grammar is not None):
            raise UserError("stop strings and grammars need a tokenizer: Engine(decoder, tokenizer)")
        self.pools.expect(self._length(request))
        handle = next(self._handles)
        for index in range(request.n):
            spelling = self._spelling if request.max_new_tokens > 0 else None
            tail = None if spelling is None else TextTail(spelling, request.prompt, request.stop)
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
            ended = self._ended()  # in a step that failed
            for pool in self.pools:  # a step that failed may have read a row's last token, or guesses
                for row in pool.rows[: pool.running]:
                    pool.cache.truncate(row.slot, len(row.ids) - 1)
            events = [] if self.speculation is None else self._speculate(self.speculation)
            ready = self._decode() if self.speculation is None else []
            events += [event for rows, logits in ready + self._read() for event in self._choose(rows, logits)]
            return ended + events + self._ended()

    def _ended(self) -> list[Event]:
        """Rows that are read and want no new token leave: the last slots first, so that no other row has to move."""
        slots = [row for pool in self.pools for row in reversed(pool.rows[: pool.running])]
        rows = [row for row in slots if row.request.max_new_tokens == 0]
        for row in rows:
            row.pool.leave(row)
        return [
            Event(row.handle, row.index, None, "", "length", "", [], row.prompt_logprobs, row.cached_tokens)
            for row in rows
        ]

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
        """Read at most `at_once` tokens of prompts: rows whose prompt is read, with their next logits."""
        ready, room = [], self.at_once
        while room > 0 and (rows := self._next_to_read(room)):
            pool, count = rows[0].pool, room if self.pools.in_pieces else self.context
            pasts = [self._past(row) for row in rows]
            pieces = [row.ids[past : min(past + count, row.to_read)] for row, past in zip(rows, pasts)]
            for row, past in zip(rows, pasts):
                pool.cache.truncate(row.slot, past)
            ids = self._tensor([*itertools.zip_longest(*pieces, fillvalue=0)]).T  # [rows, longest piece]
            hidden = self.decoder(ids, pool.cache[rows[0].slot : rows[-1].slot + 1])  # [rows, longest piece, width]
            room -= ids.numel()
            for row, past, piece in zip(rows, pasts, pieces):
                pool.cache.truncate(row.slot, past + len(piece))
            self._score(rows, pasts, pieces, hidden)
            if pasts[0] + len(pieces[0]) == rows[0].to_read:  # else it is alone, and longer than one pass
                drawn = [place for place, row in enumerate(rows) if row.request.max_new_tokens > 0]
                if drawn:
                    last = torch.stack([hidden[place, len(pieces[place]) - 1] for place in drawn])
                    ready.append(([rows[place] for place in drawn], self.compiled.logits(last)))
                pool.running += len(rows)
        return ready

    def _score(self, rows: list[Row], pasts: list[int], pieces: list[list[int]], hidden: Tensor) -> None:
        """Note down the log-probabilities of the tokens that follow hidden states [rows, longest piece, width]."""
        states: list[Tensor] = []  # of each row [scored, width]
        following: list[list[int]] = []
        wanted = [(row, *rest) for row, *rest in zip(rows, pasts, pieces, hidden) if row.scores]
        for row, past, piece, of_row in wanted:
            first = max(0, row.reads_from - past)
            following.append(row.ids[past + first + 1 : past + len(piece) + 1])
            states.append(of_row[first : first + len(following[-1])])
        if ids := [*itertools.chain.from_iterable(following)]:
            top = max(row.request.prompt_logprobs for row, *_ in wanted)
            found = prompt_log_probabilities(self.decoder.logits, torch.cat(states), self._tensor(ids), top)
            each = iter(listed(found, ids))
            for (row, *_), its in zip(wanted, following):
                row.prompt_logprobs += [entry[: 1 + row.request.prompt_logprobs] for _, entry in zip(its, each)]

    def _next_to_read(self, room: int) -> list[Row]:
        """Rows of one pool whose prompts fit into one pass of `room` tokens, or one alone that may need more passes."""
        rows: list[Row] = []
        past = unread = 0  # the most of any row
        while row := self._first_unread(rows):
            past = max(past, self._past(row))
            unread = max(unread, row.to_read - self._past(row))
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
        alike = [other for other in rows if other.request.prefix_group == row.request.prefix_group]
        shared = [self._past(other) + WORTH_WAITING for other in alike]  # what is only read now, and worth it
        if any(n <= row.reads_from and common(row.ids, other.ids, n) == n for other, n in zip(alike, shared)):
            return None
        return self._waiting.popleft() if self.pools.admit(row, self._length(row.request)) else None

    def _past(self, row: Row) -> int:
        """How many tokens of a row's prompt are read, or known; the last one is always read for its logits."""
        return min(row.pool.cache.length(row.slot), row.to_read - 1)

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


def _of_size(known: np.ndarray, vocab_size: int) -> Tensor:
    """bool [ids] → bool [vocab_size], False beyond the known ids."""
    return F.pad(torch.from_numpy(known), (0, max(0, vocab_size - len(known))))[:vocab_size]
