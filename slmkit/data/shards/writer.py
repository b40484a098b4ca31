"""Atomic writer of token shards (format: see `reader.py`)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.shards.reader import HEADER, Header, Shard, Vocabulary, read_header
from slmkit.files import sync as sync_path

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
        tokenizer: Vocabulary,
        *,
        masked: bool = False,
        judged: bool = False,
        sources: Sequence[dict[str, Any]] = (),
        perfect_loss: float | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.partial = self.directory.with_name(f".partial-{self.directory.name}")
        self.tokenizer, self.sources, self.perfect_loss = tokenizer, list(sources), perfect_loss
        self.masked, self.judged = masked, judged
        self.dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
        self.shard_tokens = shard_tokens
        self.tokens = self.documents = self.text_bytes = 0
        self.shards: list[Shard] = []
        self._open: OpenShard | None = None

    def __enter__(self) -> ShardWriter:
        if self.directory.exists() and not may_be_replaced(self.directory):
            raise UserError(f"{self.directory}: holds files that are not token shards; choose another directory")
        try:
            shutil.rmtree(self.partial, ignore_errors=True)  # left by a killed process
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise self._user_error(error) from None
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
        may continue in the next call. `trained` [n]: which tokens are learned, for masked shards. `labels` [documents]:
        which of the documents that end here are good, for judged ones. `text_bytes`: UTF-8 size of the text. Raises
        `ValueError` for a token outside the vocabulary.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.tokenizer):
            raise ValueError(f"expected tokens below {len(self.tokenizer)}, found {ids.min()} to {ids.max()}")
        if self.masked != (trained is not None) or (trained is not None and len(trained) != len(ids)):
            raise ValueError("expected `trained`, as long as `ids`, for masked shards and for no others")
        if self.judged != (labels is not None) or (labels is not None and len(labels) != len(ends)):
            raise ValueError("expected `labels`, as long as `ends`, for judged shards and for no others")
        try:
            start = 0
            while start < len(ids):
                if self._open is None:
                    self._open = OpenShard(self.partial, f"{len(self.shards):05}", self.masked, self.judged)
                stop = min(len(ids), start + self.shard_tokens - self._open.tokens)
                here = (ends > start) & (ends <= stop)
                self._open.write(
                    ids[start:stop].astype(self.dtype),
                    self._open.tokens - start + ends[here],
                    None if trained is None else trained[start:stop],
                    None if labels is None else labels[here],
                )
                start = stop
                if self._open.tokens == self.shard_tokens:
                    self.shards.append(self._open.finish())
                    self._open = None
        except OSError as error:
            raise self._user_error(error) from None
        self.tokens += len(ids)
        self.documents += len(ends)
        self.text_bytes += text_bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._complete()
        except OSError as failure:
            raise self._user_error(failure) from None
        finally:
            if self._open:
                self._open.close()
            shutil.rmtree(self.partial, ignore_errors=True)

    def _complete(self) -> None:
        if not self.documents:
            raise UserError(f"{self.directory}: there is no text to prepare")
        if self._open:
            self.shards.append(self._open.finish())
        header = Header(
            dtype=self.dtype.name,
            tokenizer=self.tokenizer.fingerprint,
            vocab_size=len(self.tokenizer),
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            sources=self.sources,
            masked=self.masked,
            judged=self.judged,
            perfect_loss=self.perfect_loss,
            shards=self.shards,
        )
        with (self.partial / HEADER).open("wb") as file:
            file.write(json.dumps(dataclasses.asdict(header), indent=2).encode() + b"\n")
            sync(file)
        sync_path(self.partial)
        put_in_place(self.partial, self.directory)

    def _user_error(self, error: OSError) -> UserError:
        return disk_error(error, self.directory, f" after {self.tokens:,} tokens")


class OpenShard:
    """The open files of the shard being written, and their hashes."""

    def __init__(self, directory: Path, name: str, masked: bool, judged: bool = False) -> None:
        kinds = ("tokens", "ends", *["trained"] * masked, *["labels"] * judged)
        self.name, self.tokens, self.documents = name, 0, 0
        self.hashes = {kind: hashlib.sha256() for kind in kinds}
        self.files = {kind: (directory / f"{name}.{kind}").open("wb") for kind in kinds}

    def write(
        self, ids: np.ndarray, ends: np.ndarray, trained: np.ndarray | None, labels: np.ndarray | None = None
    ) -> None:
        self._write("tokens", ids)
        self._write("ends", ends.astype("<i8"))
        if trained is not None:
            self._write("trained", trained.astype(np.uint8))
        if labels is not None:
            self._write("labels", labels.astype(np.uint8))
        self.tokens += len(ids)
        self.documents += len(ends)

    def finish(self) -> Shard:
        for file in self.files.values():
            sync(file)
            file.close()
        digests = {kind: digest.hexdigest() for kind, digest in self.hashes.items()}
        return Shard(self.name, self.tokens, self.documents, digests)

    def close(self) -> None:
        """Close the files, which are about to be deleted, ignoring errors."""
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()

    def _write(self, kind: str, values: np.ndarray) -> None:
        content = values.tobytes()
        self.hashes[kind].update(content)
        self.files[kind].write(content)


def disk_error(error: OSError, directory: Path, after: str = "") -> UserError:
    """The `UserError` for a disk error, in one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{directory}: no space left{after}: {error.strerror}; free some or use another disk")
    return UserError(f"{directory}: cannot be written: {error.strerror or error}")


def may_be_replaced(directory: Path) -> bool:
    """Whether it is an empty directory or one of token shards, which may be deleted."""
    if not directory.is_dir():
        return False
    if not any(directory.iterdir()):
        return True
    try:
        read_header(directory)
    except UserError:
        return False
    return True


def put_in_place(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`; an existing `final` is moved away first, and back if that fails."""
    previous = final.with_name(f".previous-{final.name}")
    shutil.rmtree(previous, ignore_errors=True)
    if final.exists():
        os.replace(final, previous)
    try:
        os.replace(partial, final)
    except OSError:
        if previous.exists():
            os.replace(previous, final)
        raise
    sync_path(final.parent)
    shutil.rmtree(previous, ignore_errors=True)


def sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
