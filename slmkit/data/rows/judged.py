"""Answers labelled good or bad as token shards, and their rows, for KTO.

In a directory of judged shards each document is a conversation whose last answer has a label. Only it is learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.order import permuted
from slmkit.data.packing import IGNORED, padded, row_of_labels
from slmkit.data.prepare.conversations import text_bytes
from slmkit.data.prepare.text_to_shards import Progress, end_to_end, no_progress
from slmkit.data.rows.pairs import AT_ONCE, answers_alone
from slmkit.data.shards.reader import TokenShards
from slmkit.data.shards.writer import ShardWriter
from slmkit.data.sources import Judged, tools_of
from slmkit.data.stream import Rows

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer


def prepare_judgements(
    judgements: Iterable[Judged],
    tokenizer: SLMTokenizer,
    directory: str | Path,
    *,
    sources: Sequence[dict[str, Any]] = (),
    progress: Progress = no_progress,
) -> TokenShards:
    """Tokenize each conversation, with an end-of-text token after it, and write it with its label to shards.

    Arguments and `UserError`s as for `prepare_chat`.
    """
    with ShardWriter(directory, tokenizer, masked=True, judged=True, sources=sources) as writer:
        waiting = iter(judgements)
        while batch := list(itertools.islice(waiting, AT_ONCE)):
            chats = [one.messages for one in batch]
            encoded = tokenizer.encode_rendered(
                [tokenizer.render_chat(chat, tools=tools_of(one.messages)) for one, chat in zip(batch, chats)]
            )
            tokenizer.check_losses()
            rows = [answers_alone(chat[-1], messages[-1:]) for chat, messages in zip(encoded, chats)]
            ids, ends, trained = end_to_end(rows, tokenizer.eos_token_id)
            labels = np.array([one.label for one in batch])
            writer.add(ids, ends, trained, labels, text_bytes=sum(map(text_bytes, chats)))
            progress(writer.documents, writer.tokens, writer.text_bytes)
    return TokenShards.open(directory)


class JudgedRows(Rows):
    """Judged answers, one per row: ids and labels [length] of the conversation up to the answer's end, right-padded.

    Extra tensors: `desirable`, whether the answer is good; `other_ids` and `other_labels` [length], the prompt with the
    answer of another row, from which KTO estimates a divergence; and `reference` [2], if set, the reference model's
    log-probabilities of both answers. `seed` decides the other row; every row's answer is used once.

    `truncated` answers are cut at the end of the row; `untrained` ones begin after it and are left out.
    """

    def __init__(self, shards: TokenShards, length: int, seed: int = 0) -> None:
        """Raises `UserError` if the shards have no judged answers, or no answer has anything to learn."""
        if not shards.header.judged:
            raise UserError(
                f"{shards.directory}: these token shards hold no answers labelled good or bad; "
                "prepare the data with --judged"
            )
        self.shards, self.length, self.pad_id = shards, length, shards.header.pad_token_id or 0
        ends = shards.document_ends
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
        learned = np.append(np.flatnonzero(shards.trained_in(0, len(shards))), len(shards))
        firsts = learned[np.searchsorted(learned, starts)]  # first token of each answer
        lasts = learned[np.searchsorted(learned, ends) - 1] + 1  # one past its last token
        kept = (starts < firsts) & (firsts < np.minimum(ends, starts + length))
        self.untrained, self.truncated = int((~kept).sum()), int((lasts - starts > length)[kept].sum())
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
        self.reference: np.ndarray | None = None

    @property
    def rows_in_epoch(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer, its own or the other one."""
        return min(self.length, int(self._lengths().max()))

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # int64 [length] each
        return self._with_answer(index, index)

    def documents(self, index: int) -> np.ndarray:
        """int64 [length], all zero: a row is one conversation."""
        return np.zeros(self.length, dtype=np.int64)

    def extra(self, index: int) -> dict[str, np.ndarray]:  # [length], desirable [], reference [2]
        ids, labels = self._with_answer(index, int(self.others[index]))
        found = {"desirable": np.asarray(self.desirable[index]), "other_ids": ids, "other_labels": labels}
        return found if self.reference is None else found | {"reference": self.reference[index]}

    def longest_first(self) -> list[int]:  # [rows]
        return np.argsort(-self._lengths(), kind="stable").tolist()

    def report(self) -> list[str]:
        """One line for each kind of rows that are left out or cut."""
        lines = []
        if self.untrained:
            lines.append(f"{self.untrained:,} rows left out: their answer begins beyond {self.length:,} tokens")
        if self.truncated:
            lines.append(f"{self.truncated:,} answers are cut at {self.length:,} tokens")
        return lines

    def _lengths(self) -> np.ndarray:
        prompts, answers = np.diff(self.prompts)[:, 0], np.diff(self.answers)[:, 0]
        return prompts + np.maximum(answers, answers[self.others])

    def _with_answer(self, index: int, other: int) -> tuple[np.ndarray, np.ndarray]:
        """The prompt of one row and the answer of another: ids and labels, int64 [length] each."""
        prompt, answer = self.prompts[index].tolist(), self.answers[other].tolist()
        both = np.concatenate([self.shards.tokens_in(*prompt), self.shards.tokens_in(*answer)])
        tokens = both[: self.length].astype(np.int64)
        labels = row_of_labels(tokens, np.arange(len(tokens)) >= prompt[1] - prompt[0])
        return padded([tokens], self.length, self.pad_id), padded([labels], self.length, IGNORED)
