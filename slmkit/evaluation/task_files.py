"""Local files of tasks (`--task-data FOLDER`) as the rows that lm-eval's own task needs.

A file may be in the publisher's form, have the hub's columns, or the form of DCLM and llm-foundry. `tasks.yaml` lists
for each task the names of its files, the columns that lm-eval's prompts use, and the other forms with an expression
(Jinja) for each column.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, UndefinedError

from slmkit.config import UserError, one_line
from slmkit.data.sources.documents import BadRow
from slmkit.data.sources.files import COMPRESSIONS, damage, described, local_file
from slmkit.data.sources.rows import ROWS

# Words in the names of files and folders that mean a split, the most exact first.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
    "devtest": ("devtest",),
}
ALL_SPLIT_WORDS = {word for words in SPLIT_WORDS.values() for word in words}
TEXTS = (".txt", ".raw", ".tokens", ".dev", ".devtest")  # cut into rows as the task's `documents` say

SURPLUS = "\0"  # the key of the fields that a row of a .csv has too many
Placed = tuple[str, dict[str, Any]]  # a row and its place for messages


class MissingFileError(UserError):
    """The folder has no file, or no row, of a task."""


@dataclass(frozen=True)
class Rows:
    """The rows of a task's files, with lm-eval's columns, and what the recipe says about the files."""

    rows: list[dict[str, Any]]
    data: dict[str, Any]  # name, sha256, rows


def local_rows(folder: Path, entry: Mapping[str, Any], split: str, config: Mapping[str, Any]) -> Rows:
    """The rows of a split. `entry`: the task's of `tasks.yaml`; `config`: lm-eval's of the task.

    Raises `MissingFileError` if there is no file or no row, `UserError` if a row lacks a field.
    """
    rows, files = _rows_and_files(folder, entry, split, config, only_named=False)
    task = config["task"]
    if not rows and files:
        raise MissingFileError(f"{task}: no row of it in {', '.join(map(str, files[:3]))}")
    if not rows:
        names = " or ".join(name.format(**config) for name in entry["names"])
        words = " or ".join([*SPLIT_WORDS.get(split, (split,)), "no split"])
        raise MissingFileError(
            f"{task}: no file of its {split} split in {folder}; looked for {names} in the names of files and folders, "
            f"with {words} in them (.jsonl, .json, .csv, .tsv, .parquet, also .gz or .zst)"
        )
    return _described(rows, files, folder)


def example_rows(folder: Path, entry: Mapping[str, Any], split: str, config: Mapping[str, Any]) -> Rows | None:
    """Like `local_rows`, of a split that shots are from; None if no file is named after it."""
    rows, files = _rows_and_files(folder, entry, split, config, only_named=True)
    return _described(rows, files, folder) if rows else None


def _described(rows: list[dict[str, Any]], files: Sequence[Path], folder: Path) -> Rows:
    named = [(str(file.relative_to(folder)), described(file)["sha256"]) for file in files]
    data: dict[str, Any] = {"name": [name for name, _ in named], "sha256": [sha256 for _, sha256 in named]}
    if len(named) == 1:
        data = {key: values[0] for key, values in data.items()}
    return Rows(rows, {**data, "rows": len(rows)})


def _rows_and_files(
    folder: Path, entry: Mapping[str, Any], split: str, config: Mapping[str, Any], only_named: bool
) -> tuple[list[dict[str, Any]], list[Path]]:
    languages = [*dict.fromkeys(re.findall(r"sentence_(\w+)", f"{config.get('doc_to_text')}{config['doc_to_target']}"))]
    known = {**config, "languages": languages}
    names = [name.format(**known) for name in entry["names"]]
    entry = {**entry, "columns": [column.format(**known) for column in entry.get("columns", [])]}
    texts = TEXTS if "documents" in entry else ()
    sought = (find_files(folder, names, one, texts, only_named) for one in entry.get("splits", [split]))
    files = next(filter(None, sought), [])
    if not files and "by_fields" in entry:
        files = [path for path in _all_files(folder) if {*entry["needs"]} <= {*next(_rows_of(path), ("", {}))[1]}]
    raw = [placed for file in files for placed in _read(file, entry)]
    if not files and "parallel" in entry:
        files = [file for name in languages for file in find_files(folder, [name], split, TEXTS, only_named)]
        lines = [[text.strip() for text in path.read_text("utf-8").splitlines()] for path in files]
        if len({len(one) for one in lines}) > 1:
            raise UserError(f"{config['task']}: {' and '.join(map(str, files))} have different numbers of lines")
        if len(files) == len(languages):
            raw = [(f"{files[0]}:{n}", dict(zip(entry["columns"], row))) for n, row in enumerate(zip(*lines), 1)]
    return [*_converted(raw, entry, config)], files


def find_files(
    folder: Path, names: Sequence[str], split: str, texts: Sequence[str] = (), only_named: bool = False
) -> list[Path]:
    """The files below `folder` that are of a task and a split: those of one name, numbered parts together.

    A file is of the task if a part of its path, without words of splits, is one of `names`, else if it contains one. It
    is of the split if its path has a word of `SPLIT_WORDS`, else (unless `only_named`) if it has none of any split.
    Raises `UserError` if there is no such folder.
    """
    wanted = {_key(name) for name in names}
    parts = {
        path: [_key(part) for part in (folder.resolve().name, *path.relative_to(folder).parts)]
        for path in _all_files(folder, texts)
    }
    words = {path: {*re.findall(r"[a-z]+", str(path.relative_to(folder)).lower())} & ALL_SPLIT_WORDS for path in parts}
    named = [path for path, keys in parts.items() if wanted & {*keys}]
    alike = [path for path, keys in parts.items() if any(name in key for key in keys[1:] for name in wanted)]
    choices = list[list[Path]]()
    for own in (named, alike):
        choices += [[path for path in own if word in words[path]] for word in SPLIT_WORDS.get(split, (split,))]
        if not only_named:  # a data set of one split calls it train
            choices.append([path for path in own if not words[path] or split == "train"])
    found = next(filter(None, choices), [])
    stems = {path: re.sub(r"\d+", "", parts[path][-1]) for path in found}
    shortest = min(stems.values(), key=lambda stem: (len(stem), stem), default="")
    return [path for path in found if stems[path] == shortest]


def _all_files(folder: Path, texts: Sequence[str] = ()) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"--task-data {folder}: no such folder")
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and _kind(path) in (*ROWS, *texts)]


def _read(path: Path, entry: Mapping[str, Any]) -> tuple[Placed, ...]:
    read = [status for one in (path, _labels(path)) if one.is_file() for status in [one.stat()]]
    state = tuple((status.st_size, status.st_mtime_ns) for status in read)
    column, cut = next(iter(entry.get("documents", {}).items()), ("", ""))
    return _read_once(path, state, column, cut, tuple(entry.get("header", ())))


@lru_cache(maxsize=1)  # the Pile's tasks read the same file one after the other
def _read_once(
    path: Path, state: tuple[tuple[int, int], ...], column: str, cut: str, header: tuple[str, ...]
) -> tuple[Placed, ...]:
    return tuple(_rows_of(path, column, cut, header))


def _rows_of(path: Path, column: str = "", cut: str = "", header: Sequence[str] = ()) -> Iterator[Placed]:
    """The rows of a file, with the labels of `NAME-labels.lst` beside it. Raises `UserError` for a damaged one."""
    file, kind = local_file(path), _kind(path)
    labels = _labels(path)
    answers = labels.read_text().split() if labels.is_file() else None
    found: Iterable[tuple[str, Any]]
    try:
        if kind not in ROWS:
            with file.open_at() as stream:
                texts = re.split(cut, stream.read().decode("utf-8-sig"), flags=re.MULTILINE)
            found = ((f"{path}: document {n}", {column: text}) for n, text in enumerate(texts, 1) if text.strip())
        elif kind == ".csv" and header:
            with file.open_at() as stream:
                lines = stream.read().decode("utf-8-sig").splitlines(keepends=True)
            table = csv.DictReader(lines, header, restkey=SURPLUS)
            found = ((f"{path}: row {n}", row) for n, row in enumerate(table, 1))
        else:
            found = ((place, value) for place, value, _ in ROWS[kind](file, {}))
        for number, (place, row) in enumerate(found):
            if isinstance(row, BadRow):
                raise UserError(row.message)
            if SURPLUS in row:
                raise UserError(f"{place}: expected {len(header)} fields, found {len(header) + len(row[SURPLUS])}")
            if answers is not None and number >= len(answers):
                raise UserError(f"{labels}: {len(answers):,} labels, but {path.name} has more rows")
            yield place, row if answers is None else {"label": int(answers[number]), **row}
    except (ValueError, csv.Error, *damage()) as error:  # type: ignore[misc]
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def _labels(path: Path) -> Path:
    """Where PIQA's publisher has the labels of a file's rows."""
    return path.with_name(f"{path.name.split('.')[0]}-labels.lst")


def _converted(raw: Sequence[Placed], entry: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows with lm-eval's columns. They have the form of the first row, the first of those whose fields it has."""
    first = raw[0][1] if raw else {}
    columns = entry["columns"] or [*first]
    forms = [
        {"needs": entry.get("needs", entry["columns"]), "to": {name: name for name in columns}},
        *entry.get("forms", []),
    ]
    form = next((one for one in forms if all(first.get(name) is not None for name in one["needs"])), forms[0])
    expected = " or ".join(", ".join(one["needs"]) for one in forms)
    also = [name for name in entry.get("also", ()) if name in first and name not in form["to"]]
    to = {name: _expression(text) for name, text in form["to"].items()}
    where = _expression(entry["where"]) if "where" in entry else None
    kept = list[tuple[dict[str, Any], bool]]()
    for place, row in raw:
        if missing := [name for name in form["needs"] if row.get(name) is None]:
            raise UserError(
                f"{place}: {config['task']} needs the fields {expected}; this row has no {', '.join(missing)} (it has "
                f"{', '.join(map(str, row))})"
            )
        known = {**row, "dataset_name": config.get("dataset_name")}
        try:
            new = {name: value(**known) for name, value in to.items()} | {name: row.get(name) for name in also}
            kept.append((new, where is None or bool(where(**known))))
        except (TypeError, ValueError, LookupError, AttributeError, UndefinedError) as error:
            raise UserError(f"{place}: not as {config['task']} expects it: {one_line(error)}") from None
    every = "else_all" in entry and not any(fits for _, fits in kept)
    yield from (row for row, fits in kept if fits or every)


@cache
def _expression(text: str) -> Any:
    """A function of keywords to the expression's value. The expressions are those of `tasks.yaml`, not of the data."""
    if text.isidentifier():
        return lambda **fields: fields[text]
    environment = Environment(undefined=StrictUndefined)
    environment.filters["sub"] = lambda value, pattern, by="": re.sub(pattern, by, value)
    compiled = environment.compile_expression(text, undefined_to_none=False)

    def value(**fields: Any) -> Any:
        found = compiled(**fields)
        if isinstance(found, StrictUndefined):
            str(found)  # raises its error
        return found

    return value


def _kind(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return inner.suffix.lower()


def _key(part: str) -> str:
    """The words of a name in lower case, without endings and words of splits: `arc_easy` for ARC-Easy-Test.jsonl."""
    words = re.split(r"[^a-z0-9]+", part.lower().split(".")[0])
    return "_".join(word for word in words if word and word not in ALL_SPLIT_WORDS)
