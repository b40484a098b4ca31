"""Finished shards in a folder, each whole on disk with a marker that says what it was made of.

A preparation that is killed leaves such a folder behind. The next one makes the same pieces of work again, takes every
shard whose marker names the same text and tokenizer, and only makes the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.shards.reader import FORMAT, HEADER, VERSION, Header, Shard, Vocabulary, read_header
from slmkit.data.shards.writer import OpenShard, disk_error, may_be_replaced, put_in_place, sync, sync_directory

ASKED = "asked.json"


@dataclass(frozen=True)
class Finished:
    """A shard on disk. `origin` tells whether it can be used again: a hash of all that it depends on."""

    shard: Shard
    text_bytes: int
    origin: str


class ShardFolder:
    """Writes shards in any order, from any thread or process. Raises `UserError` where the disk is full."""

    def __init__(self, folder: Path, tokenizer: Vocabulary) -> None:
        self.folder = folder
        self.vocab_size, self.dtype = len(tokenizer), np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
        self.fingerprint = tokenizer.fingerprint  # which takes a while: asked once
        self.maker = f"{FORMAT} {VERSION} {self.fingerprint} {self.dtype.name}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from None

    def has(self, number: int) -> bool:
        """Whether there is a shard of this number, of whatever text."""
        return self._marker(number).is_file()

    def drop_unfinished(self) -> bool:
        """Remove what is not whole; the folder too where nothing is. Returns whether anything is left."""
        for path in self.folder.iterdir():
            if path.is_file() and not path.with_suffix(".json").is_file():
                path.unlink()
        if any(path.name != ASKED for path in self.folder.iterdir()):
            return True
        shutil.rmtree(self.folder)
        return False

    def find(self, number: int, content: str) -> Finished | None:
        """The shard of this number if it was made of `content` by the same tokenizer, and is as it was written."""
        try:
            marker = json.loads(self._marker(number).read_text())
            finished = Finished(Shard(**marker.pop("shard")), **marker)
            if finished.origin != self._origin(content):
                return None
            for kind, expected in finished.shard.sha256.items():
                with (self.folder / f"{finished.shard.name}.{kind}").open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return finished

    def write(self, number: int, content: str, ids: np.ndarray, ends: np.ndarray, text_bytes: int) -> Finished:
        """All tokens [n] of a shard and one past each document's last [documents]. The marker is written last."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"expected tokens below {self.vocab_size}, found {ids.min()} to {ids.max()}")
        try:
            self._marker(number).unlink(missing_ok=True)
            file = OpenShard(self.folder, f"{number:05}", masked=False)
            try:
                file.write(ids.astype(self.dtype, copy=False), ends, None)
                finished = Finished(file.finish(), text_bytes, self._origin(content))
            finally:
                file.close()
            unfinished = self._marker(number).with_suffix(".unfinished")
            with unfinished.open("w") as marker:
                json.dump(dataclasses.asdict(finished), marker)
                sync(marker)
            unfinished.replace(self._marker(number))
        except OSError as error:
            raise disk_error(error, self.folder) from None
        return finished

    def read(self, finished: Finished, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents [first, stop) of a shard: tokens, uint16 or uint32 [n], and one past each one's last, int64."""
        path = self.folder / finished.shard.name
        before = min(first, 1)  # the end of the document in front is where the first begins
        ends = np.fromfile(f"{path}.ends", "<i8", count=stop - first + before, offset=8 * (first - before))
        begin = int(ends[0]) if before else 0
        size = int(ends[-1]) - begin if stop > first else 0
        tokens = np.fromfile(f"{path}.tokens", self.dtype, count=size, offset=begin * self.dtype.itemsize)
        return tokens, ends[before:] - begin

    def _origin(self, content: str) -> str:
        return hashlib.sha256(f"{self.maker} {content}".encode()).hexdigest()

    def _marker(self, number: int) -> Path:
        return self.folder / f"{number:05}.json"


def claim(directory: str | Path, asked: Mapping[str, Any]) -> None:
    """Note what shards of `directory` are to be made of, where those are made that are finished before the whole is.

    Raises `UserError` where shards are there already, or finished ones of something else: none is ever replaced.
    """
    directory = Path(directory).absolute()
    if (directory / HEADER).is_file():
        of = ", ".join(str(source.get("path")) for source in read_header(directory).sources[:3])
        raise UserError(f"{directory}: holds finished shards of {of}: choose another directory, or delete it first")
    note = partial_folder(directory) / ASKED
    text = json.dumps(asked, indent=2, sort_keys=True) + "\n"
    if note.is_file() and note.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{note.parent}: holds the finished shards of another command (see {ASKED} there): repeat that "
            "command to continue it, or delete the folder"
        )
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(error, directory) from None


def partial_folder(directory: Path) -> Path:
    """Where the shards of `directory` are made. Raises `UserError` where it holds something else than shards."""
    if directory.exists() and not may_be_replaced(directory):
        raise UserError(f"{directory}: holds files that are not token shards; choose another directory")
    return directory.with_name(f".partial-{directory.name}")


def complete(partial: Path, directory: Path, header: Header) -> None:
    """Write the header, remove what it does not name, and put everything in its place."""
    try:
        with (partial / HEADER).open("w", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(header), indent=2) + "\n")
            sync(file)
        kept = header.file_sizes().keys() | {HEADER}
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in kept:
                path.unlink()
        sync_directory(partial)
        put_in_place(partial, directory)
    except OSError as error:
        raise disk_error(error, directory) from None


def content_of(digests: Sequence[str]) -> str:
    """One digest of many, in their order."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
