"""Questions with known answers, from shards of conversations; the last answer of each is the right one."""

from __future__ import annotations

import numpy as np

from slmkit.config import UserError
from slmkit.data.rows.pairs import stretches
from slmkit.data.shards.reader import TokenShards


class Questions:
    """Prompts that leave room for `max_new_tokens` within `length` tokens, and their right answers.

    Prompts that are `too_long` and conversations `without_answer` are left out, and counted.
    """

    def __init__(self, shards: TokenShards, length: int, max_new_tokens: int) -> None:
        """Raises `UserError` if the shards hold plain text, or no question is left."""
        if not shards.header.masked:
            raise UserError(f"{shards.directory}: these token shards hold plain text, not questions and answers")
        self.shards, self.too_long, self.without_answer = shards, 0, 0
        self.places: list[tuple[int, int, int]] = []  # first token of a prompt, of its answer, and one past that
        start = 0
        for end in shards.document_ends.tolist():
            starts, stops = stretches(shards.trained_in(start, end))
            if not len(starts):
                self.without_answer += 1
            elif starts[-1] + max_new_tokens > length:
                self.too_long += 1
            else:
                self.places.append((start, start + int(starts[-1]), start + int(stops[-1])))
            start = end
        if not self.places:
            raise UserError(
                f"{shards.directory}: not one question leaves room for {max_new_tokens} tokens of an answer within "
                f"{length}: raise train.sequence_length, or lower grpo.max_new_tokens"
            )

    def __len__(self) -> int:
        return len(self.places)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(self.length, range(len(self))))

    def prompt(self, index: int) -> np.ndarray:
        """The prompt including the generation prompt: int64 [prompt]."""
        start, stop, _ = self.places[index]
        return self.shards.tokens_in(start, stop).astype(np.int64)

    def length(self, index: int) -> int:
        """Tokens in the prompt."""
        start, stop, _ = self.places[index]
        return stop - start

    def known(self, index: int) -> np.ndarray:
        """The right answer and its end-of-turn token: int64 [answer]."""
        _, start, stop = self.places[index]
        return self.shards.tokens_in(start, stop).astype(np.int64)

    def report(self) -> list[str]:
        """One line for each kind of questions that are left out."""
        lines = []
        if self.too_long:
            lines.append(f"{self.too_long:,} questions left out: no room for an answer behind them")
        if self.without_answer:
            lines.append(f"{self.without_answer:,} questions left out: their conversations have no answer")
        return lines
