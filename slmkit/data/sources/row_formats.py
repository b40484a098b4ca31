"""Row formats of public data sets: which columns hold the text, the conversation, the pair of answers.

`docs/sources.md` has the table. Every column of a row is used, refused because its meaning would be lost, or counted
as unused.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slmkit.config import UserError, did_you_mean, kind_of_value
from slmkit.data.sources.documents import BadRow, Conversation, Message
from slmkit.data.sources.folders import SPLITS
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.sources.turns import (
    EXAMPLE,
    MEDIA,
    REASONING,
    ROLE,
    TOOLS,
    WEIGHTS,
    RowError,
    checked,
    conversation,
    from_json,
    is_empty,
    is_on_learning,
    judgement,
    shown,
    the_one,
    tools_in,
)

Row = dict[str, Any]
NO_COLUMN = "no such column"  # reason for rows whose columns fit no format
NO_LABEL = "no label"  # for rows whose label is neither true nor false
SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = "history"  # earlier exchanges: a list of [question, answer]
CONTEXT = ("input", "context")  # what a question is about
LABELS = ("label", "kto_tag")
# In conversations these are refused if they look like a judgement on the answer.
JUDGED = (*LABELS, "labels", "rating", "feedback", "verdict", "judgement", "judgment", "desirable", "is_good", "thumbs")
DROPPED = ("deleted", "is_deleted", "skip", "ignore", "exclude")  # true: not learned
CHATS = ("messages", "conversations", "conversation", "dialogue")
# Question and answer columns, in order of precedence.
EXCHANGES = {
    "instruction": ("instruction", "output"),  # tatsu-lab/alpaca
    "instruction-response": ("instruction", "response"),  # databricks-dolly-15k
    "instruction-answer": ("instruction", "answer"),
    "prompt-completion": ("prompt", "completion"),
    "prompt-response": ("prompt", "response"),
    "question-answer": ("question", "answer"),
    "question-response": ("question", "response"),
    "query-response": ("query", "response"),
    "query-answer": ("query", "answer"),
    "problem-solution": ("problem", "solution"),
    "input-output": ("input", "output"),
}
# Columns that change a conversation: refused if a format does not use them.
MEANING = (
    *TOOLS, *SYSTEM, HISTORY, *REASONING, *MEDIA, "tool_calls", "chat_template", "chat_template_kwargs", "inputs",
    "options", "choices", "rejected_response",
)  # fmt: skip


@dataclass(frozen=True)
class RowFormat:
    """Required and optional columns, and the conversion of a row. `convert` raises `RowError`."""

    required: tuple[str, ...]
    convert: Callable[[Row], Any]
    optional: tuple[str, ...] = ()

    @property
    def used(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


@dataclass(frozen=True)
class RowFormats:
    """The formats of one kind of item, called `what`; the first whose columns are there applies.

    `meaning`: columns that are refused if a format does not use them. `unused` counts the others, by column.
    """

    what: str
    formats: dict[str, RowFormat]
    settings: SourceSettings
    meaning: tuple[str, ...]
    unused: Counter[str]

    def __post_init__(self) -> None:
        """Raises `UserError` if the settings name a format or column that this kind does not have."""
        name, mapping = self.settings.row_format, self.settings.mapping
        if self.settings.separator is not None:
            raise UserError(f"separator: it is for text files (.txt), and {self.what} are read from rows; remove it")
        if name is not None and name not in self.formats:
            raise UserError(f"row_format {name!r}: {did_you_mean(name, self.formats)}")
        known = {column for one in self.formats.values() for column in one.used}
        for ours, (key, _) in mapping.items():
            if ours not in known:
                raise UserError(f"{key}: {self.what} have no column {ours!r}; {did_you_mean(ours, known)}")
        found = {name: self.formats[name]} if name else self.formats
        found = {name: one for name, one in found.items() if mapping.keys() <= {*one.used}}
        if not found:
            raise UserError(
                f"data.columns: no format of {self.what} has the columns {' and '.join(map(repr, mapping))} together"
            )
        object.__setattr__(self, "formats", found)

    def renamed(self, columns: Sequence[str]) -> list[str]:
        """The columns of a table, renamed to those of the formats."""
        ours = {theirs: name for name, (_, theirs) in self.settings.mapping.items()}
        taken = {*ours.values()}
        return [ours.get(name, f"{name} (the file's own)" if name in taken else name) for name in columns]

    def missing(self, columns: Iterable[str]) -> str:
        """Message about a column that the user named and that is not in `columns`; '' if all are there."""
        columns = [*columns]
        for key, theirs in self.settings.mapping.values():
            if theirs not in columns:
                near = did_you_mean(theirs, columns).replace("known: ", "there are: ")
                return f"no column {theirs!r}, which {key} names; {near}"
        return ""

    def problem(self, place: str, columns: Sequence[str], rows: int = 1) -> BadRow | None:
        """The problem of a table with these columns; None if there is none."""
        if twice := next((name for number, name in enumerate(columns) if name in columns[:number]), None):
            return BadRow("two columns of one name", f"{place}: two columns are called {twice!r}; rename one", rows)
        if line := self.missing(columns):
            return BadRow(NO_COLUMN, f"{place}: {line}", rows)
        return None if self.find(self.renamed(columns)) else self.no_format(place, columns, rows)

    def find(self, columns: Iterable[str]) -> RowFormat | None:
        """The first format whose columns are all there; None if there is none."""
        present = {*columns}
        return next((one for one in self.formats.values() if present.issuperset(one.required)), None)

    def recognize(self, columns: Sequence[str]) -> bool:
        """Whether these are columns of a row, of this kind or another."""
        return self.find(columns) is not None or _others(columns) is not None

    def needed(self, columns: Sequence[str]) -> list[str]:
        """The columns of a table that may be used, or that may cause a row to be refused."""
        names = self.renamed(columns)
        used = {c for one in self.formats.values() if {*names}.issuperset(one.required) for c in one.used}
        used.update((*self.meaning, *WEIGHTS, *DROPPED, "split", *(JUDGED if self.meaning else ())))
        return [
            column
            for column, name in zip(columns, names)
            if name in used or self._on_learning(name, "?") or _scores(name)
        ]

    def _on_learning(self, name: str, value: Any) -> bool:
        return bool(self.meaning) and name not in (*WEIGHTS, *DROPPED) and is_on_learning(name, value)

    def convert(self, place: str, row: Any) -> Any:
        """The item of a row, or a `BadRow`."""
        if self.settings.mapping:
            if line := self.missing(row):
                return BadRow(NO_COLUMN, f"{place}: {line}")
            row = dict(zip(self.renamed([*row]), row.values()))
        found = self.find(name for name, value in row.items() if value is not None) or self.find(row)
        if found is None:
            return self.no_format(place, row)
        try:
            self._expect_nothing_lost(row, found)
            value = found.convert(row)
            used = (*found.used, *WEIGHTS, *DROPPED)
            unused = [key for key, cell in row.items() if key not in used and not is_empty(cell)]
            if self._is_this_split(row.get("split")):
                unused.remove("split")
        except RowError as error:
            line = f"{place}: {error}"
            for ours, (_, theirs) in self.settings.mapping.items():
                line = line.replace(f"column {ours!r}", f"column {theirs!r}")
            of_this_kind = error.reason not in (NO_COLUMN, NO_LABEL)
            return BadRow(error.reason, line, harmless=error.harmless, has_columns=of_this_kind)
        except RecursionError:
            return BadRow("not as expected", f"{place}: objects within objects, too deep to be read")
        self.unused.update(unused)
        return self._placed(value, place)

    def no_format(self, place: str, columns: Iterable[str], rows: int = 1) -> BadRow:
        """The `BadRow` if no format fits: names the columns and the setting that maps them."""
        talks = [name for name, value in columns.items() if _are_messages(value)] if isinstance(columns, dict) else []
        columns = [*columns]
        there = ", ".join(map(repr, columns)) or "none"
        wanted = next(iter(self.formats.values())).required
        line = f"no column {' and '.join(map(repr, wanted))}; there are: {there}"
        if len(self.formats) > 2:
            line = f"no column {' and '.join(map(repr, wanted))}, nor others that make {self.what}; there are: {there}"
        other = _others(columns)
        if other is None and talks:
            reader = "" if self.what == _TALKS[0] else f"; these are {_TALKS[0]}: {_TALKS[1]}"
            return BadRow(
                NO_COLUMN, f"{place}: {line}{reader}; data.columns names them: {{messages: {talks[0]}}}", rows
            )
        if other is not None and other[0] != self.what:
            return BadRow(NO_COLUMN, f"{place}: {line}; these are {other[0]}: {other[1]}", rows)
        example = next((self.formats[name].required for name in EXAMPLES if name in self.formats), wanted)
        mapped = ", ".join(f"{ours}: {theirs}" for ours, theirs in zip(example, [*columns, *"…" * len(example)]))
        return BadRow(NO_COLUMN, f"{place}: {line}; data.columns names them, such as {{{mapped}}}", rows)

    def _expect_nothing_lost(self, row: Row, found: RowFormat) -> None:
        split = row.get("split")
        if isinstance(split, str) and split.strip().lower() in SPLITS and not self._is_this_split(split):
            raise RowError(f"column 'split' says {split}; set split to read it", f"of split {split}", harmless=True)
        for name, value in row.items():
            if name in found.used or is_empty(value):
                continue
            said = judgement(value)
            if (name in WEIGHTS and said is False) or (name in DROPPED and said):
                raise RowError(
                    f"column {name!r} says {shown(value)}: not to be learned", "not to be learned", harmless=True
                )
            if self.meaning and name in WEIGHTS and not said:
                raise RowError(f"column {name!r}: weight {shown(value)}; expected 1 or 0", f"column {name!r}")
            if name in self.meaning or self._on_learning(name, value):
                raise RowError(
                    f"column {name!r} changes the meaning of the row and is not read; remove it", f"column {name!r}"
                )
            if self.what == "conversations" and name in JUDGED and _is_a_label(name, value):
                mapped = "" if name in LABELS else f" with data.columns: {{label: {name}}}"
                hint = f"objective: kto (prepare --judged){mapped}"
                raise RowError(f"column {name!r} labels the answer good or bad: {hint}", "labelled answers")

    def _is_this_split(self, split: Any) -> bool:
        wanted = SPLITS.get(self.settings.split.lower(), self.settings.split)
        return isinstance(split, str) and SPLITS.get(split.strip().lower(), split) == wanted

    def _placed(self, value: Any, place: str) -> Any:
        parts = [value] if isinstance(value, str | list) else [*value]  # a pair or a judged answer
        for part in parts:
            if isinstance(part, Conversation):
                part.place = place
                self.unused.update(f"{key!r} of messages" for key in part.unused)
        return value if isinstance(value, str | list) else value._replace(place=place)


def _scores(name: str) -> bool:
    """Whether a column may say which of two answers is better."""
    return name.endswith(("_score", "_rating", "-rating", "_reward")) or name.startswith("score_")


def _is_a_label(name: str, value: Any) -> bool:
    """Whether a value looks like a judgement; a rating of 1 may be out of five."""
    return (judgement(value) is not None and (name in LABELS or value != 1)) or value in (-1, "-1")


EXAMPLES = ("text", "preference", "prompt-completion-label", "prompt-completion")  # shown in an error message
_PAIRS, _TALKS = (
    ("pairs of answers", "objective: dpo, or prepare --pairs"),
    ("conversations", "objective: sft, or prepare --chat"),
)
# Columns → what they are, and what reads them.
OTHERS: dict[tuple[str, ...], tuple[str, str]] = {
    ("chosen", "rejected"): _PAIRS,
    ("response_j", "response_k"): _PAIRS,
    ("rejected_response",): _PAIRS,
    **dict.fromkeys(((name,) for name in CHATS), _TALKS),
    **dict.fromkeys(EXCHANGES.values(), _TALKS),
    ("text",): ("texts", "objective: pretrain"),
}


def _others(columns: Iterable[str]) -> tuple[str, str] | None:
    return next((hint for named, hint in OTHERS.items() if {*named} <= {*columns}), None)


def _are_messages(value: Any) -> bool:
    """Whether a value is a list of objects with roles."""
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(isinstance(turn, dict) and not turn.keys().isdisjoint(ROLE) for turn in value)


def text_formats(settings: SourceSettings, unused: Counter[str]) -> RowFormats:
    """The formats of text."""
    return RowFormats(
        "texts",
        {
            "text": RowFormat(("text",), lambda row: text_in(row, "text")),
            # nampdn-ai/tiny-codes
            "prompt-response": RowFormat(("prompt", "response"), _asked_and_said, (*SYSTEM, *CONTEXT, HISTORY)),
        },
        settings,
        (),
        unused,
    )


def _asked_and_said(row: Row) -> str:
    if name := next((name for name in (*SYSTEM, *CONTEXT, HISTORY) if not is_empty(row.get(name))), None):
        raise RowError(
            f"column {name!r} belongs to a conversation: set objective: sft, or remove it", f"column {name!r}"
        )
    return f"{text_in(row, 'prompt')}\n\n{text_in(row, 'response')}"


def chat_formats(settings: SourceSettings, unused: Counter[str]) -> RowFormats:
    """The formats of `Conversation`s."""
    return RowFormats("conversations", spoken(), settings, MEANING, unused)


def spoken() -> dict[str, RowFormat]:
    """The formats of conversations: lists of messages, and a question with its answer."""
    around = (*SYSTEM, *TOOLS)
    chats = {name: RowFormat((name,), functools.partial(_talk, column=name), around) for name in CHATS}
    exchanges = {
        name: RowFormat(
            columns,
            functools.partial(exchange, asked=columns[0], answer=columns[1]),
            (*around, *REASONING, HISTORY, *(context for context in CONTEXT if context not in columns)),
        )
        for name, columns in EXCHANGES.items()
    }
    return chats | exchanges


def _talk(row: Row, column: str) -> Conversation:
    messages = introduced(row, conversation(messages_in(row, column), the_one(row, TOOLS, tools_in), column))
    if "chosen" in row and "rejected" in row and messages and messages[-1]["role"] != "assistant":
        raise RowError("columns 'chosen' and 'rejected' hold the answers: objective: dpo", "pairs of answers")
    return checked(messages)


def exchange(row: Row, asked: str, answer: str) -> Conversation:
    turns = messages_in(row, answer) if isinstance(row[answer], list) else said(row, answer)
    reasoning = the_one(row, REASONING)
    if not is_empty(reasoning):
        turns = [*turns[:-1], {**turns[-1], "reasoning_content": reasoning}]
    return checked(introduced(row, conversation([*question(row, asked), *turns], the_one(row, TOOLS, tools_in), asked)))


def question(row: Row, column: str) -> list[Message]:
    """The messages of a row's question, with its history before it and its context in it."""
    if isinstance(row[column], list):
        return messages_in(row, column)
    asked = [text_in(row, column)]
    asked += [text_in(row, name) for name in CONTEXT if name != column and not is_empty(row.get(name))]
    history = [] if is_empty(row.get(HISTORY)) else from_json(row[HISTORY], HISTORY)
    before = []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError(f"expected in column {HISTORY!r} a list of [question, answer], found {shown(pair)}")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*before, {"role": "user", "content": "\n\n".join(asked)}]


def introduced(row: Row, messages: Conversation) -> Conversation:
    """The messages, with the row's system prompt first."""
    column = next((name for name in SYSTEM if not is_empty(row.get(name))), None)
    if column is None:
        return messages
    the_one(row, SYSTEM)
    prompt = {"role": "system", "content": text_in(row, column)}
    if not messages or messages[0]["role"] != "system":
        messages.insert(0, prompt)
    elif messages[0]["content"].strip() != prompt["content"].strip():
        raise RowError(f"column {column!r} and the first message are two system prompts: drop one")
    return messages


def said(row: Row, column: str) -> list[Message]:
    return [{"role": "assistant", "content": text_in(row, column)}]


def text_in(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"expected text in column {column!r}, found {kind_of_value(value)}")
    return value


def messages_in(row: Row, column: str) -> list[Message]:
    value = row[column]
    if isinstance(value, str) and value.lstrip().startswith("["):  # JSON in a text column
        value = from_json(value, f"column {column!r}")
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        found = f"a list of {len(value)}" if isinstance(value, list) else kind_of_value(value)
        raise RowError(f"expected in column {column!r} a list of messages such as {EXAMPLE}, found {found}")
    return value
