"""A folder of finished shards, each with a marker that identifies its content, so that preparation can continue.

When a preparation is killed, the next one makes the same pieces of work again, reuses every shard whose marker names
the same text and tokenizer, and makes only the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.shards.reader import FORMAT, HEADER, VERSION, Shard, damaged_file, read_header
from slmkit.data.shards.writer import disk_errors_named, dtype_of, partial_folder, write_files
from slmkit.files import write_whole

if TYPE_CHECKING:
    from slmkit.tokenizer import SLMTokenizer

REQUEST = "asked.json"


@dataclass(frozen=True)
class Finished:
    """A shard on disk. `origin`: a hash of everything that determines its content."""

    shard: Shard
    text_bytes: int
    origin: str


class ShardFolder:
    """Writes shards in any order, from any thread or process. Raises `UserError` if the disk is full."""

    def __init__(self, folder: Path, tokenizer: SLMTokenizer) -> None:
        self.folder, self.tokenizer, self.dtype = folder, tokenizer, dtype_of(tokenizer)
        self.maker = f"{FORMAT} {VERSION} {tokenizer.fingerprint} {self.dtype.name}"
        with disk_errors_named(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def has(self, number: int) -> bool:
        """Whether there is a shard of this number, of any content."""
        return self._marker(number).is_file()

    def drop_unfinished(self) -> bool:
        """Delete unfinished shards, and the folder if it is empty then. Returns whether anything is left."""
        if not self.folder.is_dir():
            return False
        for path in self.folder.iterdir():
            if path.is_file() and not path.with_suffix(".json").is_file():
                path.unlink()
        if any(path.name != REQUEST for path in self.folder.iterdir()):
            return True
        shutil.rmtree(self.folder)
        return False

    def find(self, number: int, content: str) -> Finished | None:
        """The shard of this number if it has this `content` and tokenizer and its checksums match, else None."""
        try:
            marker = json.loads(self._marker(number).read_text())
            finished = Finished(Shard(**marker.pop("shard")), **marker)
            is_usable = finished.origin == self._origin(content) and not damaged_file(self.folder, finished.shard)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return finished if is_usable else None

    def write(self, number: int, content: str, ids: np.ndarray, ends: np.ndarray, text_bytes: int) -> Finished:
        """Write a shard: tokens [n], and one past each document's last token [documents]. The marker is written last.

        Raises `ValueError` for a token outside the vocabulary, `UserError` if the disk is full.
        """
        with disk_errors_named(self.folder):
            self._marker(number).unlink(missing_ok=True)
            shard = write_files(self.folder, number, {"tokens": ids, "ends": ends}, self.tokenizer)
            finished = Finished(shard, text_bytes, self._origin(content))
            write_whole(self._marker(number), json.dumps(dataclasses.asdict(finished)))
        return finished

    def read(self, finished: Finished, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents [first, stop) of a shard: tokens, uint16 or uint32 [n], and their ends, int64 [documents]."""
        path = self.folder / finished.shard.name
        before = min(first, 1)  # a document begins at the end of the one before
        ends = np.fromfile(f"{path}.ends", "<i8", count=stop - first + before, offset=8 * (first - before))
        begin = int(ends[0]) if before else 0
        size = int(ends[-1]) - begin if stop > first else 0
        tokens = np.fromfile(f"{path}.tokens", self.dtype, count=size, offset=begin * self.dtype.itemsize)
        return tokens, ends[before:] - begin

    def _origin(self, content: str) -> str:
        return hashlib.sha256(f"{self.maker} {content}".encode()).hexdigest()

    def _marker(self, number: int) -> Path:
        return self.folder / f"{number:05}.json"


def claim(directory: str | Path, request: Mapping[str, Any]) -> None:
    """Record what the shards of `directory` are made of, before the first of them is finished.

    Raises `UserError` if there are shards already, or finished ones of something else: none is ever replaced.
    """
    directory = Path(directory).absolute()
    if (directory / HEADER).is_file():
        of = ", ".join(str(source.get("path")) for source in read_header(directory).sources[:3])
        raise UserError(f"{directory}: holds finished shards of {of}: choose another directory, or delete it first")
    note = partial_folder(directory) / REQUEST
    text = json.dumps(request, indent=2, sort_keys=True) + "\n"
    if note.is_file() and note.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{note.parent}: holds the finished shards of another command (see {REQUEST} there): repeat that "
            "command to continue it, or delete the folder"
        )
    with disk_errors_named(directory):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(text, encoding="utf-8")


def content_of(digests: Sequence[str]) -> str:
    """One digest of several, in order."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
