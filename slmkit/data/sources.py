"""Where text comes from: local files and folders, read as a stream, every mistake named by file and place.

`.txt`, `.jsonl` (or `.json`: one object a line) and `.csv`, plain or as `.gz` or `.zst`, and `.parquet`. A `.txt` file
is one long text, or documents separated by lines that hold `<|endoftext|>`, as in TinyStories' own files.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast

from slmkit.config import UserError

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
CONVERSATION_KINDS = (".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")
SEPARATOR = "<|endoftext|>"
SURROGATE_ESCAPE, SURROGATE = re.compile(r"\\u[dD]"), re.compile("[\ud800-\udfff]")

# Longer texts are read, and tokenized, in pieces of this many characters: bounded memory, and work for every core.
PIECE = 1 << 16

Paths: TypeAlias = str | Path | Iterable[str | Path]
Message: TypeAlias = dict[str, Any]


class Document(NamedTuple):
    """A text, or a piece of a long one: then `ends` is False in all but its last piece."""

    text: str
    ends: bool = True


def read_documents(paths: Paths, text_column: str = "text") -> Iterator[Document]:
    """Every document in files and folders (sorted, with their subfolders), in order. Blank ones are left out.

    Texts longer than `PIECE` characters come in pieces, cut at line ends where there are some. Raises `UserError` for
    whatever cannot be read as text, as it is reached, and when there is no document at all.
    """
    files = find_files(paths)
    return _at_least_one((document for path in files for document in _documents_in(path, text_column)), files)


def read_conversations(paths: Paths, messages_column: str = "messages") -> Iterator[list[Message]]:
    """Every conversation in JSON lines and parquet files and folders of them: lists of messages, as given.

    Raises `UserError` as `read_documents` does, and for a row that is not a list of objects.
    """
    files = find_files(paths, CONVERSATION_KINDS)
    return _at_least_one((messages for path in files for messages in _conversations_in(path, messages_column)), files)


def find_files(paths: Paths, kinds: Sequence[str] = KINDS) -> list[Path]:
    """The files meant by paths of files and folders: folders are searched, sorted, for the kinds known here.

    Raises `UserError` for a missing or empty file, one of another kind, and a folder without any of these kinds.
    """
    files = []
    for path in [Path(paths)] if isinstance(paths, str | Path) else map(Path, paths):
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and _kind(file) in kinds]
            if not inside:
                raise UserError(f"{path}: no {_listed(kinds)} file in this folder")
            files += inside
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif _kind(path) not in kinds:
            raise UserError(f"{path}: expected {_listed(kinds)} (all but .parquet also as .gz or .zst)")
        else:
            files.append(path)
    if not files:
        raise UserError("no files to read: the list of paths is empty")
    for path in files:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
    return files


def describe_sources(paths: Paths) -> list[dict[str, Any]]:
    """Path, size in bytes and sha256 of every file, for whoever wants to know later what something was made of."""
    described = []
    for path in find_files(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described.append({"path": str(path), "bytes": path.stat().st_size, "sha256": digest})
    return described


def cut_point(text: str, limit: int) -> int:
    """The best place at or before `limit` to cut `text`, which is longer than `limit`.

    After a line end that has text on both sides, since a byte-level tokenizer then gives the same tokens as without the
    cut; else after any line end, else before a space, else at `limit`.
    """
    last_end = text.rfind("\n", 0, limit)
    line_end = last_end
    while line_end > limit // 2:
        if not (text[line_end - 1].isspace() or text[line_end + 1].isspace()):
            return line_end + 1
        line_end = text.rfind("\n", 0, line_end)
    if last_end >= 0:
        return last_end + 1
    space = text.rfind(" ", 1, limit)
    return space if space > 0 else limit


def _kind(path: Path) -> str:
    """The extension that says what is inside: `.jsonl` of `a.jsonl.gz`; empty for hidden files."""
    name = path.name.lower()
    if name.startswith("."):
        return ""
    inner = Path(name)
    if inner.suffix in COMPRESSIONS:
        inner = inner.with_suffix("")
        return "" if inner.suffix == ".parquet" else inner.suffix
    return inner.suffix


def _listed(kinds: Sequence[str]) -> str:
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def _at_least_one(items: Iterator[Any], files: list[Path]) -> Iterator[Any]:
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        more = f" (and {len(files) - 1} more files)" if len(files) > 1 else ""
        raise UserError(f"{files[0]}{more}: not one document in it: only blank lines or no rows")


def _documents_in(path: Path, column: str) -> Iterator[Document]:
    if _kind(path) == ".txt":
        yield from _text_file(path)
        return
    for place, value in ROWS[_kind(path)](path, column):
        if not isinstance(value, str):
            raise UserError(f"{place}: expected text in column {column!r}, found {type(value).__name__}")
        if value.strip():
            yield from _pieces(value)


def _conversations_in(path: Path, column: str) -> Iterator[list[Message]]:
    for place, value in ROWS[_kind(path)](path, column):
        if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
            found = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
            raise UserError(
                f'{place}: expected in column {column!r} a list of messages such as {{"role": …, "content": …}}, '
                f"found {found}"
            )
        yield value


def _pieces(text: str) -> Iterator[Document]:
    while len(text) > PIECE:
        cut = cut_point(text, PIECE)
        yield Document(text[:cut], ends=False)
        text = text[cut:]
    yield Document(text)


def _text_file(path: Path) -> Iterator[Document]:
    """Documents between separator lines; without any, the whole file is one. Windows line ends become `\\n`."""
    lines: list[str] = []
    size, continues = 0, False
    for line in _lines(path, longest=PIECE):
        line = line.replace("\r\n", "\n")
        if line.strip() == SEPARATOR:
            text = "".join(lines).removesuffix("\n")  # that line end belongs to the separator
            if continues or text.strip():
                yield Document(text)
            lines, size, continues = [], 0, False
            continue
        lines.append(line)
        size += len(line)
        if size > PIECE:
            text = "".join(lines)
            cut = cut_point(text, PIECE)
            yield Document(text[:cut], ends=False)
            lines, size, continues = [text[cut:]], size - cut, True
    text = "".join(lines)
    if continues or text.strip():
        yield Document(text)


def _json_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: expected one JSON object a line, found {_short(line)}: {error}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected one JSON object a line, found {_short(line)}")
        if column not in row:
            raise UserError(f"{path}:{number}: {_no_column(column, row)}")
        # JSON can spell half of a surrogate pair, which is no text and which no tokenizer takes.
        if SURROGATE_ESCAPE.search(line) and SURROGATE.search(json.dumps(row, ensure_ascii=False)):
            raise UserError(f"{path}:{number}: half a surrogate pair (such as \\ud83d alone) is not text")
        yield f"{path}:{number}", row[column]


def _csv_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the limit is the csv module's own, 128 KiB, and texts are longer
    reader = csv.DictReader(_lines(path), strict=True)
    try:
        columns = reader.fieldnames or []
        if column not in columns:
            raise UserError(f"{path}:1: {_no_column(column, columns)}")
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise UserError(
                    f"{path}: row {number} (line {reader.line_num}): expected {len(columns)} fields as in the header"
                )
            yield f"{path}: row {number}", row[column]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(f"{path}: {_no_column(column, file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}: row {number}", value
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {_one_line(error)}") from None


ROWS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _lines(path: Path, longest: int = -1) -> Iterator[str]:
    """Lines with their line ends, from UTF-8 with or without a byte-order mark.

    A line of more than `longest` bytes comes in several parts. Raises `UserError` with the byte offset (in the
    uncompressed text) of the first thing that is not text, and for a damaged archive.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0  # of `line` in the file
    try:
        with _open(path) as file:
            while True:
                line = file.readline(longest)
                begun = len(decoder.getstate()[0])  # bytes of a character that the last part cut in two
                try:
                    text = decoder.decode(line, final=not line)
                except UnicodeDecodeError as error:
                    raise UserError(_not_text(path, position - begun + error.start)) from None
                if "\0" in text:
                    raise UserError(_not_text(path, position + line.index(b"\0")))
                if not line:
                    return
                yield text.removeprefix("\ufeff") if position == 0 else text
                position += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from None


def _open(path: Path) -> BinaryIO:
    """The uncompressed bytes of a file."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if suffix == ".zst":
        # Not zstandard's own reader: it ends without a word where a file was cut short.
        return cast(BinaryIO, io.BufferedReader(_pyarrow().CompressedInputStream(str(path), "zstd"), PIECE))
    return path.open("rb")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet and .zst files needs pyarrow: pip install slmkit[train]") from None
    return pyarrow


def _no_column(column: str, columns: Iterable[str]) -> str:
    return f"no column {column!r}; there are: {', '.join(map(repr, columns)) or 'none'}"


def _not_text(path: Path, offset: int) -> str:
    return (
        f"{path}: expected UTF-8 text, found a byte that is none at offset {offset}; convert the file or leave it out"
    )


def _short(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 40 else line[:40] + "…")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
