"""The tokens of a text one by one, as a page shows them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TypedDict

from slmkit.tokenizer.tokenizer import SLMTokenizer


class Piece(TypedDict):
    """A token. Several tokens may make one character: the first of them has the text of all, the others none."""

    id: int
    text: str
    span: int  # how many tokens, with this one, the text belongs to; 0 if it is with a token before
    bytes: str  # in hexadecimal
    special: bool


def pieces(tokenizer: SLMTokenizer, ids: Iterable[int]) -> list[Piece]:
    """The tokens of ids [tokens]. Texts that follow each other join to the text of all; bytes that are not UTF-8 are
    U+FFFD.

    Raises `UserError` for an id outside the vocabulary.
    """
    special = {*tokenizer.special_tokens.values()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found: list[Piece] = []
    first: Piece | None = None  # of tokens whose last character is not complete
    for index in ids:
        if first is not None and index in special:
            first["text"] += decoder.decode(b"", final=True)
            first = None
        content = tokenizer.token_bytes(index)
        piece = Piece(id=index, text="", span=0, bytes=content.hex(), special=index in special)
        found.append(piece)
        first = first or piece
        first["text"] += decoder.decode(content)
        first["span"] += 1
        if not decoder.getstate()[0]:
            first = None
    if first is not None:
        first["text"] += decoder.decode(b"", final=True)
    return found
