"""What the rows of public preference sets mean: a better and a worse answer, or one that is labelled good or bad."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from slmkit.data.source_settings import SourceSettings
from slmkit.data.sources.documents import Conversation, Message
from slmkit.data.sources.row_formats import (
    CHATS,
    CONTEXT,
    HISTORY,
    LABELS,
    MEANING,
    NO_COLUMN,
    NO_LABEL,
    SYSTEM,
    Row,
    RowFormat,
    RowFormats,
    first_of,
    introduced,
    messages_in,
    question,
    said,
    spoken,
)
from slmkit.data.sources.turns import TOOLS, RowError, checked, conversation, is_empty, judgement, shown

QUESTIONS = ("prompt", "question", "instruction", "query", *CHATS)
ANSWERS = {"chosen": "rejected", "response_j": "response_k", "chosen_response": "rejected_response"}  # better: worse
TURNS = ("\n\nHuman:", "\n\nAssistant:")  # how a dialogue in one text begins its turns
RANKED = ("answers", "completions", "responses", "generations")


class Pair(NamedTuple):
    """Two conversations that begin alike, for `shared` messages; the better one first. `place` is where it was read."""

    chosen: list[Message]
    rejected: list[Message]
    shared: int
    place: str = ""

    @property
    def sides(self) -> tuple[list[Message], list[Message]]:
        return self.chosen, self.rejected


class Judged(NamedTuple):
    """A conversation whose last answer was judged good (`label` True) or bad. `place` is where it was read."""

    messages: list[Message]
    label: bool
    place: str = ""


def pair_of(chosen: list[Message], rejected: list[Message]) -> Pair:
    """Raises `RowError` where the two do not answer one question, or say the same."""
    shared = 0
    for better, worse in zip(chosen, rejected):
        if better != worse:
            break
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise RowError("chosen and rejected are the same")
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise RowError("chosen and rejected do not answer the same question")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) == shared or side[-1]["role"] != "assistant":
            raise RowError(f"{name} does not end with an answer of the assistant's")
    for side in (chosen, rejected):
        if all(message.get("weight") == 0 for message in side[shared:] if message["role"] == "assistant"):
            raise RowError("an answer is not to be learned", "not to be learned", harmless=True)
    return Pair(chosen, rejected, shared)


def pair_formats(settings: SourceSettings, unused: Counter[str]) -> RowFormats:
    """From rows to pairs.

    Answers are texts, a message or messages, behind a question that is a text or messages; or whole conversations
    (HuggingFaceH4/ultrafeedback_binarized, mlabonne/orpo-dpo-mix-40k, trl's explicit and implicit prompts).
    """
    beside = (*SYSTEM, *TOOLS, HISTORY, *CONTEXT)
    formats = {
        _name(asked, better): RowFormat(
            (asked, better, worse), functools.partial(_pair, asked=asked, better=better, worse=worse), beside
        )
        for better, worse in ANSWERS.items()
        for asked in QUESTIONS
    }
    formats["whole"] = RowFormat(
        ("chosen", "rejected"), functools.partial(_pair, asked=None, better="chosen", worse="rejected"), beside[:-3]
    )
    formats["outputs"] = RowFormat(("instruction", "output"), _outputs, beside)  # the better one first
    for column in RANKED:
        formats[f"ranked {column}"] = RowFormat((column,), functools.partial(_ranked, column=column))
    return RowFormats("pairs of answers", formats, settings, MEANING, unused)


def _name(asked: str, better: str) -> str:
    return {"prompt": "preference"}.get(asked, asked) if better == "chosen" else f"{asked}-{better}"


def _pair(row: Row, asked: str | None, better: str, worse: str) -> Pair:
    for form in ("score_{}", "{}_score", "{}_rating", "{}-rating", "{}_reward"):
        scores = [row.get(form.format(name)) for name in (better, worse)]
        if all(isinstance(score, int | float) for score in scores) and scores[0] < scores[1]:  # type: ignore[operator]
            found = f"{form.format(better)} {scores[0]} is less than {form.format(worse)} {scores[1]}"
            raise RowError(f"{found}: the pair is the wrong way round", "pairs the wrong way round by their scores")
    before = [] if asked is None or is_empty(row[asked]) else _dialogue(row[asked]) or question(row, asked)
    return pair_of(*(_side(row, name, before) for name in (better, worse)))


def _outputs(row: Row) -> Pair:
    answers = row["output"]
    if not (isinstance(answers, list) and len(answers) == 2):
        raise RowError("expected in column 'output' a list of two answers, the better one first", NO_COLUMN)
    before = question(row, "instruction")
    return pair_of(*(_side({**row, name: one}, name, before) for name, one in zip(("chosen", "rejected"), answers)))


def _ranked(row: Row, column: str) -> Pair:
    answers = row[column] if isinstance(row[column], list) else []
    keys = {key for answer in answers if isinstance(answer, dict) for key in answer}
    if not any(word in str(key) for key in (*keys, *row) for word in ("score", "rank", "rating")) or not answers:
        raise RowError("no column 'chosen' and 'rejected', nor others that make pairs of answers", NO_COLUMN)
    raise RowError(
        f"column {column!r} holds ranked answers: make pairs of chosen and rejected of them", "ranked answers"
    )


def _side(row: Row, column: str, before: list[Message]) -> Conversation:
    """One answer with all before it."""
    value = row[column]
    if isinstance(value, dict):
        row, value = {**row, column: [value]}, [value]
    turns = _dialogue(value) or (said(row, column) if isinstance(value, str) else messages_in(row, column))
    try:
        answer = conversation(turns, first_of(row, TOOLS), column)
        if before and answer[0]["role"] == "assistant":
            answer = conversation([*before, *turns], first_of(row, TOOLS), column)
        return checked(introduced(row, answer))
    except RowError as error:
        raise RowError(f"{column}: {error}", error.reason) from None


def _dialogue(value: object) -> list[Message]:
    """The messages of a text such as `\\n\\nHuman: …\\n\\nAssistant: …` (Anthropic/hh-rlhf); of any other text none."""
    if not (isinstance(value, str) and value.startswith(TURNS)):
        return []
    _, *parts = re.split(f"({'|'.join(TURNS)})", value)
    turns = zip(parts[::2], parts[1::2])
    messages = [{"role": "user" if turn == TURNS[0] else "assistant", "content": said.strip()} for turn, said in turns]
    return messages if messages[-1]["content"] else messages[:-1]  # a question may end where the answer begins


def kto_formats(settings: SourceSettings, unused: Counter[str]) -> RowFormats:
    """From rows to judged answers: a conversation in any format of `chat_formats`.

    Its label is a bool in a column `label` (trl) or `kto_tag` (LLaMA-Factory).
    """
    formats = {
        f"{name}-{label}": RowFormat(
            (*found.required, label),
            functools.partial(_judged, convert=found.convert, column=label),
            (*found.optional, *LABELS),
        )
        for label in LABELS
        for name, found in spoken().items()
    }
    return RowFormats("judged answers", formats, settings, MEANING, unused)


def _judged(row: Row, convert: Callable[[Row], Conversation], column: str) -> Judged:
    label = judgement(row[column])
    if label is None:
        raise RowError(
            f"expected true or false (1 or 0, good or bad) in column {column!r}, found {shown(row[column])}", NO_LABEL
        )
    if any(judgement(row[name]) is not label for name in LABELS if not is_empty(row.get(name))):
        raise RowError(f"columns {' and '.join(map(repr, LABELS))} contradict each other", "contradicting labels")
    messages = convert(row)
    if messages[-1].get("weight") == 0:
        raise RowError("its answer is not to be learned", "not to be learned", harmless=True)
    if messages[-1]["role"] != "assistant":
        raise RowError("the conversation does not end with an answer of the assistant's")
    return Judged(messages, label)
