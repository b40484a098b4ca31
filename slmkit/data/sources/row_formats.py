"""Reads rows by their columns: finds the format of a row, and refuses or counts every column that it does not use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from slmkit.config import UserError, did_you_mean
from slmkit.data.sources.documents import BadRow, Conversation, Judged, Pair, RowError
from slmkit.data.sources.folders import SPLITS
from slmkit.data.sources.formats import KINDS, LABELS, MEANING, NO_COLUMN, NO_LABEL, RANKED, Kind, RowDict, RowFormat
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.sources.turns import ROLE, WEIGHTS, is_empty, is_on_learning, judgement, shown

# In conversations these are refused if they look like a judgement on the answer.
JUDGEMENTS = (
    *LABELS, "labels", "rating", "feedback", "verdict", "judgement", "judgment", "desirable", "is_good", "thumbs",
)  # fmt: skip
DROPPED = ("deleted", "is_deleted", "skip", "ignore", "exclude")  # true: not learned
AMBIGUOUS = ("outputs", *(f"ranked {name}" for name in RANKED))  # formats of columns that other kinds have too
EXAMPLES = ("text", "preference", "prompt-completion-label", "prompt-completion")  # shown in an error message


class RowFormats:
    """The formats of one kind of items that fit the settings; the first whose columns are there applies.

    `unused` counts columns without a meaning that are not used, by name.
    """

    def __init__(self, kind: str, settings: SourceSettings, unused: Counter[str]) -> None:
        """Raises `UserError` if the settings name a format or column that this kind does not have."""
        self.kind, self.settings, self.unused, self.mapping = KINDS[kind], settings, unused, settings.mapping
        self.is_text = kind == "text"
        what, formats, name = self.kind.what, self.kind.formats, settings.row_format
        if settings.separator is not None:
            raise UserError(f"separator: it is for text files (.txt), and {what} are read from rows; remove it")
        if name is not None and name not in formats:
            raise UserError(f"row_format {name!r}: {did_you_mean(name, formats)}")
        known = {column for one in formats.values() for column in one.used}
        for ours, theirs in self.mapping.items():
            if ours not in known:
                near = did_you_mean(ours, known)
                raise UserError(f"{what} have no column {ours!r}; {near} (it is set to {theirs!r})")
        found = {key: one for key, one in formats.items() if name in (None, key) and {*self.mapping} <= {*one.used}}
        if not found:
            together = " and ".join(map(repr, self.mapping))
            raise UserError(f"data.columns: no format of {what} has the columns {together} together")
        self.kind = self.kind._replace(formats=found)

    def recognize(self, columns: Sequence[str]) -> bool:
        """Whether these are columns of a row, of this kind or another."""
        columns = self._renamed(columns)
        return self.kind.find(columns) is not None or _other_kind(columns) is not None

    def needed(self, place: str, columns: Sequence[str], rows: int = 1) -> list[str]:
        """The columns of a table that may be used, or that may cause a row to be refused.

        Raises `RowError` for the `rows` of the table if no format has these columns.
        """
        try:
            self._expect_named(columns)
            names = self._renamed(columns)
            if self.kind.find(names) is None:
                raise self._no_format({**dict.fromkeys(columns)})
        except RowError as error:
            raise RowError(f"{place}: {error}", error.reason, rows=rows) from None
        used = {c for one in self.kind.formats.values() if {*names}.issuperset(one.required) for c in one.used}
        used.update((*WEIGHTS, *DROPPED, "split", *(() if self.is_text else (*MEANING, *JUDGEMENTS))))
        return [
            column
            for column, name in zip(columns, names)
            if name in used or self._is_on_learning(name, "?") or _scores(name)
        ]

    def convert(self, place: str, row: RowDict) -> Any:
        """The item of a row, or a `BadRow`."""
        try:
            self._expect_named([*row])
            renamed = dict(zip(self._renamed([*row]), row.values()))
            filled = [name for name, value in renamed.items() if value is not None]
            found = self.kind.find(filled) or self.kind.find(renamed)
            if found is None:
                raise self._no_format(row)
            unused = self._unused(renamed, found)
            item = found.convert(renamed)
        except RowError as error:
            line = f"{place}: {error}"
            for ours, theirs in self.mapping.items():
                line = line.replace(f"column {ours!r}", f"column {theirs!r}")
            of_this_kind = error.reason not in (NO_COLUMN, NO_LABEL)
            return BadRow(error.reason, line, harmless=error.harmless, has_columns=of_this_kind)
        except RecursionError:
            return BadRow("not as expected", f"{place}: objects within objects, too deep to be read")
        self.unused.update(unused)
        for part in item if isinstance(item, Pair | Judged) else [item]:
            if isinstance(part, Conversation):
                part.place = place
                self.unused.update(f"{key!r} of messages" for key in part.unused)
        return item._replace(place=place) if isinstance(item, Pair | Judged) else item

    def _renamed(self, columns: Sequence[str]) -> list[str]:
        """The columns of a table, renamed to those of the formats."""
        ours = {theirs: name for name, theirs in self.mapping.items()}
        return [ours.get(name, f"{name} (the file's own)" if name in self.mapping else name) for name in columns]

    def _expect_named(self, columns: Sequence[str]) -> None:
        """Raises `RowError` if a column that the user named is not there."""
        for ours, theirs in self.mapping.items():
            if theirs not in columns:
                near = did_you_mean(theirs, columns).replace("known: ", "there are: ")
                raise RowError(f"no column {theirs!r}, which is set as {ours!r}; {near}", NO_COLUMN)

    def _unused(self, row: RowDict, found: RowFormat) -> list[str]:
        """The columns that a format does not use. Raises `RowError` for one whose meaning would be lost."""
        split, wanted = row.get("split"), SPLITS.get(self.settings.split.lower(), self.settings.split)
        named = SPLITS.get(split.strip().lower()) if isinstance(split, str) else None
        if named not in (None, wanted):
            raise RowError(f"column 'split' says {split}; set split to read it", f"of split {split}", harmless=True)
        unused = []
        for name, value in row.items():
            if name in found.used or is_empty(value):
                continue
            said = judgement(value)
            if (name in WEIGHTS and said is False) or (name in DROPPED and said):
                line = f"column {name!r} says {shown(value)}: not to be learned"
                raise RowError(line, "not to be learned", harmless=True)
            if not self.is_text:
                self._expect_no_meaning(name, value)
            if name not in (*WEIGHTS, *DROPPED) and not (name == "split" and wanted in (named, value)):
                unused.append(name)
        return unused

    def _expect_no_meaning(self, name: str, value: Any) -> None:
        """Raises `RowError` for a column that changes a conversation."""
        if name in WEIGHTS and not judgement(value):
            raise RowError(f"column {name!r}: weight {shown(value)}; expected 1 or 0", f"column {name!r}")
        if name in MEANING or self._is_on_learning(name, value):
            line = f"column {name!r} changes the meaning of the row and is not read; remove it"
            raise RowError(line, f"column {name!r}")
        if self.kind.what == "conversations" and name in JUDGEMENTS and _is_a_label(name, value):
            mapped = "" if name in LABELS else f" with data.columns: {{label: {name}}}"
            hint = f"objective: kto (prepare --judged){mapped}"
            raise RowError(f"column {name!r} labels the answer good or bad: {hint}", "labelled answers")

    def _is_on_learning(self, name: str, value: Any) -> bool:
        return not self.is_text and name not in (*WEIGHTS, *DROPPED) and is_on_learning(name, value)

    def _no_format(self, row: RowDict) -> RowError:
        """The error if no format fits: names the columns and the setting that maps them."""
        formats = self.kind.formats
        wanted = next(iter(formats.values())).required
        talks = [name for name, value in row.items() if _are_messages(value)]
        known = _other_kind(row)
        other = known or (KINDS["conversations"] if talks else self.kind)
        others = f", nor others that make {self.kind.what}" if len(formats) > 2 else ""
        line = f"no column {' and '.join(map(repr, wanted))}{others}; there are: {', '.join(map(repr, row)) or 'none'}"
        if other.what != self.kind.what:
            line += f"; these are {other.what}: {other.reader}"
        if known is None or other.what == self.kind.what:
            example = next((formats[name].required for name in EXAMPLES if name in formats), wanted)
            mapped = [("messages", talks[0])] if talks else zip(example, [*row, *"…" * len(example)])
            names = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapped)
            line += f"; data.columns names them, such as {{{names}}}"
        return RowError(line, NO_COLUMN)


def _other_kind(columns: Iterable[str]) -> Kind | None:
    """The kind of rows with these columns."""
    present = {*columns}
    for kind in KINDS.values():
        if any(present.issuperset(one.required) for name, one in kind.formats.items() if name not in AMBIGUOUS):
            return kind
    return None


def _scores(name: str) -> bool:
    """Whether a column may say which of two answers is better."""
    return name.endswith(("_score", "_rating", "-rating", "_reward")) or name.startswith("score_")


def _is_a_label(name: str, value: Any) -> bool:
    """Whether a value looks like a judgement; a rating of 1 may be out of five."""
    return (judgement(value) is not None and (name in LABELS or value != 1)) or value in (-1, "-1")


def _are_messages(value: Any) -> bool:
    """Whether a value is a list of objects with roles."""
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(isinstance(turn, dict) and not turn.keys().isdisjoint(ROLE) for turn in value)
