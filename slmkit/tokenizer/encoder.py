"""Text to ids through a `tokenizers.Tokenizer`, with special tokens either recognised or read as ordinary text.

Tokenizers have rules at the beginning of a text or after a special token, such as a space before the first word, so
text is encoded whole, by one of two copies of the library's tokenizer. One recognises special tokens as `transformers`
does; in the other they have secret spellings, so that no text contains one, neither as an added token nor as an entry
of the model's vocabulary (a Unigram model would find `</s>` there).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from slmkit.tokenizer import byte_level
from slmkit.tokenizer.chat import ChatTokens
from slmkit.tokenizer.fast_encoder import FastEncoder

PROBE = "The cat  sat; it's 12345.\n\n\tCAFÉ cafe\u0301 ﬁ ½ x_y=f(z)!!! 猫が座った 🐈\r\n "
STAND_INS = "\ufdd0\n\u2028x"  # characters put before text; one that does not merge with it is used

_INVALID_UTF8 = re.compile("([\udc80-\udcff]+)")  # from errors="surrogateescape": bytes that are not UTF-8
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: no text, and neither library takes it


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


class TextEncoder:
    """Encodes any text. `library` recognises special tokens; `special` is spelling → id."""

    def __init__(self, library: Tokenizer) -> None:
        self.library = library
        self.bytes = byte_level.bytes_of_tokens(library)  # by id; None for an unused id
        self.is_byte_level = byte_level.is_byte_level(library)
        self.added = dict(sorted(library.get_added_tokens_decoder().items()))
        self.fallback = {*byte_level.fallback_bytes(library)}  # text, which some files declare as special
        special = {token.content: index for index, token in self.added.items() if token.special}
        self.special = {token: index for token, index in special.items() if token not in self.fallback}
        self.secret = {f"<|{secrets.token_hex(16)}|>": index for index in self.special.values()}
        self.unknown = library.token_to_id(getattr(library.model, "unk_token", None) or "")
        self.loses_nothing = byte_level.holds_every_byte(library)
        self.read = self.lost = 0  # characters encoded and lost, if the vocabulary may lose some
        self.spelled, self.secretly = _any_of(self.special), _any_of(self.secret)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("fast", "ordinary", "_stand_ins", "_widths")
        }

    @cached_property
    def fast(self) -> FastEncoder | None:
        """The fast encoder, made on first use in about 0.1 s; None if its ids would differ from `tokenizers`'."""
        encoder = FastEncoder.of(self.library)
        theirs = self.library.encode(PROBE, add_special_tokens=False).ids
        is_sure = encoder and encoder.encode_array(PROBE).tolist() == theirs
        return encoder if is_sure else None

    @cached_property
    def ordinary(self) -> Tokenizer:
        """The library's tokenizer with each special token in its secret spelling."""
        renamed = dict(zip(self.special, self.secret))
        content = json.loads(self.library.to_str())
        model, content["post_processor"] = content["model"], None
        if isinstance(vocabulary := model["vocab"], dict):
            model["vocab"] = {renamed.get(token, token): index for token, index in vocabulary.items()}
            if self.is_byte_level:  # a byte that is special, such as GPT-2's `!` as padding, keeps its name as well
                model["vocab"] |= {byte: vocabulary[byte] for byte in renamed if byte in byte_level.BYTE_CHARACTERS}
        else:
            model["vocab"] = [[renamed.get(token, token), score] for token, score in vocabulary]
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
        if "merges" in model:  # no merge may form a special token
            model["merges"] = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & renamed.keys()]
        added = content["added_tokens"]
        content["added_tokens"] = [token for token in added if token["content"] not in self.fallback]
        for token in content["added_tokens"]:
            if token["special"]:
                token |= {"content": renamed[token["content"]], "normalized": False, "single_word": False}
        return Tokenizer.from_str(json.dumps(content))

    # -- ordinary text ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids [tokens], special tokens read as ordinary text. Lone surrogates are encoded with "surrogatepass"."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as uint32 [tokens], without a Python integer per token."""
        try:
            if self.fast:
                return self.fast.encode_array(text)
            ids = self.ordinary.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # neither library takes lone surrogates
            ids = self.encode_bytes(text.encode("utf-8", "surrogatepass"))
        return np.array(ids, dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """`encode_array` of each text, uint32 [tokens] each, on `threads` threads (default: one per core)."""
        if self.fast:
            threads = threads or os.cpu_count() or 1
            if threads == 1:
                return self._encode_here(texts)
            parts = [texts[start : start + 64] for start in range(0, len(texts), 64)]
            with ThreadPoolExecutor(threads) as pool:
                return list(itertools.chain.from_iterable(pool.map(self._encode_here, parts)))
        try:
            if self.loses_nothing:
                encodings = self.ordinary.encode_batch_fast(list(texts), add_special_tokens=False)
            else:
                encodings = self.ordinary.encode_batch(list(texts), add_special_tokens=False)
                self._count(texts, encodings)
        except TypeError:
            return [self.encode_array(text) for text in texts]
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _encode_here(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            if self.fast:
                return self.fast.encode_arrays(texts)
        except UnicodeEncodeError:
            pass
        return [self.encode_array(text) for text in texts]

    def encode_continuation(self, text: str) -> list[int]:
        """Ids [tokens] of text that continues other text: as `encode`, but without a space put before it.

        It is encoded after a character that merges with nothing in it, whose tokens are then removed.
        """
        for before in "" if self.fast else self._stand_ins:
            encoding = self.ordinary.encode(before + text, add_special_tokens=False)
            if all(start >= 1 or end <= 1 for start, end in encoding.offsets):
                return [index for index, (start, _) in zip(encoding.ids, encoding.offsets) if start >= 1]
        return self.encode(text)

    @cached_property
    def _stand_ins(self) -> list[str]:
        """The `STAND_INS` in this vocabulary. Others would be left out, which shifts the tokens' offsets."""
        ids = [self.ordinary.encode(character, add_special_tokens=False).ids for character in STAND_INS]
        return [one for one, its in zip(STAND_INS, ids) if one.isspace() or one in self.ordinary.decode(its)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids [tokens] of bytes: valid UTF-8 as text, every other byte as its own token.

        Raises `UserError` for invalid UTF-8 if the vocabulary has no byte tokens.
        """
        pieces = _INVALID_UTF8.split(data.decode("utf-8", "surrogateescape"))  # text, invalid, text, invalid, …, text
        ids = self.encode(pieces[0]) if pieces[0] else []
        for invalid, text in zip(pieces[1::2], pieces[2::2]):
            ids += [byte_level.byte_token_id(self.library, byte) for byte in invalid.encode("utf-8", "surrogateescape")]
            ids += self.encode_continuation(text) if text else []
        return ids

    # -- text with special tokens -------------------------------------------------------------------------------------

    def encode_special(self, text: str) -> list[int]:
        """Ids [tokens], special tokens recognised as in `transformers`, which may strip white space next to them."""
        return self.library.encode(SURROGATE.sub("\ufffd", text), add_special_tokens=False).ids

    def encode_rows(self, rows: Sequence[RenderedRow], threads: int | None = None) -> list[ChatRow]:
        """Ids and loss masks of rendered conversations; a token is learned if any character of it is."""
        has_rules = any(token.lstrip or token.rstrip or token.single_word for token in self.added.values())
        if self.fast and not has_rules:
            return self._encode_rows_fast(rows, threads)
        made: dict[int, ChatRow] = {}
        for library, is_shielded in ((self.library, False), (self.ordinary, True)):
            numbers = [number for number, row in enumerate(rows) if row.shielded == is_shielded]
            texts = [rows[number].text for number in numbers]
            encodings = library.encode_batch(texts, add_special_tokens=False) if texts else []
            if not self.loses_nothing:
                self._count(texts, encodings)
            made |= {number: _row_of(encoding, rows[number]) for number, encoding in zip(numbers, encodings)}
        return [made[number] for number in range(len(rows))]

    @cached_property
    def _widths(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of each token [ids]: of its spelling, and of the secret one where it is special."""
        widths = np.array([len(token or b"") for token in self.bytes])
        secretly = widths.copy()
        secretly[[*self.secret.values()]] = [len(secret.encode()) for secret in self.secret]
        return widths, secretly

    def _encode_rows_fast(self, rows: Sequence[RenderedRow], threads: int | None) -> list[ChatRow]:
        """`encode_rows` in one call: text between special tokens is encoded separately, as in the library."""
        cuts = [list(self._cut(row.text, row.shielded)) for row in rows]
        encoded = iter(self.encode_batch([part for cut in cuts for part in cut if isinstance(part, str)], threads))
        widths, secretly = self._widths
        made = []
        for row, cut in zip(rows, cuts):
            parts = [next(encoded) if isinstance(part, str) else np.array([part], dtype=np.uint32) for part in cut]
            ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)
            sizes = (secretly if row.shielded else widths)[ids]
            learned = row.learned
            if not row.text.isascii():
                learned = [(_bytes(row.text[:first]), _bytes(row.text[:last])) for first, last in learned]
            ends = np.cumsum(sizes)
            made.append(ChatRow(ids, is_learned(ends - sizes, ends, learned)))
        return made

    def _count(self, texts: Sequence[str], encodings: Sequence[Any]) -> None:
        """Count characters that are not white space and have no token but the unknown one."""
        for text, encoding in zip(texts, encodings):
            edges = np.zeros(len(text) + 1, dtype=np.int64)
            places = [place for index, place in zip(encoding.ids, encoding.offsets) if index != self.unknown]
            for column, change in ((0, 1), (1, -1)):
                np.add.at(edges, [place[column] for place in places], change)
            self.read += len(text)
            self.lost += sum(not text[place].isspace() for place in np.flatnonzero(np.cumsum(edges)[:-1] == 0))

    def _cut(self, text: str, shielded: bool) -> Iterator[str | int]:
        """The text's parts: ordinary text as strings, special tokens as ids."""
        pattern, ids = (self.secretly, self.secret) if shielded else (self.spelled, self.special)
        for number, part in enumerate(pattern.split(text)):
            if part:
                yield ids[part] if number % 2 else part


def _row_of(encoding: Any, row: RenderedRow) -> ChatRow:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return ChatRow(np.array(encoding.ids, dtype=np.uint32), is_learned(offsets[:, 0], offsets[:, 1], row.learned))


def _any_of(spellings: dict[str, int]) -> re.Pattern[str]:
    """A pattern for any of the spellings, the longest first; matches nothing if there are none."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _bytes(text: str) -> int:
    return len(text.encode())
