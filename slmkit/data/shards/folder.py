"""The work of preparing a corpus, and the folder of finished shards, from which a killed preparation goes on.

The corpus is split into shards by the documents alone, then encoded and written. So the shards are the same in any
order of work, in threads of one process or on the machines of a cluster. Each shard has a marker that identifies its
content: the next preparation makes the same pieces of work again, reuses every shard whose marker names the same text
and tokenizer, and makes only the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.order import random_keys
from slmkit.data.shards.reader import FORMAT, HEADER, VERSION, Shard, damaged_file, read_header
from slmkit.data.shards.writer import disk_errors_named, dtype_of, partial_folder, write_files
from slmkit.data.sources import Document
from slmkit.files import write_whole
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
    """Record what the shards of `directory` are made of (JSON and settings), before the first of them is finished.

    Raises `UserError` if there are shards already, or finished ones of something else: none is ever replaced.
    """
    directory = Path(directory).absolute()
    if (directory / HEADER).is_file():
        of = ", ".join(str(source.get("path")) for source in read_header(directory).sources[:3])
        raise UserError(f"{directory}: holds finished shards of {of}: choose another directory, or delete it first")
    note = partial_folder(directory) / REQUEST
    text = json.dumps(request, indent=2, sort_keys=True, default=lambda one: one.model_dump(mode="json")) + "\n"
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


# -- the work ----------------------------------------------------------------------------------------------------------

SHARD_CHARACTERS = 1 << 26  # of text in a shard, unless a document is longer: about 30 MB of 16-bit tokens
BATCH_CHARACTERS = 1 << 20  # encoded by a thread at once


@dataclass(frozen=True)
class ShardWork:
    """Some of the documents of a shard; a shard that is finished already has none."""

    shard: int
    documents: list[Document]
    finished: Finished | None = None


@dataclass(frozen=True)
class Encoded:
    """Tokens [n], one past the last token of each document that ends here [documents], and a digest of the text."""

    ids: np.ndarray
    ends: np.ndarray
    text_bytes: int
    digest: str


def cut(documents: Iterable[Document], shard_characters: int, batch_characters: int) -> Iterator[ShardWork]:
    """Split documents into shards of at least `shard_characters` (the last may have fewer), and these into batches.

    A shard has whole documents.
    """
    shard, in_shard, batch, in_batch = 0, 0, list[Document](), 0
    for document in documents:
        batch.append(document)
        in_batch += len(document.text) + 1
        in_shard += len(document.text) + 1
        shard_is_full = document.ends and in_shard >= shard_characters
        if shard_is_full or in_batch >= batch_characters:
            yield ShardWork(shard, batch)
            batch, in_batch = [], 0
        if shard_is_full:
            shard, in_shard = shard + 1, 0
    if batch:
        yield ShardWork(shard, batch)


def without_finished(works: Iterable[ShardWork], folder: ShardFolder) -> Iterator[ShardWork]:
    """The works, with shards that `folder` already has, made of the same text, replaced by the finished ones."""
    for number, group in itertools.groupby(works, lambda work: work.shard):
        if not folder.has(number):
            yield from group
            continue
        batches = list(group)
        finished = folder.find(number, content_of([digest(work.documents) for work in batches]))
        yield from [ShardWork(number, [], finished)] if finished else batches


def digest(documents: Sequence[Document]) -> str:
    """Hash of the texts and of where documents end."""
    hashed = hashlib.sha256(np.array([2 * len(each.text) + each.ends for each in documents], dtype="<i8").tobytes())
    hashed.update(_bytes_of(documents))
    return hashed.hexdigest()


def _bytes_of(documents: Sequence[Document]) -> bytes:
    return "".join(document.text for document in documents).encode("utf-8", "surrogatepass")


def encode(tokenizer: SLMTokenizer, documents: Sequence[Document]) -> Encoded:
    """Tokens of documents, with an end-of-text token after each, encoded in the calling thread."""
    encoded = document_ids(tokenizer, documents, threads=1)
    stops = np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)))
    stops = stops[np.fromiter((document.ends for document in documents), dtype=bool, count=len(documents))]
    ids = np.insert(np.concatenate(encoded), stops, tokenizer.eos_token_id)
    return Encoded(ids, stops + np.arange(1, len(stops) + 1), len(_bytes_of(documents)), digest(documents))


def document_ids(tokenizer: Any, documents: Sequence[Document], threads: int | None = None) -> list[np.ndarray]:
    """Tokens, uint32 [tokens], of each document or piece, without end-of-text tokens.

    Raises `UserError` if the tokenizer loses more than 0.1 % of the text.
    """
    encoded = list(tokenizer.encode_batch([document.text for document in documents], threads=threads))
    if getattr(tokenizer, "depends_on_context", False):
        tokenizer.check_losses()
        for number, document in enumerate(documents):
            if not document.begins:
                encoded[number] = np.array(tokenizer.encode_continuation(document.text), dtype=np.uint32)
    if beginning := beginning_of(tokenizer):
        start = np.array(beginning, dtype=np.uint32)
        encoded = [np.concatenate([start, ids]) if doc.begins else ids for ids, doc in zip(encoded, documents)]
    return encoded


def beginning_of(tokenizer: Any) -> list[int]:
    """The tokenizer's own beginning of a text [tokens]; empty if it is the end-of-text token, already there."""
    beginning = getattr(tokenizer, "beginning", [])
    return [] if beginning == [getattr(tokenizer, "eos_token_id", None)] else beginning


def write_shard(folder: ShardFolder, number: int, parts: Sequence[Encoded], shuffle_seed: int | None) -> Finished:
    """Write the batches of a shard; with a seed, its documents sorted by key (see `shuffle`)."""
    ids, ends = joined([(part.ids, part.ends) for part in parts])
    if shuffle_seed is not None:
        ids, ends = reordered(ids, ends, np.argsort(random_keys(len(ends), shuffle_seed, number)))
    content = content_of([part.digest for part in parts])
    return folder.write(number, content, ids, ends, sum(part.text_bytes for part in parts))


def shuffle(
    ordered: ShardFolder, parts: Sequence[Finished], target: ShardFolder, seed: int
) -> Callable[[int], Finished]:
    """A function that writes the shard of a number to `target`, unless it is there already; it is thread-safe.

    It shuffles all documents of a corpus in the memory of a few shards. Every document has a random key, determined by
    the seed and its position. Each shard in `ordered` has its documents sorted by key, so that documents with keys of
    one interval are contiguous in every shard. There are as many intervals as shards; the documents of one interval,
    shuffled, are a shard of the result. All orders are equally likely.
    """
    count = len(parts)
    every_part = content_of([digest for part in parts for digest in part.shard.sha256.values()])
    limits = np.array([(number << 64) // count for number in range(count)], dtype=np.uint64)
    bounds = []  # for each part: index of its first document in each interval, int64 [intervals + 1]
    for number, part in enumerate(parts):
        keys = np.sort(random_keys(part.shard.documents, seed, number))
        bounds.append(np.append(np.searchsorted(keys, limits), len(keys)))

    def shard(number: int) -> Finished:
        content = f"shuffled {seed} {every_part} {number}"
        if finished := target.find(number, content):
            return finished
        ids, ends = joined(
            [ordered.read(part, int(own[number]), int(own[number + 1])) for part, own in zip(parts, bounds)]
        )
        order = np.argsort(random_keys(len(ends), seed, number, count))
        return target.write(number, content, *reordered(ids, ends, order), text_bytes=0)

    return shard


def joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate parts of tokens [n] and document ends [documents]."""
    starts = np.cumsum([0] + [len(ids) for ids, _ in parts[:-1]])
    return (
        np.concatenate([ids for ids, _ in parts]),
        np.concatenate([ends + start for start, (_, ends) in zip(starts, parts)]),
    )


def reordered(ids: np.ndarray, ends: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] and document ends [documents] with the documents in the given order [documents]."""
    starts = np.concatenate([[0], ends[:-1]])
    if not len(order):
        return ids, ends
    documents = [ids[start:end] for start, end in zip(starts[order].tolist(), ends[order].tolist())]
    return np.concatenate(documents), np.cumsum((ends - starts)[order])
