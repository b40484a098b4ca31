"""Tokens on disk: written once (`shard_writer.py`), then read as memory.

A directory holds `header.json`; the tokens themselves, `00000.tokens` (uint16 where the vocabulary allows it, else
uint32); `00000.ends` (int64: one past each document's last token, which is its end-of-text token, counted from the
first token of the first shard; a document stands in the shard in which it ends); and for conversations `00000.trained`
(uint8: 1 where a token is learned). All of it little-endian.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slmkit.config import UserError

FORMAT = "slmkit-tokens"
VERSION = 1
HEADER = "header.json"


class Vocabulary(Protocol):
    """What shards know of the tokenizer that made them."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def eos_token_id(self) -> int: ...

    @property
    def pad_token_id(self) -> int | None: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the header. `sha256`: of each of its files, by extension."""

    name: str
    tokens: int
    documents: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Header:
    """What `header.json` says."""

    dtype: str  # "uint16" or "uint32"
    tokenizer: str  # its fingerprint
    vocab_size: int
    eos_token_id: int
    pad_token_id: int | None
    tokens: int
    documents: int
    text_bytes: int  # of the text in UTF-8, for bits per byte
    sources: list[dict[str, Any]]  # path, bytes, sha256
    masked: bool  # whether there are `.trained` files
    perfect_loss: float | None  # nats a token of the best possible model, where the corpus knows it
    shards: list[Shard]
    format: str = FORMAT
    version: int = VERSION

    def file_sizes(self) -> dict[str, int]:
        """Bytes of each file that belongs to this header, by name."""
        width = np.dtype(self.dtype).itemsize
        sizes = {}
        for shard in self.shards:
            sizes[f"{shard.name}.tokens"] = shard.tokens * width
            sizes[f"{shard.name}.ends"] = shard.documents * 8
            if self.masked:
                sizes[f"{shard.name}.trained"] = shard.tokens
        return sizes


@dataclass(frozen=True)
class TokenShards:
    """A directory of shards, memory-mapped: opening it reads no tokens, and processes share the pages they read."""

    directory: Path
    header: Header
    document_ends: np.ndarray  # int64 [documents]: one past each document's last token
    _tokens: list[np.ndarray] = field(repr=False)  # each shard's, mapped
    _trained: list[np.ndarray] = field(repr=False)
    _starts: np.ndarray = field(repr=False)  # int64 [shards]: each shard's first token

    @classmethod
    def open(cls, directory: str | Path) -> TokenShards:
        """Raises `UserError` for what is missing, cut short, or not a directory of shards."""
        directory = Path(directory)
        header = read_header(directory)
        for name, expected in header.file_sizes().items():
            found = (directory / name).stat().st_size if (directory / name).is_file() else None
            if found != expected:
                shown = "is missing" if found is None else f"has {found:,} bytes where its header says {expected:,}"
                raise UserError(f"{directory / name}: {shown}; delete the directory and prepare the data again")
        dtype = np.dtype(header.dtype).newbyteorder("<")
        names = [shard.name for shard in header.shards]
        ends = [_mapped(directory / f"{name}.ends", np.dtype("<i8")) for name in names]
        return cls(
            directory,
            header,
            document_ends=np.concatenate(ends),
            _tokens=[_mapped(directory / f"{name}.tokens", dtype) for name in names],
            _trained=[_mapped(directory / f"{name}.trained", np.dtype("u1")) for name in names if header.masked],
            _starts=np.cumsum([0] + [shard.tokens for shard in header.shards[:-1]]),
        )

    def __len__(self) -> int:
        return self.header.tokens

    def tokens_in(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), across shard borders: uint16 or uint32 [stop - start], to be read only."""
        return self._slice(self._tokens, start, stop)

    def trained_in(self, start: int, stop: int) -> np.ndarray:
        """Whether each of these tokens is learned: bool [stop - start]. Only where `header.masked`."""
        return self._slice(self._trained, start, stop).astype(bool)

    def check_tokenizer(self, tokenizer: Vocabulary) -> None:
        """Raises `UserError` where these tokens are another tokenizer's."""
        if tokenizer.fingerprint != self.header.tokenizer:
            raise UserError(
                f"{self.directory}: made by tokenizer {self.header.tokenizer[:12]} ({self.header.vocab_size:,} tokens) "
                f"and not by this one, {tokenizer.fingerprint[:12]} ({len(tokenizer):,} tokens): prepare the data again"
            )

    def verify(self) -> None:
        """Read everything and compare checksums. Raises `UserError` naming the first file that differs."""
        for shard in self.header.shards:
            for kind, expected in shard.sha256.items():
                path = self.directory / f"{shard.name}.{kind}"
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        raise UserError(f"{path}: its content is not what was written; prepare the data again")

    def _slice(self, parts: list[np.ndarray], start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"expected a range within {len(self)} tokens, found [{start}, {stop})")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        begin = start - int(self._starts[first])
        pieces = [parts[first][begin : begin + stop - start]]
        missing = stop - start - len(pieces[0])
        while missing:
            first += 1
            pieces.append(parts[first][:missing])
            missing -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def read_header(directory: Path) -> Header:
    """Raises `UserError` where `directory` has no header, or one that is not of token shards."""
    path = directory / HEADER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory}: no token shards here ({HEADER} is missing); make them with `slm data prepare`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; prepare the data again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not the header of token shards")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: format version {content.get('version')!r}, this slmkit reads {VERSION}; prepare the data again"
        )
    try:
        return Header(**content | {"shards": [Shard(**shard) for shard in content["shards"]]})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged header: {error}; prepare the data again") from None


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing can be mapped there: a shard in which no document ends
        return np.zeros(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
