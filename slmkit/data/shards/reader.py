"""Reader of token shards (written by `writer.py` and `prepare/text_to_shards.py`), with random access.

A directory holds `header.json`; the tokens, `00000.tokens` (uint16 if the vocabulary allows it, else uint32);
`00000.ends` (int64: one past each document's last token, which is its end-of-text token, counted from the first token
of this shard; a document belongs to the shard in which it ends); for conversations `00000.trained` (uint8: 1 if a
token is learned); and for judged answers `00000.labels` (uint8, one per document: 1 if it is good). All is
little-endian.

A shard does not depend on the shards before it, so that they can be made in any order, anywhere. They are read with
`pread`, not memory-mapped: a process then holds only what it asked for, however large the corpus, and a file truncated
during reading is an error, not a crash.
"""

from __future__ import annotations

import functools
import itertools
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.config import UserError, read_json_object
from slmkit.files import file_sha256
from slmkit.tokenizer import SLMTokenizer

FORMAT = "slmkit-tokens"
VERSION = 2
HEADER = "header.json"
OPEN_FILES = 256  # of one directory; most systems allow 1,024 per process


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the header. `sha256`: hex digest of each of its files, by extension."""

    name: str
    tokens: int
    documents: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Header:
    """Contents of `header.json`."""

    dtype: str  # "uint16" or "uint32"
    tokenizer: str  # fingerprint
    vocab_size: int
    eos_token_id: int
    pad_token_id: int | None
    tokens: int
    documents: int
    text_bytes: int  # UTF-8 size of the text, for bits per byte
    sources: list[dict[str, Any]]  # path, bytes, sha256
    masked: bool  # whether there are `.trained` files
    perfect_loss: float | None  # nats per token of the best possible model, if the corpus knows it
    shards: list[Shard]
    shuffle_seed: int | None = None  # of a shuffle of all documents; None: in their original order
    cleaning: dict[str, Any] | None = None  # cleaning settings, and how many documents were kept and dropped
    judged: bool = False  # whether there are `.labels` files
    format: str = FORMAT
    version: int = VERSION

    @classmethod
    def of(cls, tokenizer: SLMTokenizer, shards: Sequence[Shard], **fields: Any) -> Header:
        """The header of shards that are made with a tokenizer."""
        return cls(
            dtype="uint16" if len(tokenizer) <= 1 << 16 else "uint32",
            tokenizer=tokenizer.fingerprint,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            masked=any("trained" in shard.sha256 for shard in shards),
            judged=any("labels" in shard.sha256 for shard in shards),
            shards=list(shards),
            **fields,
        )

    def file_sizes(self) -> dict[str, int]:
        """Size in bytes of each file of this header, by name."""
        width = np.dtype(self.dtype).itemsize
        sizes = {}
        for shard in self.shards:
            sizes[f"{shard.name}.tokens"] = shard.tokens * width
            sizes[f"{shard.name}.ends"] = shard.documents * 8
            if self.masked:
                sizes[f"{shard.name}.trained"] = shard.tokens
            if self.judged:
                sizes[f"{shard.name}.labels"] = shard.documents
        return sizes


class TokenShards:
    """A directory of shards. Opening reads only the header; threads and forked processes may share it."""

    def __init__(self, directory: Path, header: Header) -> None:
        self.directory, self.header = directory, header
        self._starts = [0, *itertools.accumulate(shard.tokens for shard in header.shards)]  # first token of each shard
        self._dtype = np.dtype(header.dtype).newbyteorder("<")
        self._open = functools.lru_cache(OPEN_FILES)(functools.partial(_OpenFile, directory, header.shards))

    def __reduce__(self) -> tuple[Any, ...]:  # a spawned process opens the files again
        return TokenShards.open, (self.directory,)

    @classmethod
    def open(cls, directory: str | Path) -> TokenShards:
        """Raises `UserError` for a missing or truncated file, and for anything but a directory of shards."""
        directory = Path(directory)
        header = read_header(directory)
        for name, expected in header.file_sizes().items():
            found = (directory / name).stat().st_size if (directory / name).is_file() else None
            if found != expected:
                shown = "is missing" if found is None else f"has {found:,} bytes where its header says {expected:,}"
                raise UserError(f"{directory / name}: {shown}; delete the directory and prepare the data again")
        return cls(directory, header)

    def __len__(self) -> int:
        return self.header.tokens

    @functools.cached_property
    def document_ends(self) -> np.ndarray:
        """One past each document's last token: int64 [documents], read at the first call and kept."""
        parts = [
            np.fromfile(self.directory / f"{shard.name}.ends", dtype="<i8") + start
            for shard, start in zip(self.header.shards, self._starts)
        ]
        return np.concatenate(parts)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Whether each document is a good answer: bool [documents]. Requires `header.judged`."""
        parts = [np.fromfile(self.directory / f"{shard.name}.labels", dtype="u1") for shard in self.header.shards]
        return np.concatenate(parts).astype(bool)

    def tokens_in(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), across shard borders: uint16 or uint32 [stop - start], read-only."""
        return self._read("tokens", self._dtype, start, stop)

    def runs(self, starts: Sequence[int], length: int) -> np.ndarray:
        """`tokens_in(start, start + length)` of each start in one array: uint16 or uint32 [runs, length]."""
        runs = np.empty((len(starts), length), self._dtype)
        if not runs.size:
            return runs
        memory, itemsize = runs.data.cast("B"), self._dtype.itemsize
        width = itemsize * length
        for row, start in enumerate(starts):
            shard = bisect_right(self._starts, start) - 1
            if start >= 0 and start + length <= self._starts[min(shard + 1, len(self._starts) - 1)]:  # the common case
                place = memory[row * width : (row + 1) * width]
                offset = (start - self._starts[shard]) * itemsize
                try:
                    if os.preadv(self._open(shard, "tokens").descriptor, [place], offset) == width:
                        continue
                except OSError:
                    pass
            runs[row] = self.tokens_in(start, start + length)  # across a border, or out of range, which raises
        return runs

    def trained_in(self, start: int, stop: int) -> np.ndarray:
        """Whether each of these tokens is learned: bool [stop - start]. Requires `header.masked`."""
        return self._read("trained", np.dtype("u1"), start, stop).astype(bool)

    def check_tokenizer(self, tokenizer: SLMTokenizer) -> None:
        """Raises `UserError` if these tokens are another tokenizer's."""
        if tokenizer.fingerprint != self.header.tokenizer:
            raise UserError(
                f"{self.directory}: made by tokenizer {self.header.tokenizer[:12]} ({self.header.vocab_size:,} tokens) "
                f"and not by this one, {tokenizer.fingerprint[:12]} ({len(tokenizer):,} tokens): prepare the data again"
            )

    def changed_at(self) -> float:
        """The latest modification time of its files, in seconds since the epoch."""
        return max(((self.directory / name).stat().st_mtime for name in self.header.file_sizes()), default=0.0)

    def verify(self) -> None:
        """Compare the checksums of all files. Raises `UserError` that names the first one that differs."""
        for shard in self.header.shards:
            if path := damaged_file(self.directory, shard):
                raise UserError(f"{path}: its checksum is wrong: changed or damaged; prepare the data again")

    def _read(self, kind: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"expected a range within {len(self)} tokens, found [{start}, {stop})")
        shard = bisect_right(self._starts, start) - 1
        if stop <= self._starts[min(shard + 1, len(self._starts) - 1)]:  # the common case
            return np.frombuffer(self._bytes(shard, kind, dtype.itemsize, start, stop), dtype)
        pieces = []
        while start < stop:
            until = min(stop, self._starts[shard + 1])
            pieces.append(self._bytes(shard, kind, dtype.itemsize, start, until))
            start, shard = until, shard + 1
        return np.frombuffer(b"".join(pieces), dtype)

    def _bytes(self, shard: int, kind: str, width: int, start: int, stop: int) -> bytes:
        """Bytes of tokens [start, stop) of one shard. Raises `UserError` if the file is missing or truncated."""
        if start == stop:
            return b""
        wanted, offset = (stop - start) * width, (start - self._starts[shard]) * width
        content = b""
        try:
            file = self._open(shard, kind)
            while len(content) < wanted:  # one call reads at most 2 GiB
                more = os.pread(file.descriptor, wanted - len(content), offset + len(content))
                if not more:
                    raise UserError(f"{file.path}: cut short since it was opened; prepare the data again")
                content = content + more if content else more
        except OSError as error:
            path = self.directory / f"{self.header.shards[shard].name}.{kind}"
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        return content


class _OpenFile:
    """An open file of a shard, closed when no longer referenced."""

    def __init__(self, directory: Path, shards: list[Shard], shard: int, kind: str) -> None:
        self.path = directory / f"{shards[shard].name}.{kind}"
        self.descriptor = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def damaged_file(directory: Path, shard: Shard) -> Path | None:
    """The first file of a shard whose checksum is wrong; None if there is none. Raises `OSError` for a missing one."""
    for kind, expected in shard.sha256.items():
        path = directory / f"{shard.name}.{kind}"
        if file_sha256(path) != expected:
            return path
    return None


def read_header(directory: Path) -> Header:
    """The header of `directory`. Raises `UserError` if there is none, or if it is not one of token shards."""
    path = directory / HEADER
    if not path.exists():
        raise UserError(f"{directory}: no token shards here ({HEADER} is missing); make them with `slm data prepare`")
    content = read_json_object(path, "prepare the data again")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: not the header of token shards")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: format version {content.get('version')!r}, this slmkit reads {VERSION}; prepare the data again"
        )
    try:
        return Header(**content | {"shards": [Shard(**shard) for shard in content["shards"]]})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged header: {error}; prepare the data again") from None
