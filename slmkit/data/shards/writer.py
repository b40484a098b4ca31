"""Atomic writer of token shards (format: see `reader.py`)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.shards.reader import HEADER, Header, Shard, TokenShards, read_header
from slmkit.files import sync, write_whole
from slmkit.tokenizer import SLMTokenizer


def write_shards(
    directory: str | Path,
    tokenizer: SLMTokenizer,
    parts: Iterable[tuple[Mapping[str, np.ndarray], int]],
    sources: Sequence[dict[str, Any]] = (),
) -> TokenShards:
    """Write a directory of shards, one for each of `parts`: its arrays as for `write_files`, and the text's UTF-8 size.

    The directory appears, or is replaced, when all is on disk: files are written to a temporary directory next to it,
    which is deleted after an error. Raises `UserError` if the disk is full or not writable, if `directory` holds
    anything but shards, and if there is no document.
    """
    directory = Path(directory).absolute()
    partial, shards, text_bytes = partial_folder(directory), list[Shard](), 0
    try:
        with disk_errors_named(directory):
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
            partial.mkdir(parents=True)
        for arrays, size in parts:
            with disk_errors_named(directory, f" after {sum(shard.tokens for shard in shards):,} tokens"):
                shards.append(write_files(partial, len(shards), arrays, tokenizer))
            text_bytes += size
        if not any(shard.documents for shard in shards):
            raise UserError(f"{directory}: there is no text to prepare")
        header = Header.of(tokenizer, shards, text_bytes=text_bytes, sources=list(sources), perfect_loss=None)
        with disk_errors_named(directory):
            complete(partial, directory, header)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenShards.open(directory)


def write_files(folder: Path, number: int, arrays: Mapping[str, np.ndarray], tokenizer: SLMTokenizer) -> Shard:
    """Write and fsync the files of a shard, one for each kind of array.

    `tokens` [n]; `ends` [documents]: one past the last token of each document that ends here; `trained` [n]: which
    tokens are learned; `labels` [documents]: which documents are good. Raises `ValueError` for a token outside the
    vocabulary.
    """
    ids, name, digests = arrays["tokens"], f"{number:05}", dict[str, str]()
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(tokenizer):
        raise ValueError(f"expected tokens below {len(tokenizer)}, found {ids.min()} to {ids.max()}")
    types: dict[str, Any] = {"tokens": dtype_of(tokenizer), "ends": "<i8", "trained": "u1", "labels": "u1"}
    for kind, values in arrays.items():
        content, path = values.astype(types[kind], copy=False).tobytes(), folder / f"{name}.{kind}"
        path.write_bytes(content)
        sync(path)
        digests[kind] = hashlib.sha256(content).hexdigest()
    return Shard(name, len(ids), len(arrays["ends"]), digests)


def dtype_of(tokenizer: SLMTokenizer) -> np.dtype:
    """The type of tokens on disk: 16 bits where the vocabulary allows it."""
    return np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")


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
