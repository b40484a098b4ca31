"""Rows of JSON, `.csv`, `.tsv`, `.parquet` and `.arrow` files, each with its place and the position after it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from slmkit.data.sources.documents import BadRow, Position
from slmkit.data.sources.files import File, damage, pyarrow
from slmkit.data.sources.json_values import DECODER, BrokenJsonError, RepeatedKeyError, first_character, list_entries
from slmkit.data.sources.lines import LONGEST_ROW, whole_lines
from slmkit.data.sources.row_formats import RowFormats
from slmkit.data.sources.turns import shown
from slmkit.hub import one_line

SURROGATE_ESCAPE, SURROGATE = re.compile(r"\\u[dD]"), re.compile("[\ud800-\udfff]")
PARQUET_BATCH = 256  # rows converted from columns at once


class Row(NamedTuple):
    """The item that `RowFormats` makes of a row, or a `BadRow`; and the position after it."""

    value: Any
    position: Position


def json_rows(file: File, start: Position, formats: RowFormats) -> Iterator[Row]:
    """Rows of one object per line, of a list of objects, or of an object with such a list, for any file name.

    A position is the `offset` after a row, and the number of the last `line`, or of the last `row` of a list.
    """
    if "row" in start or ("line" not in start and _is_a_list(file, formats)):
        yield from _list_rows(file, start, formats)
        return
    number = start.get("line", 0)
    for line in whole_lines(file, start.get("offset", 0)):
        number += 1
        if line.problem or line.text.strip():
            value = line.problem or _json_value(f"{file.name}:{number}", line.text, formats)
            yield Row(value, {"line": number, "offset": line.end})


def _is_a_list(file: File, formats: RowFormats) -> bool:
    """Whether a file is read as one list instead of line by line."""
    first = first_character(file)
    if first != "{" or file.kind != ".json":
        return first == "["
    lines = (line.text for line in whole_lines(file) if line.text.strip())
    try:
        row = json.loads(next(lines))
    except (ValueError, RecursionError):
        return True  # an object of several lines
    is_alone = next(lines, None) is None and not formats.recognize(formats.renamed([*row]))
    return is_alone and any(isinstance(value, list) and isinstance([*value, 0][0], dict) for value in row.values())


def _list_rows(file: File, start: Position, formats: RowFormats) -> Iterator[Row]:
    number = start.get("row", 0)
    try:
        if number == 0 and (whole := _one_row(file, formats)):
            yield whole
            return
        for entry in list_entries(file, start.get("offset", 0)):
            number += 1
            place = f"{file.name}: row {number:,}"
            if entry.problem:
                value = BadRow("not valid JSON", f"{place}: not valid JSON: {entry.problem}")
            elif not isinstance(entry.value, dict):
                found = f"expected a list of objects, found {shown(entry.value)}"
                value = BadRow("not a JSON object", f"{place}: {found}")
            else:
                value = _of_text(place, entry.value, formats)
            yield Row(value, {"row": number, "offset": entry.end})
    except BrokenJsonError as error:
        behind = f"cannot be read as JSON behind row {number:,}"
        yield Row(BadRow("unreadable file", f"{file.name}: {behind}: {error}"), {"row": number})


def _one_row(file: File, formats: RowFormats) -> Row | None:
    """The row of a file that is one object with the columns of a row; None for another file."""
    if first_character(file) != "{":
        return None
    with file.open_at() as stream:
        content = stream.read(LONGEST_ROW)
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not formats.recognize(formats.renamed([*row])):
        return None
    text = content.decode(json.detect_encoding(content), "surrogatepass")
    return Row(_json_value(file.name, text, formats), {"row": 1, "offset": len(content)})


def _json_value(place: str, line: str, formats: RowFormats) -> Any:
    problem = ""
    try:
        row = DECODER.decode(line)
    except RepeatedKeyError as error:
        return BadRow("not valid JSON", f"{place}: {error}")
    except (ValueError, RecursionError) as error:
        row, problem = None, f": {error}"
    if not isinstance(row, dict):
        found = f"expected one JSON object a line, found {_short(line)}{problem}"
        return BadRow("not a JSON object", f"{place}: {found}")
    return _of_text(place, row, formats, SURROGATE_ESCAPE.search(line) is not None)


def _of_text(place: str, row: dict[str, Any], formats: RowFormats, may_have_halves: bool = True) -> Any:
    """The row, or a `BadRow` if its JSON has lone surrogates, which are not text and cannot be tokenized."""
    try:
        if may_have_halves and SURROGATE.search(json.dumps(row, ensure_ascii=False)):
            return BadRow("not UTF-8", f"{place}: half a surrogate pair (such as \\ud83d alone) is not text")
    except RecursionError:
        return BadRow("not as expected", f"{place}: objects within objects, too deep to be read")
    return formats.convert(place, row)


def csv_rows(file: File, start: Position, formats: RowFormats) -> Iterator[Row]:
    """Rows after a header; `.tsv` is separated by tabs, `.csv` by commas, semicolons or tabs, as its header.

    A position is the `offset` of the next row, and the numbers of rows and lines before it.
    """
    csv.field_size_limit(LONGEST_ROW)  # the csv module's default of 128 KiB is too small for texts
    delimiter, columns = _header(file)
    if problem := formats.problem(f"{file.name}:1", columns):
        yield Row(problem, start)
        return
    lines = _Lines(file, start.get("offset", 0), start.get("line", 0))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = start.get("row", -1)  # the header is row 0
    while True:
        lines.problem = None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            lines.problem = lines.problem or BadRow(
                "not valid CSV", f"{file.name}:{lines.number}: not valid CSV: {error}"
            )
            fields = []
        if fields is None:
            return
        if not (fields or lines.problem):
            continue  # a blank line
        number += 1
        place = f"{file.name}: row {number}"
        if number > 0:
            value = lines.problem or _csv_value(place, lines.number, columns, fields, formats)
            yield Row(value, {"row": number, "line": lines.number, "offset": lines.end})


def _header(file: File) -> tuple[str, list[str]]:
    """The column separator, and the columns' names."""
    usual = "\t" if file.kind == ".tsv" else ","
    for delimiter in (usual, ";", "\t"):
        columns = next(csv.reader(_Lines(file), delimiter=delimiter), [])
        if len(columns) > 1:
            return delimiter, columns
    return usual, columns


def _csv_value(place: str, line: int, columns: Sequence[str], fields: Sequence[str], formats: RowFormats) -> Any:
    if len(fields) != len(columns):
        found = f"expected {len(columns)} fields as in the header, found {len(fields)}"
        return BadRow("wrong number of fields", f"{place} (line {line}): {found}")
    return formats.convert(place, dict(zip(columns, fields)))


class _Lines:
    """The lines of a file as text for the csv module; keeps their offsets and problems."""

    def __init__(self, file: File, offset: int = 0, number: int = 0) -> None:
        self.lines, self.end, self.number = whole_lines(file, offset), offset, number
        self.problem: BadRow | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.end, self.number, self.problem = line.end, self.number + 1, line.problem or self.problem
        return line.text


def parquet_rows(file: File, start: Position, formats: RowFormats) -> Iterator[Row]:
    """The rows; only the needed columns are read. A position is the number of rows before it.

    A damaged row group is one `BadRow` for all the rows left in it.
    """
    reader = pyarrow().parquet.ParquetFile
    begin, behind = start.get("row", 0), 0
    with file.open() as stream, reader(stream) as parquet:
        names = parquet.schema_arrow.names
        if problem := formats.problem(file.name, names, max(parquet.metadata.num_rows - begin, 1)):
            yield Row(problem, {"row": parquet.metadata.num_rows})
            return
        columns = formats.needed(names)
        for group in range(parquet.num_row_groups):
            first, behind = behind, behind + parquet.metadata.row_group(group).num_rows
            number = max(begin, first)
            try:
                for row in _row_group(parquet, group, columns, number - first) if number < behind else ():
                    number += 1
                    yield Row(_table_value(f"{file.name}: row {number}", row, formats), {"row": number})
                    formats.unused.update(name for name in names if name not in columns)
            except damage() as error:
                message = f"{file.name}: rows {number + 1} to {behind} cannot be read as parquet: {one_line(error)}"
                yield Row(BadRow("unreadable file", message, behind - number), {"row": behind})


def arrow_rows(file: File, start: Position, formats: RowFormats) -> Iterator[Row]:
    """`parquet_rows` for Arrow's own formats: streams, as saved by `datasets`, or files."""
    arrow, number = pyarrow(), start.get("row", 0)
    with file.open() as stream:
        try:
            batches = arrow.ipc.open_stream(stream)
            read: Iterable[Any] = batches
        except arrow.ArrowInvalid:
            batches = arrow.ipc.open_file(stream)
            read = map(batches.get_batch, range(batches.num_record_batches))
        names = batches.schema.names
        if problem := formats.problem(file.name, names):
            yield Row(problem, start)
            return
        columns, skip = formats.needed(names), number
        for batch in read:
            for row in _values(batch.select(columns).slice(skip)):
                number += 1
                yield Row(_table_value(f"{file.name}: row {number}", row, formats), {"row": number})
                formats.unused.update(name for name in names if name not in columns)
            skip = max(skip - len(batch), 0)


def _table_value(place: str, row: dict[str, Any] | str, formats: RowFormats) -> Any:
    return BadRow("not UTF-8", f"{place}: {row}") if isinstance(row, str) else formats.convert(place, row)


def _row_group(parquet: Any, group: int, columns: list[str], skip: int) -> Iterator[dict[str, Any] | str]:
    for batch in parquet.iter_batches(batch_size=PARQUET_BATCH, row_groups=[group], columns=columns):
        yield from _values(batch.slice(skip))
        skip = max(skip - len(batch), 0)


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of an Arrow batch; for a row with invalid text, a message instead."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(len(batch)):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"expected UTF-8 text: {error}"


ROWS: dict[str, Callable[[File, Position, RowFormats], Iterator[Row]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".arrow": arrow_rows,
    ".parquet": parquet_rows,
}


def _short(line: str) -> str:
    line = line[:100].strip()
    return repr(line if len(line) <= 40 else line[:40] + "…")
