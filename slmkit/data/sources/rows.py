"""Rows of `.jsonl`, `.csv` and `.parquet` files, each with its place and with the position behind it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from slmkit.data.sources.documents import BadRow, Conversation, Position
from slmkit.data.sources.files import File, damage, one_line, pyarrow
from slmkit.data.sources.lines import LONGEST_ROW, whole_lines
from slmkit.data.sources.pair_formats import Judged, Pair
from slmkit.data.sources.row_formats import RowError, RowFormats, find_format

SURROGATE_ESCAPE, SURROGATE = re.compile(r"\\u[dD]"), re.compile("[\ud800-\udfff]")
PARQUET_BATCH = 256  # rows taken out of their columns at once


class Row(NamedTuple):
    """What a `RowFormat` makes of a row, or a `BadRow`; and the position behind it."""

    value: Any
    position: Position


def json_rows(file: File, start: Position, formats: RowFormats) -> Iterator[Row]:
    """One object a line. A position is the `offset` of the next line, and the number of lines before it."""
    number = start.get("line", 0)
    for line in whole_lines(file, start.get("offset", 0)):
        number += 1
        if line.problem or line.text.strip():
            value = line.problem or _json_value(f"{file.name}:{number}", line.text, formats)
            yield Row(value, {"line": number, "offset": line.end})


def _json_value(place: str, line: str, formats: RowFormats) -> Any:
    problem = ""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        row, problem = None, f": {error}"
    if not isinstance(row, dict):
        found = f"expected one JSON object a line, found {_short(line)}{problem}"
        return BadRow("not a JSON object", f"{place}: {found}")
    # JSON can spell half of a surrogate pair, which is no text and which no tokenizer takes.
    if SURROGATE_ESCAPE.search(line) and SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        return BadRow("not UTF-8", f"{place}: half a surrogate pair (such as \\ud83d alone) is not text")
    return _converted(place, row, formats)


def csv_rows(file: File, start: Position, formats: RowFormats) -> Iterator[Row]:
    """Rows under a header. A position is the `offset` of the next row, and the numbers of rows and lines before it."""
    csv.field_size_limit(LONGEST_ROW)  # the limit is the csv module's own, 128 KiB, and texts are longer
    columns = next(csv.reader(_Lines(file), strict=True), [])
    if find_format(formats, columns) is None:
        yield Row(_no_column(f"{file.name}:1", formats, columns), start)
        return
    lines = _Lines(file, start.get("offset", 0), start.get("line", 0))
    reader = csv.reader(lines, strict=True)
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
            continue  # blank lines are no rows
        number += 1
        place = f"{file.name}: row {number}"
        if number > 0:
            value = lines.problem or _csv_value(place, lines.number, columns, fields, formats)
            yield Row(value, {"row": number, "line": lines.number, "offset": lines.end})


def _csv_value(place: str, line: int, columns: Sequence[str], fields: Sequence[str], formats: RowFormats) -> Any:
    if len(fields) != len(columns):
        found = f"expected {len(columns)} fields as in the header, found {len(fields)}"
        return BadRow("wrong number of fields", f"{place} (line {line}): {found}")
    return _converted(place, dict(zip(columns, fields)), formats)


class _Lines:
    """The lines of a file as the csv module wants them: text alone, while this remembers what belongs to it."""

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
    """The rows, of which only the columns that are needed are read. A position is the number of rows before it.

    A row group that is damaged is one `BadRow` of all the rows that were left in it.
    """
    reader = pyarrow().parquet.ParquetFile
    begin, behind = start.get("row", 0), 0
    with file.open() as stream, reader(stream) as parquet:
        names = parquet.schema_arrow.names
        found = find_format(formats, names)
        if found is None:
            rows = parquet.metadata.num_rows
            yield Row(_no_column(file.name, formats, names, max(rows - begin, 1)), {"row": rows})
            return
        columns = [name for name in names if name in (*found.required, *found.optional)]
        for group in range(parquet.num_row_groups):
            first, behind = behind, behind + parquet.metadata.row_group(group).num_rows
            number = max(begin, first)
            try:
                for row in _row_group(parquet, group, columns, number - first) if number < behind else ():
                    number += 1
                    yield Row(_converted(f"{file.name}: row {number}", row, formats), {"row": number})
            except damage() as error:
                message = f"{file.name}: rows {number + 1} to {behind} cannot be read as parquet: {one_line(error)}"
                yield Row(BadRow("unreadable file", message, behind - number), {"row": behind})


def _row_group(parquet: Any, group: int, columns: list[str], skip: int) -> Iterator[dict[str, Any] | str]:
    for batch in parquet.iter_batches(batch_size=PARQUET_BATCH, row_groups=[group], columns=columns):
        yield from _values(batch.slice(skip))
        skip = max(skip - len(batch), 0)


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of an Arrow batch; instead of one that holds something else than text, what is wrong with it."""
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
    ".parquet": parquet_rows,
}


def _converted(place: str, row: dict[str, Any] | str, formats: RowFormats) -> Any:
    """What the row means; `row` may also say what is wrong with it."""
    if isinstance(row, str):
        return BadRow("not UTF-8", f"{place}: {row}")
    found = find_format(formats, row)
    if found is None:
        return _no_column(place, formats, row)
    try:
        value = found.convert(row)
    except RowError as error:
        return BadRow(error.reason, f"{place}: {error}")
    if isinstance(value, Pair | Judged):
        return value._replace(place=place)
    return Conversation(value, place) if isinstance(value, list) else value


def _no_column(place: str, formats: RowFormats, columns: Iterable[str], rows: int = 1) -> BadRow:
    wanted = " and ".join(map(repr, next(iter(formats.values())).required))
    there = ", ".join(map(repr, columns)) or "none"
    return BadRow("no such column", f"{place}: no column {wanted}; there are: {there}", rows)


def _short(line: str) -> str:
    line = line[:100].strip()
    return repr(line if len(line) <= 40 else line[:40] + "…")
