"""Cache of top-k teacher logits.

A directory holds `header.json`, written last; `positions`, a record for each learned position, row by row: the log of
the total probability of all but the top k tokens at the temperature (float32), the logits of the top k, less the
largest (float16), and their ids (uint16 if the vocabulary allows it, else int32); `starts`, the index of each row's
first record (int64, and one past the last); and the tokenizer. All is little-endian. Records are memory-mapped: a run
holds those of its batch.

It is written row by row. `progress.json` says how many rows are safely on disk, so that a writer that was killed can
continue.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.data.shards.reader import TokenShards
from slmkit.data.stream import Rows
from slmkit.files import write_whole

FORMAT, VERSION = "slmkit-teacher", 1
HEADER, PROGRESS, POSITIONS, STARTS = "header.json", "progress.json", "positions", "starts"
ROWS_BETWEEN_SYNCS = 256
LOGITS, IDS, REST = "teacher_logits", "teacher_ids", "teacher_rest"  # in `Batch.extra`


@dataclass(frozen=True)
class CacheHeader:
    """Everything that determines a cache's contents. Fingerprints are sha256 (hex)."""

    teacher: str
    tokenizer: str
    data: str
    reads: str  # text or conversations
    separate: bool  # attention stayed inside each document
    length: int  # of a row, in tokens
    rows: int
    tokens: int  # vocabulary size
    k: int
    temperature: float
    format: str = FORMAT
    version: int = VERSION

    @property
    def record(self) -> np.dtype:
        """The record of one position: logits and ids [k]."""
        ids = "<u2" if self.tokens <= 2**16 else "<i4"
        return np.dtype([("rest", "<f4"), ("logits", "<f2", (self.k,)), ("ids", ids, (self.k,))])

    def difference(self, wanted: CacheHeader) -> str | None:
        """The first field that differs from `wanted`, in words; None if all are equal."""
        for name, here in vars(self).items():
            there = getattr(wanted, name)
            if here != there:
                return f"{name} {here!s:.12}, not {there!s:.12}"
        return None


def data_fingerprint(shards: Iterable[TokenShards]) -> str:
    """sha256 (hex) of the tokens, documents and masks of several shards, in order."""
    files = [[shard.sha256 for shard in each.header.shards] for each in shards]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_cache(
    folder: Path,
    header: CacheHeader,
    rows: Mapping[str, Rows],
    starts: np.ndarray,
    records_of: Callable[[Batch], np.ndarray],
    rows_at_once: int,
    progress: Callable[[int, int, int], None],
) -> None:
    """Write the records of the rows of all sources in order, or those that an earlier writer left.

    `starts` int64 [rows + 1] counts the learned positions before each row; `records_of` gives the records [positions]
    of a batch's learned positions, row by row; `progress` gets rows, positions and bytes.

    Raises `UserError` if there is another cache, or the disk is full.
    """
    done = _rows_done(folder, header)
    places = [(source, index) for source in rows.values() for index in range(source.rows_in_epoch)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        starts.astype("<i8").tofile(folder / STARTS)
        with (folder / POSITIONS).open("ab") as file:
            file.truncate(int(starts[done]) * header.record.itemsize)
            for first in range(done, header.rows, rows_at_once):
                chosen = places[first : min(first + rows_at_once, header.rows)]
                ids, labels = (np.stack(column) for column in zip(*(source.row(index) for source, index in chosen)))
                documents = np.stack([source.documents(index) for source, index in chosen]) if header.separate else None
                file.write(records_of(Batch.of(ids, labels, documents)).tobytes())
                done = first + len(chosen)
                progress(done, int(starts[done]), file.tell())
                if done // ROWS_BETWEEN_SYNCS > first // ROWS_BETWEEN_SYNCS or done == header.rows:
                    _note_progress(folder, header, done, file)
        write_whole(folder / HEADER, json.dumps(dataclasses.asdict(header), indent=2) + "\n")
        (folder / PROGRESS).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}; the same command continues from there") from None


def read_header(folder: Path) -> CacheHeader:
    """The header of a finished cache. Raises `UserError` if it is missing, unfinished or damaged."""
    if not (folder / HEADER).is_file():
        stopped = (folder / PROGRESS).is_file()
        what = (
            "was not finished: the same `slm distill-cache` goes on" if stopped else "make it with `slm distill-cache`"
        )
        raise UserError(f"{folder}: no cache of teacher logits here; {what}")
    header = _read(folder / HEADER)
    try:
        expected = int(np.fromfile(folder / STARTS, dtype="<i8")[-1]) * header.record.itemsize
        found = (folder / POSITIONS).stat().st_size
    except (OSError, IndexError) as error:
        raise UserError(f"{folder}: damaged ({error}); delete it and make it again") from None
    if found != expected:
        raise UserError(f"{folder / POSITIONS}: {found:,} bytes instead of {expected:,}; delete it and make it again")
    return header


class CachedLogits:
    """The extra tensors of rows: cached teacher logits, of which entry j of `length` belongs to a row's j-th learned
    position; the rest is zero.
    """

    def __init__(self, folder: Path, header: CacheHeader, first: int) -> None:
        """`first`: the index of the first row in the cache."""
        self.first, self.length = first, header.length
        self.starts = np.memmap(folder / STARTS, dtype="<i8", mode="r")
        self.positions = np.memmap(folder / POSITIONS, dtype=header.record, mode="r")

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        """Logits float16 and ids int32 [length, k], and log-probability of all other tokens float32 [length]."""
        start, stop = self.starts[self.first + index : self.first + index + 2]
        records = np.zeros(self.length, self.positions.dtype)
        records[: stop - start] = self.positions[start:stop]
        return {LOGITS: records["logits"], IDS: records["ids"].astype(np.int32), REST: records["rest"]}


def with_cached_logits(rows: Mapping[str, Rows], folder: Path, header: CacheHeader) -> dict[str, Rows]:
    """The rows of all sources with their cached logits; sources in the order of the cache."""
    firsts = np.cumsum([0, *(source.rows_in_epoch for source in rows.values())]).tolist()
    taught = {name: copy.copy(source) for name, source in rows.items()}
    for first, source in zip(firsts, taught.values()):
        source.extra = CachedLogits(folder, header, first)  # type: ignore[method-assign]
    return taught


def learned_starts(rows: Iterable[Rows]) -> np.ndarray:
    """The number of learned positions before each row, and in all: int64 [rows + 1]."""
    counts = [
        np.count_nonzero(source.row(index)[1] != IGNORED) for source in rows for index in range(source.rows_in_epoch)
    ]
    return np.cumsum([0, *counts])


def _rows_done(folder: Path, header: CacheHeader) -> int:
    """How many rows an earlier writer finished. Raises `UserError` if there is another cache."""
    found = next((path for path in (folder / HEADER, folder / PROGRESS) if path.is_file()), None)
    if found is None:
        return 0
    difference = _read(found).difference(header)
    if difference is not None:
        raise UserError(f"{folder}: holds another cache ({difference}): choose another folder, or delete it")
    if found.name == HEADER:
        return header.rows
    return int(json.loads(found.read_text(encoding="utf-8"))["done"])


def _note_progress(folder: Path, header: CacheHeader, done: int, file: BinaryIO) -> None:
    """fsync the records, then write `progress.json`."""
    file.flush()
    os.fsync(file.fileno())
    write_whole(folder / PROGRESS, json.dumps(dataclasses.asdict(header) | {"done": done}) + "\n")


def _read(path: Path) -> CacheHeader:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        header = CacheHeader(**{name: value for name, value in content.items() if name != "done"})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete the directory and make it again") from None
    if (header.format, header.version) != (FORMAT, VERSION):
        raise UserError(f"{path}: format {header.format} {header.version}, this slmkit reads {FORMAT} {VERSION}")
    return header
