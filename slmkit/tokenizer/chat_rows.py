"""Rendered conversations, and the token rows made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmkit.tokenizer.chat import ChatTokens


class RenderedRow(NamedTuple):
    """The text of a conversation and its learned ranges, in characters: start, one past the end.

    `shielded`: a message spells special tokens, so the template's own are written in secret spellings.
    """

    text: str
    learned: list[tuple[int, int]]
    shielded: bool


RenderedChat = list[RenderedRow]  # the rows of a conversation, nearly always one


class ChatRow(NamedTuple):
    """Ids, uint32 [tokens], and which of them are learned, bool [tokens]."""

    ids: np.ndarray
    trained: np.ndarray

    def to_lists(self) -> ChatTokens:
        return ChatTokens(self.ids.tolist(), self.trained.tolist())


def is_learned(starts: np.ndarray, ends: np.ndarray, learned: Sequence[tuple[int, int]]) -> np.ndarray:
    """Whether each token, int64 starts and ends [tokens], overlaps a learned range of the text.  → bool [tokens]"""
    found = np.zeros(len(starts), dtype=bool)
    for first, last in learned:
        found |= (starts < last) & (ends > first) | (starts == ends) & (starts >= first) & (starts < last)
    return found


def rows_to_learn(rows: list[ChatRow]) -> list[ChatRow]:
    """The rows with learned tokens; the last row, the whole conversation, if there is none."""
    return [row for row in rows if row.trained.any()] or rows[-1:]
