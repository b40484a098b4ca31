"""Questions whose right answers are known, out of shards of conversations: each one's last answer is what is right."""

from __future__ import annotations

import numpy as np

from slmkit.config import UserError
from slmkit.data.rows.pairs import stretches
from slmkit.data.shards.reader import TokenShards


class Questions:
    """Prompts that leave room for an answer of `max_new_tokens` within `length` tokens, and what is right.

    `too_long` ones leave none and are left out, as are those `without_answer`.
    """

    def __init__(self, shards: TokenShards, length: int, max_new_tokens: int) -> None:
        """Raises `UserError` where the shards are of plain text, or not one question is left."""
        if not shards.header.masked:
            raise UserError(f"{shards.directory}: these token shards hold plain text, not questions and answers")
        self.shards, self.too_long, self.without_answer = shards, 0, 0
        self.places: list[tuple[int, int, int]] = []  # where a prompt begins, where it ends, where its answer does
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
        """The tokens of the longest prompt."""
        return max(map(self.length, range(len(self))))

    def prompt(self, index: int) -> np.ndarray:
        """Everything up to where the assistant is to speak: int64 [prompt]."""
        start, stop, _ = self.places[index]
        return self.shards.tokens_in(start, stop).astype(np.int64)

    def length(self, index: int) -> int:
        """Of its prompt, in tokens."""
        start, stop, _ = self.places[index]
        return stop - start

    def known(self, index: int) -> np.ndarray:
        """The right answer, with the token that ends it: int64 [answer]."""
        _, start, stop = self.places[index]
        return self.shards.tokens_in(start, stop).astype(np.int64)

    def report(self) -> list[str]:
        """A line for each reason for which questions were left out; none where all are there."""
        lines = []
        if self.too_long:
            lines.append(f"{self.too_long:,} questions left out: no room for an answer behind them")
        if self.without_answer:
            lines.append(f"{self.without_answer:,} questions left out: their conversations have no answer")
        return lines
