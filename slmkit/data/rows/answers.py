"""Rows of shards with answers: pairs for preference tuning, judged answers for KTO, questions for GRPO.

In shards of pairs, documents 2i and 2i + 1 are the conversations with the better and the worse answer of pair i, and
only the part after their common beginning is learned. In judged shards each document is a conversation whose last
answer has a label, and only it is learned. Questions are read from shards of conversations; the last answer of each is
the right one.
"""

from __future__ import annotations

import numpy as np

from slmkit.config import UserError
from slmkit.data.order import permuted
from slmkit.data.packing import learned_ranges, row_of_labels
from slmkit.data.shards.reader import TokenShards
from slmkit.data.stream import ShardRows, document_spans


class AnswerRows(ShardRows):
    """What rows of answers have in common.

    `reference` [rows, 2], if set, is an extra tensor: the reference model's log-probabilities of the two answers.
    """

    lengths: np.ndarray  # tokens of the longer conversation of each row, int64 [rows]

    reference: np.ndarray | None = None

    @property
    def rows_in_epoch(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer."""
        return min(self.length, int(self.lengths.max()))

    def longest_first(self) -> list[int]:  # [rows]
        return np.argsort(-self.lengths, kind="stable").tolist()

    def extra(self, index: int) -> dict[str, np.ndarray]:  # reference [2]
        return {} if self.reference is None else {"reference": self.reference[index]}

    def _cut(self, tokens: np.ndarray, learned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels, int64 [length] each, of tokens and whether each is learned [n]."""
        tokens = tokens[: self.length].astype(np.int64)
        return self._padded([tokens], [row_of_labels(tokens, learned[: self.length])])


class PairRows(AnswerRows):
    """Pairs, one per row: ids and labels [2, length], the better answer first; right-padded.

    Pairs with an answer that begins after the end of the row, and pairs whose answers have the same tokens (because of
    the chat template or the cut), are left out.
    """

    def __init__(self, shards: TokenShards, length: int) -> None:
        """Raises `UserError` if the shards have no pairs, or no pair has anything to learn."""
        if not shards.header.masked or shards.header.judged or shards.header.documents % 2:
            raise UserError(f"{shards.directory}: token shards without pairs of answers; prepare the data with --pairs")
        super().__init__(shards, length)
        starts, ends = document_spans(shards)
        stops = np.minimum(ends, starts + length)
        learned = np.flatnonzero(shards.trained_in(0, len(shards)))
        firsts, lasts = np.searchsorted(learned, starts + 1), np.searchsorted(learned, ends)
        kept = np.searchsorted(learned, stops) - firsts  # learned tokens within a row: [documents]
        whole = (kept > 0).reshape(-1, 2).all(axis=1)  # [pairs]
        self.sides = np.stack([starts, stops], axis=1).reshape(
            -1, 2, 2
        )  # first token, one past the last: [pairs, 2, 2]
        sizes = np.diff(self.sides)[..., 0]  # [pairs, 2]
        equal = sizes[:, 0] == sizes[:, 1]
        equal[equal] = [self._is_equal(index) for index in np.flatnonzero(equal).tolist()]
        cut = (kept < lasts - firsts).reshape(-1, 2).any(axis=1) & whole & ~equal
        self.left_out = {
            f"pairs left out: an answer begins after {length:,} tokens": int((~whole).sum()),
            f"pairs left out: their answers have the same tokens within {length:,}": int((whole & equal).sum()),
            f"pairs have an answer that is cut at {length:,} tokens": int(cut.sum()),
        }
        self.sides = self.sides[whole & ~equal]
        if not len(self.sides):
            raise UserError(
                f"{shards.directory}: no pair to learn from: {'; '.join(self.report())}; check the pairs, "
                "or raise train.sequence_length"
            )
        self.lengths = np.diff(self.sides)[..., 0].max(axis=1)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # int64 [2, length] each
        sides = [(self.shards.tokens_in(*side), self.shards.trained_in(*side)) for side in self.sides[index].tolist()]
        ids, labels = zip(*(self._cut(tokens, trained) for tokens, trained in sides))
        return np.stack(ids), np.stack(labels)

    def _is_equal(self, index: int) -> bool:
        """Whether both answers of a pair have the same tokens."""
        better, worse = (self.shards.tokens_in(*side) for side in self.sides[index].tolist())
        return np.array_equal(better, worse)


class JudgedRows(AnswerRows):
    """Judged answers, one per row: ids and labels [length] of the conversation up to the answer's end, right-padded.

    Further extra tensors: `desirable`, whether the answer is good; `other_ids` and `other_labels` [length], the prompt
    with the answer of another row, from which KTO estimates a divergence. `seed` decides the other row; every row's
    answer is used once. Answers are cut at the end of the row; rows whose answer begins after it are left out.
    """

    def __init__(self, shards: TokenShards, length: int, seed: int = 0) -> None:
        """Raises `UserError` if the shards have no judged answers, or no answer has anything to learn."""
        if not shards.header.judged:
            raise UserError(
                f"{shards.directory}: these token shards hold no answers labelled good or bad; "
                "prepare the data with --judged"
            )
        super().__init__(shards, length)
        starts, ends = document_spans(shards)
        learned = np.append(np.flatnonzero(shards.trained_in(0, len(shards))), len(shards))
        firsts = learned[np.searchsorted(learned, starts)]  # first token of each answer
        lasts = learned[np.searchsorted(learned, ends) - 1] + 1  # one past its last token
        kept = (starts < firsts) & (firsts < np.minimum(ends, starts + length))
        self.left_out = {
            f"rows left out: their answer begins beyond {length:,} tokens": int((~kept).sum()),
            f"answers are cut at {length:,} tokens": int((lasts - starts > length)[kept].sum()),
        }
        if not kept.any():
            raise UserError(
                f"{shards.directory}: no answer begins within {length:,} tokens in any of {len(ends):,} "
                "conversations; raise train.sequence_length"
            )
        self.prompts = np.stack([starts, firsts], axis=1)[kept]  # first token and one past the last: [rows, 2]
        self.answers = np.stack([firsts, lasts], axis=1)[kept]
        self.desirable = shards.labels[kept]
        order = permuted(np.arange(len(self.prompts)), len(self.prompts), seed, 0)
        self.others = np.empty_like(order)  # the row with the other answer; itself only if there is no other
        self.others[order] = np.roll(order, 1)
        prompts, answers = np.diff(self.prompts)[:, 0], np.diff(self.answers)[:, 0]
        self.lengths = prompts + np.maximum(answers, answers[self.others])

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # int64 [length] each
        return self._with_answer(index, index)

    def extra(self, index: int) -> dict[str, np.ndarray]:  # [length], desirable [], reference [2]
        ids, labels = self._with_answer(index, int(self.others[index]))
        found = {"desirable": np.asarray(self.desirable[index]), "other_ids": ids, "other_labels": labels}
        return found | super().extra(index)

    def _with_answer(self, index: int, other: int) -> tuple[np.ndarray, np.ndarray]:
        """The prompt of one row and the answer of another: ids and labels, int64 [length] each."""
        prompt, answer = (
            self.shards.tokens_in(*place.tolist()) for place in (self.prompts[index], self.answers[other])
        )
        tokens = np.concatenate([prompt, answer])
        return self._cut(tokens, np.arange(len(tokens)) >= len(prompt))


class Questions:
    """Prompts that leave room for `max_new_tokens` within `length` tokens, and their right answers.

    Prompts that are too long and conversations without an answer are left out, and counted.
    """

    def __init__(self, shards: TokenShards, length: int, max_new_tokens: int) -> None:
        """Raises `UserError` if the shards hold plain text, or no question is left."""
        if not shards.header.masked:
            raise UserError(f"{shards.directory}: these token shards hold plain text, not questions and answers")
        self.shards, too_long, without_answer = shards, 0, 0
        self.places: list[tuple[int, int, int]] = []  # first token of a prompt, of its answer, and one past that
        for start, end in zip(*(places.tolist() for places in document_spans(shards))):
            starts, stops = learned_ranges(shards.trained_in(start, end))
            if not len(starts):
                without_answer += 1
            elif starts[-1] + max_new_tokens > length:
                too_long += 1
            else:
                self.places.append((start, start + int(starts[-1]), start + int(stops[-1])))
        if not self.places:
            raise UserError(
                f"{shards.directory}: not one question leaves room for {max_new_tokens} tokens of an answer within "
                f"{length}: raise train.sequence_length, or lower grpo.max_new_tokens"
            )
        self.longest = max(map(self.length, range(len(self))))  # tokens of the longest prompt
        self.left_out = {
            "questions left out: too long to leave room for an answer": too_long,
            "questions left out: their conversations have no answer": without_answer,
        }

    def __len__(self) -> int:
        return len(self.places)

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
        return [f"{count:,} {what}" for what, count in self.left_out.items() if count]
