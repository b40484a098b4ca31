"""Rendered conversations to rows of tokens: cut at special tokens first, so that many are encoded in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slmkit.tokenizer.chat import ChatTokens


class Piece(NamedTuple):
    """Ordinary text, or the id of a special token: learned as a whole or not at all."""

    content: str | int
    trained: bool


RenderedChat = list[list[Piece]]  # of each row of a conversation, nearly always one


class ChatRow(NamedTuple):
    """Ids, uint32 [tokens], and which of them are learned, bool [tokens]."""

    ids: np.ndarray
    trained: np.ndarray

    def to_lists(self) -> ChatTokens:
        return ChatTokens(self.ids.tolist(), self.trained.tolist())


def encode_pieces(
    chats: Sequence[RenderedChat], encode_batch: Callable[[list[str]], list[np.ndarray]]
) -> list[list[ChatRow]]:
    """The rows of each conversation; `encode_batch` gets the text of all of them at once."""
    contents = [piece.content for chat in chats for row in chat for piece in row]
    encoded = iter(encode_batch([content for content in contents if isinstance(content, str)]))

    def row_of(pieces: list[Piece]) -> ChatRow:
        parts = [
            next(encoded) if isinstance(piece.content, str) else np.array([piece.content], dtype=np.uint32)
            for piece in pieces
        ]
        trained = np.repeat([piece.trained for piece in pieces], [len(part) for part in parts])
        return ChatRow(np.concatenate(parts), trained)

    return [[row_of(row) for row in chat] for chat in chats]


def rows_to_learn(rows: list[ChatRow]) -> list[ChatRow]:
    """Those with anything to learn; the whole conversation where there is nothing in any."""
    return [row for row in rows if row.trained.any()] or rows[-1:]
