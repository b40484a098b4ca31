"""Atomic writer of token shards (format: see `reader.py`)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from slmkit.config import UserError
from slmkit.data.shards.reader import HEADER, Header, Shard, read_header
from slmkit.files import sync, write_whole

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

SHARD_TOKENS = 1 << 28  # a shard of 16-bit tokens is 512 MiB


class ShardWriter:
    """Context manager that writes a directory of shards; the directory appears, or is replaced, when all is on disk.

    Files are written to a temporary directory next to it. After an error these are deleted, and the existing directory
    is unchanged. Raises `UserError` if the disk is full or not writable, if `directory` holds anything but shards, and
    if nothing was written.
    """

    def __init__(
        self,
        directory: str | Path,
        tokenizer: SLMTokenizer,
        *,
        sources: Sequence[dict[str, Any]] = (),
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.tokenizer, self.sources, self.shard_tokens = tokenizer, list(sources), shard_tokens
        self.dtype = dtype_of(tokenizer)
        self.tokens = self.text_bytes = 0
        self.shards: list[Shard] = []
        self._open: OpenShard | None = None

    def __enter__(self) -> ShardWriter:
        self.partial = partial_folder(self.directory)
        with disk_errors_named(self.directory):
            shutil.rmtree(self.partial, ignore_errors=True)  # left by a killed process
            self.partial.mkdir(parents=True)
        return self

    def add(
        self,
        ids: np.ndarray,
        ends: np.ndarray,
        trained: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        *,
        text_bytes: int,
    ) -> None:
        """Append tokens [n] of any number of documents.

        `ends` [documents]: one past the last token of each document that ends here, counted from `ids[0]`; the last one
        may continue in the next call. `trained` [n]: which tokens are learned; `labels` [documents]: which of the
        documents that end here are good; each in all calls or in none. `text_bytes`: UTF-8 size of the text. Raises
        `ValueError` for a token outside the vocabulary.
        """
        check_range(ids, self.tokenizer)
        with disk_errors_named(self.directory, f" after {self.tokens:,} tokens"):
            start = 0
            while start < len(ids):
                if self._open is None:
                    self._open = OpenShard(self.partial, f"{len(self.shards):05}")
                stop = min(len(ids), start + self.shard_tokens - self._open.tokens)
                here = (ends > start) & (ends <= stop)
                arrays = {
                    "tokens": ids[start:stop].astype(self.dtype),
                    "ends": (self._open.tokens - start + ends[here]).astype("<i8"),
                }
                if trained is not None:
                    arrays["trained"] = trained[start:stop].astype(np.uint8)
                if labels is not None:
                    arrays["labels"] = labels[here].astype(np.uint8)
                self._open.write(arrays)
                start = stop
                if self._open.tokens == self.shard_tokens:
                    self._finish_shard()
        self.tokens += len(ids)
        self.text_bytes += text_bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with disk_errors_named(self.directory, f" after {self.tokens:,} tokens"):
                    self._complete()
        finally:
            if self._open:
                self._open.close()
            shutil.rmtree(self.partial, ignore_errors=True)

    def _finish_shard(self) -> None:
        if self._open:
            self.shards.append(self._open.finish())
            self._open = None

    def _complete(self) -> None:
        self._finish_shard()
        if not any(shard.documents for shard in self.shards):
            raise UserError(f"{self.directory}: there is no text to prepare")
        header = Header.of(
            self.tokenizer,
            self.shards,
            text_bytes=self.text_bytes,
            sources=self.sources,
            perfect_loss=None,
        )
        complete(self.partial, self.directory, header)


class OpenShard:
    """The open files of the shard being written, and their hashes."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path, self.tokens, self.documents = directory / name, 0, 0
        self.files: dict[str, BinaryIO] = {}
        self.hashes: dict[str, Any] = {}

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Append to the file of each kind: `tokens` and `trained` [n], `ends` and `labels` [documents]."""
        for kind, values in arrays.items():
            if kind not in self.files:
                self.files[kind] = self.path.with_suffix(f".{kind}").open("wb")
                self.hashes[kind] = hashlib.sha256()
            content = values.tobytes()
            self.hashes[kind].update(content)
            self.files[kind].write(content)
        self.tokens += len(arrays["tokens"])
        self.documents += len(arrays["ends"])

    def finish(self) -> Shard:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        digests = {kind: digest.hexdigest() for kind, digest in self.hashes.items()}
        return Shard(self.path.name, self.tokens, self.documents, digests)

    def close(self) -> None:
        """Close the files, which are about to be deleted, ignoring errors."""
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


def dtype_of(tokenizer: SLMTokenizer) -> np.dtype:
    """The type of tokens on disk: 16 bits where the vocabulary allows it."""
    return np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")


def check_range(ids: np.ndarray, tokenizer: SLMTokenizer) -> None:
    """Raises `ValueError` for a token [n] outside the vocabulary."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(tokenizer):
        raise ValueError(f"expected tokens below {len(tokenizer)}, found {ids.min()} to {ids.max()}")


@contextlib.contextmanager
def disk_errors_named(directory: Path, after: str = "") -> Iterator[None]:
    """Context that turns errors of writing to `directory` into a one-line `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            found = f"{directory}: no space left{after}: {error.strerror}; free some or use another disk"
            raise UserError(found) from None
        raise UserError(f"{directory}: cannot be written: {error.strerror or error}") from None


def partial_folder(directory: Path) -> Path:
    """The folder for unfinished work on `directory`. Raises `UserError` if that holds anything but shards."""
    is_folder = directory.is_dir()
    try:
        if is_folder and any(directory.iterdir()):
            read_header(directory)
    except UserError:
        is_folder = False
    if directory.exists() and not is_folder:
        raise UserError(f"{directory}: holds files that are not token shards; choose another directory")
    return directory.with_name(f".partial-{directory.name}")


def complete(partial: Path, directory: Path, header: Header) -> None:
    """Write the header, delete all that is not of it, and rename `partial` to `directory`.

    An existing `directory` is moved away first, and back if that fails.
    """
    write_whole(partial / HEADER, json.dumps(dataclasses.asdict(header), indent=2) + "\n")
    kept = header.file_sizes().keys() | {HEADER}
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()
    sync(partial)
    previous = directory.with_name(f".previous-{directory.name}")
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        os.replace(directory, previous)
    try:
        os.replace(partial, directory)
    except OSError:
        if previous.exists():
            os.replace(previous, directory)
        raise
    sync(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)
