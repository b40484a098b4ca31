"""Local files of tasks (`--task-data FOLDER`) as the rows that lm-eval's own task needs.

A file may be in the publisher's form, have the hub's columns, or the form of DCLM and llm-foundry. `tasks.yaml` lists
for each task the names of its files, the columns that lm-eval's prompts use, and the other forms with an expression
(Jinja) for each column.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmkit.config import UserError, one_line
from slmkit.data.sources.documents import BadRow, RowError
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
TEXTS = (".txt", ".raw", ".tokens", ".dev", ".devtest")  # read only for tasks whose `documents` say how to cut them


@dataclass(frozen=True)
class Rows:
    """The rows of a task's files, with lm-eval's columns, and what the recipe says about the files."""

    rows: list[dict[str, Any]]
    data: dict[str, Any]  # name, sha256, rows


def local_rows(
    folder: Path, task: str, entry: Mapping[str, Any], split: str, config: Mapping[str, Any], examples: bool = False
) -> Rows | None:
    """The rows of a split; None if there are no `examples`. `entry`: the task's of `tasks.yaml`; `config`: lm-eval's.

    Raises `UserError` if there is no file, or a row of it lacks a field.
    """
    names = [name.format(**config) for name in entry["names"]]
    files = find_files(folder, names, split, TEXTS if "documents" in entry else (), only_named=examples)
    if examples and not files:
        return None
    if not files:
        words = " or ".join([*SPLIT_WORDS.get(split, (split,)), "no split"])
        raise UserError(
            f"{task}: no file of the split {split} in {folder}; looked for {' or '.join(names)} in the names of files "
            f"and folders, with {words} in them (.jsonl, .json, .csv, .tsv, .parquet, also .gz or .zst)"
        )
    raw = [placed for file in files for placed in read_rows(file, entry)]
    rows = list(_converted(raw, task, entry, config))
    found = [described(file) for file in files]
    data = {
        "name": ", ".join(str(file.relative_to(folder)) for file in files[:3]) + (", …" if len(files) > 3 else ""),
        "sha256": found[0]["sha256"] if len(found) == 1 else [one["sha256"] for one in found],
        "rows": len(rows),
    }
    return Rows(rows, data)


def find_files(
    folder: Path, names: Sequence[str], split: str, texts: Sequence[str] = (), only_named: bool = False
) -> list[Path]:
    """The files below `folder` that are of a task and a split: those of one name, numbered parts together.

    A file is of the task if a part of its path, without words of splits, is one of `names`, else if it contains one. It
    is of the split if its path has a word of `SPLIT_WORDS`, else (unless `only_named`) if it has none of any split.
    """
    if not folder.is_dir():
        raise UserError(f"--task-data {folder}: no such folder")
    wanted = {_key(name) for name in names}
    parts = {
        path: [_key(part) for part in (folder.resolve().name, *path.relative_to(folder).parts)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (_kind(path) in ROWS or _kind(path) in texts)
    }
    own = [path for path, keys in parts.items() if wanted & {*keys}]
    own = own or [path for path, keys in parts.items() if any(name in key for key in keys for name in wanted)]
    words = {path: {*re.findall(r"[a-z]+", str(path.relative_to(folder)).lower())} & ALL_SPLIT_WORDS for path in own}
    choices = [[path for path in own if word in words[path]] for word in SPLIT_WORDS.get(split, (split,))]
    if not only_named:  # a data set of one split calls it train
        choices.append([path for path in own if not words[path] or split == "train"])
    found = next(filter(None, choices), [])
    stems = {path: re.sub(r"\d+", "", parts[path][-1]) for path in found}
    shortest = min(stems.values(), key=lambda stem: (len(stem), stem), default="")
    return [path for path in found if stems[path] == shortest]


def read_rows(path: Path, entry: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, row) of a file. Raises `UserError` for a row that cannot be read."""
    file, kind = local_file(path), _kind(path)
    labels = path.with_name(f"{path.name.split('.')[0]}-labels.lst")  # beside the rows, as PIQA's publisher has them
    answers = labels.read_text().split() if labels.is_file() else None
    try:
        if kind not in ROWS:
            with file.open_at() as stream:
                texts = re.split(entry["documents"], stream.read().decode("utf-8-sig"), flags=re.MULTILINE)
            found = ((f"{path}: document {n}", {"text": text}) for n, text in enumerate(texts, 1) if text.strip())
        elif kind == ".csv" and "header" in entry:
            with file.open_at() as stream:
                lines = stream.read().decode("utf-8-sig").splitlines(keepends=True)
            table = csv.DictReader(lines, entry["header"])
            found = ((f"{path}: row {number}", row) for number, row in enumerate(table, 1))
        else:
            found = ((place, value) for place, value, _ in ROWS[kind](file, {}))
        for number, (place, row) in enumerate(found):
            if isinstance(row, BadRow):
                raise UserError(row.message)
            if answers is not None and number >= len(answers):
                raise UserError(f"{labels}: {len(answers):,} labels, but {path.name} has more rows")
            yield place, row if answers is None else {"label": int(answers[number]), **row}
    except (RowError, UnicodeDecodeError, *damage()) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def _converted(
    raw: Sequence[tuple[str, dict[str, Any]]], task: str, entry: Mapping[str, Any], variables: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows with lm-eval's columns, in the form that the first row has; all must have it."""
    if not raw:
        return
    columns = entry.get("columns")
    forms = [{name: name for name in columns}] if columns else [{name: name for name in raw[0][1]}]
    forms += entry.get("forms", [])
    needs = [form.get("needs", [*form]) for form in forms]
    lacking = [[name for name in fields if raw[0][1].get(name) is None] for fields in needs]
    chosen = min(range(len(forms)), key=lambda number: bool(lacking[number]))
    expected = " or ".join(", ".join(fields) for fields in needs)
    to = {name: _expression(text) for name, text in forms[chosen].get("to", forms[chosen]).items()}
    where = _expression(entry.get("where", "true"))
    kept = list[tuple[dict[str, Any], bool]]()
    for place, row in raw:
        missing = [name for name in needs[chosen] if row.get(name) is None] if columns else []
        if missing:
            raise UserError(
                f"{place}: {task} needs the fields {expected}; this row has no {', '.join(missing)} (it has "
                f"{', '.join(row)})"
            )
        known = {**variables, **row}
        try:
            kept.append(({name: value(**known) for name, value in to.items()}, bool(where(**known))))
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"{place}: not as {task} expects it: {one_line(error)}") from None
    is_part = any(fits for _, fits in kept) or "where_else" not in entry
    yield from (row for row, fits in kept if fits or not is_part)


def _expression(text: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined)  # the expressions are tasks.yaml's, not the data's
    environment.filters["sub"] = lambda value, pattern, by="": re.sub(pattern, by, value)
    return environment.compile_expression(text, undefined_to_none=False)


def _kind(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return inner.suffix.lower()


def _key(part: str) -> str:
    """The words of a name in lower case, without endings and words of splits: `arc_easy` for ARC-Easy-Test.jsonl."""
    words = re.split(r"[^a-z0-9]+", part.lower().split(".")[0])
    return "_".join(word for word in words if word and word not in ALL_SPLIT_WORDS)
