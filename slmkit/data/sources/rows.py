"""Rows of JSON, `.csv`, `.tsv`, `.parquet` and `.arrow` files, each with its place and the position after it."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast

from slmkit.config import one_line
from slmkit.data.sources.documents import PIECE, BadRow, Position, RowError
from slmkit.data.sources.files import LONGEST_ROW, File, Line, byte_length, damage, pyarrow, whole_lines
from slmkit.data.sources.row_formats import RowFormats
from slmkit.data.sources.turns import shown

PARQUET_BATCH = 256  # rows converted from columns at once
SURROGATE_ESCAPE = re.compile(r"\\u[dD]")  # of one half of a pair
JSON_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)  # a text, the beginning of one, or punctuation


class SourceRow(NamedTuple):
    """A row, its place for messages, and the position after it."""

    place: str
    value: dict[str, Any] | BadRow
    position: Position


def json_rows(file: File, start: Position, formats: RowFormats | None = None) -> Iterator[SourceRow]:
    """Rows of one object per line, of a list of objects, or of an object with such a list, for any file name.

    A position is the `offset` after a row, and the number of the last `line`, or of the last `row` of a list.
    """
    layout = next((unit for unit in ("line", "row") if unit in start), None) or _layout(file, formats)
    if layout == "whole":
        with file.open_at() as stream:
            content = stream.read()
        value = _json_value(file.name, content.decode("utf-8-sig", "surrogateescape"))
        yield SourceRow(file.name, value, {"line": 1, "offset": len(content)})
        return
    number, entries = start.get(layout, 0), whole_lines if layout == "line" else list_entries
    try:
        for entry in entries(file, start.get("offset", 0)):
            number += 1
            if entry.problem or entry.text.strip():
                place = f"{file.name}:{number}" if layout == "line" else f"{file.name}: row {number:,}"
                begins = None if layout == "line" else entry.end - byte_length(entry.text)
                value = entry.problem or _json_value(place, entry.text, begins)
                yield SourceRow(place, value, {layout: number, "offset": entry.end})
    except RowError as error:
        message = f"{file.name}: cannot be read as JSON behind row {number:,}: {error}"
        raise RowError(message, "unreadable file") from None


def _layout(file: File, formats: RowFormats | None) -> str:
    """Whether each `line` of a file is a row, each `row` is an entry of one list, or the `whole` file is one row."""
    with file.open_at() as stream:
        content = stream.read1(PIECE).removeprefix(codecs.BOM_UTF8).lstrip()
        if content[:1] != b"{" or file.kind != ".json":
            return "row" if content[:1] == b"[" else "line"
        first_line, _, rest = content.partition(b"\n")
        if rest.strip() and _parsed(first_line):
            return "line"
        content += stream.read(LONGEST_ROW)
    whole = _parsed(content)
    if whole is None:  # several objects, or one that is damaged or longer than a row
        return "line" if _parsed(content.partition(b"\n")[0]) else "row"
    has_list = any(isinstance(value, list) and isinstance([*value, 0][0], dict) for value in whole.values())
    return "row" if has_list and not (formats and formats.recognize([*whole])) else "whole"


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def list_entries(file: File, offset: int = 0) -> Iterator[Line]:
    """The entries of the list in a JSON file, or of the first list of objects in its object, as text.

    `offset` is 0 or that after an earlier entry. Raises `RowError` where the next entry cannot be found, and for an
    object with no list of objects, or two.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, previous = "", ""
    begin = at = 0  # where the entry begins in `text`, and where the search for its end goes on
    is_resumed = offset > 0
    lists = depth = inside = int(is_resumed)  # lists found; open brackets; those around an entry, 0 outside of a list
    with file.open_at(offset) as stream:
        while len(text) - begin <= LONGEST_ROW and (raw := stream.read1(max(PIECE, len(text) - begin))):
            text, at, begin = text[begin:] + decoder.decode(raw), at - begin, 0
            for match in JSON_TOKEN.finditer(text, at):
                token, start, at = match[0], match.start(), match.end()
                if token == '"':
                    at = start  # its end is not read yet
                    break
                if not inside:
                    is_first_row = token == "{" and depth == 2 and previous == "["
                    if is_first_row or (token == "[" and depth == 0):
                        inside, lists = depth + (token == "["), lists + 1
                    if lists > 1 or (lists and depth == inside == 0):
                        raise RowError("a second list of rows, or text behind the first: make each list a file")
                    begun = start if is_first_row else at
                    offset, begin = offset + byte_length(text[begin:begun]), begun
                elif depth == inside and token in ",]}":
                    entry = text[begin:start]
                    offset += byte_length(entry)
                    if entry.strip():
                        yield Line(entry, offset)
                    if token == "}":
                        raise RowError(f"expected ']' at offset {offset:,}, found '}}'")
                    if token == "]" and is_resumed:
                        return
                    inside = inside if token == "," else 0
                    offset, begin = offset + 1, at
                depth += (token in "[{") - (token in "]}")
                previous = token
    if inside and depth == inside and text[begin:].strip():  # whole, although the list is not
        yield Line(text[begin:], offset + byte_length(text[begin:]))
    if len(text) - begin > LONGEST_ROW:
        raise RowError(f"an entry is longer than {LONGEST_ROW:,} bytes")
    if problem := _json_problem(text[begin:], offset):
        raise RowError(problem)
    if inside or depth:
        raise RowError("it breaks off")
    if not lists:
        with file.open_at() as stream:
            content = stream.read(LONGEST_ROW).decode("utf-8", "surrogateescape")
        raise RowError(_json_problem(content, 0) or "an object without a list of rows in it")


def _json_problem(text: str, begins: int) -> str:
    """What is not JSON within a text at the offset `begins`, such as an odd quote; '' if it only breaks off."""
    start = len(text) - len(text.lstrip())
    try:
        DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if start < len(text) and (error.pos < len(text.rstrip()) and not error.msg.startswith("Unterminated")):
            return f"{error.msg.removesuffix(' at')} at offset {begins + byte_length(text[: error.pos]):,}"
    except (ValueError, RecursionError, RowError):
        pass  # of a number or a key: said where the row is read
    return ""


def whole_number(digits: str) -> float:
    """The number as an int, from 4,300 digits on as a float, since Python's `int` refuses more."""
    return int(digits) if len(digits) < 4300 else float(digits)


def _unique_keys(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object. Raises `RowError` for a key that stands twice: Python's reader would keep the last value."""
    keys = [key for key, _ in members]
    if len({*keys}) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"the key {twice!r} stands twice in one object; keep one of them")
    return dict(members)


DECODER = json.JSONDecoder(parse_int=whole_number, object_pairs_hook=_unique_keys)


def _json_value(place: str, text: str, begins: int | None = None) -> dict[str, Any] | BadRow:
    """The object in a JSON text, or a `BadRow`; a lone surrogate is not text and cannot be tokenized.

    `begins`: the offset of the text in its file, if it is not a line of its own.
    """
    try:
        text.encode()
        row = DECODER.decode(text)
        if SURROGATE_ESCAPE.search(text):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return BadRow("not UTF-8", f"{place}: not UTF-8, or half a surrogate pair (such as \\ud83d alone)")
    except RowError as error:
        return BadRow("not valid JSON", f"{place}: {error}")
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if begins is not None and isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg.removesuffix(' at')} at offset {begins + byte_length(text[: error.pos]):,}"
        return BadRow("not valid JSON", f"{place}: expected a JSON object, found {shown(text[:100].strip())}: {reason}")
    if not isinstance(row, dict):
        return BadRow("not a JSON object", f"{place}: expected a JSON object, found {shown(text[:100].strip())}")
    return row


def _check_columns(place: str, columns: list[str], formats: RowFormats | None, rows: int = 1) -> list[str]:
    """Those of a table's columns that are needed. Raises `RowError` if they fit no format, or one is there twice."""
    if twice := next((name for number, name in enumerate(columns) if name in columns[:number]), None):
        raise RowError(f"{place}: two columns are called {twice!r}; rename one", "two columns of one name", rows=rows)
    return columns if formats is None else formats.needed(place, columns, rows)


def csv_rows(file: File, start: Position, formats: RowFormats | None = None) -> Iterator[SourceRow]:
    """Rows after a header; `.tsv` is separated by tabs, `.csv` by commas, semicolons or tabs, as its header.

    A position is the `offset` of the next row, and the numbers of rows and lines before it.
    """
    csv.field_size_limit(LONGEST_ROW)  # the csv module's default of 128 KiB is too small for texts
    delimiter, columns = _header(file)
    _check_columns(f"{file.name}:1", columns, formats)
    number, line, offset = start.get("row", -1), start.get("line", 0), start.get("offset", 0)  # the header is row 0
    problem: BadRow | None = None

    def texts() -> Iterator[str]:
        nonlocal line, offset, problem
        for found in whole_lines(file, offset):
            line, offset, problem = line + 1, found.end, found.problem or problem
            yield found.text

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        problem = None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fields = []
            problem = problem or BadRow("not valid CSV", f"{file.name}:{line}: not valid CSV: {error}")
        if fields is None:
            return
        if not (fields or problem):
            continue  # a blank line
        number += 1
        place, value = f"{file.name}: row {number}", problem or dict(zip(columns, fields))
        if problem is None and len(fields) != len(columns):
            found = f"expected {len(columns)} fields as in the header, found {len(fields)}"
            value = BadRow("wrong number of fields", f"{place} (line {line}): {found}")
        if number > 0:
            yield SourceRow(place, value, {"row": number, "line": line, "offset": offset})


def _header(file: File) -> tuple[str, list[str]]:
    """The column separator, and the columns' names."""
    usual = "\t" if file.kind == ".tsv" else ","
    for delimiter in (usual, ";", "\t"):
        columns = next(csv.reader((line.text for line in whole_lines(file)), delimiter=delimiter), [])
        if len(columns) > 1:
            return delimiter, columns
    return usual, columns


def table_rows(file: File, start: Position, formats: RowFormats | None = None) -> Iterator[SourceRow]:
    """Rows of parquet and Arrow files; only the needed columns are read. A position is the number of rows before it.

    A damaged row group (of Arrow: batch) is one `BadRow` for all the rows left in it.
    """
    number, behind = start.get("row", 0), 0
    with file.open() as stream:
        names, rows, read = (_row_groups if file.kind == ".parquet" else _record_batches)(stream)
        columns = _check_columns(file.name, names, formats, max(rows - number, 1))
        unread = [name for name in names if name not in columns]
        for size, batches in read(columns):
            first, behind = behind, behind + size
            if behind <= number:
                continue
            skip = max(number - first, 0)
            try:
                for batch in batches:
                    for value in _values(batch.slice(skip)):
                        number += 1
                        place = f"{file.name}: row {number}"
                        if isinstance(value, UnicodeDecodeError):
                            value = BadRow("not UTF-8", f"{place}: expected UTF-8 text: {value}")
                        elif formats:
                            formats.unused.update(unread)
                        yield SourceRow(place, value, {"row": number})
                    skip = max(skip - len(batch), 0)
            except damage() as error:
                rows_left = f"rows {number + 1} to {behind} cannot be read as {file.kind[1:]}"
                message = f"{file.name}: {rows_left}: {one_line(error)}"
                yield SourceRow(file.name, BadRow("unreadable file", message, behind - number), {"row": behind})
                number = behind


# Column names, the number of rows as far as known, and from columns to each group's size and batches of rows.
Table: TypeAlias = tuple[list[str], int, Callable[[list[str]], Iterator[tuple[int, Iterable[Any]]]]]


def _row_groups(stream: BinaryIO) -> Table:
    parquet = pyarrow().parquet.ParquetFile(stream)

    def read(columns: list[str]) -> Iterator[tuple[int, Iterable[Any]]]:
        for group in range(parquet.num_row_groups):
            yield parquet.metadata.row_group(group).num_rows, parquet.iter_batches(PARQUET_BATCH, [group], columns)

    return parquet.schema_arrow.names, parquet.metadata.num_rows, read


def _record_batches(stream: BinaryIO) -> Table:
    """Of Arrow's own formats: streams, as saved by `datasets`, or files."""
    arrow = pyarrow()
    try:
        opened = arrow.ipc.open_stream(stream)
        batches = iter(opened)
    except arrow.ArrowInvalid:
        opened = arrow.ipc.open_file(stream)
        batches = map(opened.get_batch, range(opened.num_record_batches))
    return opened.schema.names, 0, lambda columns: ((len(batch), [batch.select(columns)]) for batch in batches)


def _values(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; for a row with invalid text, the error."""
    try:
        return cast(list[Any], batch.to_pylist())
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [error]
        return [value for index in range(len(batch)) for value in _values(batch.slice(index, 1))]


ROWS: dict[str, Callable[..., Iterator[SourceRow]]] = {
    ".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows,
    ".arrow": table_rows, ".parquet": table_rows,
}  # fmt: skip
