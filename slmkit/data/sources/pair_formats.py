"""Row formats of public preference sets: a better and a worse answer, or one answer labelled good or bad."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

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
    introduced,
    messages_in,
    question,
    said,
    spoken,
)
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.sources.turns import (
    TOOLS,
    RowError,
    checked,
    conversation,
    is_empty,
    judgement,
    shown,
    the_one,
    tools_in,
)

QUESTIONS = ("prompt", "question", "instruction", "query", *CHATS)
ANSWERS = {"chosen": "rejected", "response_j": "response_k", "chosen_response": "rejected_response"}  # better: worse
TURNS = ("\n\nHuman:", "\n\nAssistant:")  # beginnings of turns in a dialogue given as one text
RANKED = ("answers", "completions", "responses", "generations")
ANSWER = ("response", "answer", "text", "content", "completion", "output")  # of a ranked answer
SCORES = ("overall_score", "score", "pm_score", "rating")  # of a ranked answer; the highest is the best
NUMBERED = ("response_0", "response_1", "better_response_id")  # PKU-Alignment/PKU-SafeRLHF
LONG_PROMPT = 20  # characters; a shorter prompt (`Hello`) may be the beginning of both answers by chance
REJECTED = "rejected_response"  # next to a conversation that ends with the better answer (ms-swift)


class Pair(NamedTuple):
    """Two conversations, the better one first, whose first `shared` messages are the same. `place`: where it was read.

    `prompt_removed`: both answers began with the prompt, which was removed.
    """

    chosen: list[Message]
    rejected: list[Message]
    shared: int
    place: str = ""
    prompt_removed: bool = False

    @property
    def sides(self) -> tuple[list[Message], list[Message]]:
        return self.chosen, self.rejected


class Judged(NamedTuple):
    """A conversation whose last answer was judged good (`label` True) or bad. `place`: where it was read."""

    messages: list[Message]
    label: bool
    place: str = ""


def pair_of(chosen: list[Message], rejected: list[Message]) -> Pair:
    """The pair. Raises `RowError` if the two answer different questions, or are the same."""
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
            raise RowError(f"{name} does not end with a message of the assistant")
    for side in (chosen, rejected):
        if all(message.get("weight") == 0 for message in side[shared:] if message["role"] == "assistant"):
            raise RowError("an answer is not to be learned", "not to be learned", harmless=True)
    return Pair(chosen, rejected, shared)


def pair_formats(settings: SourceSettings, unused: Counter[str]) -> RowFormats:
    """The formats of pairs.

    Answers are texts, a message or messages, to a question that is a text or messages; or whole conversations
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
    formats["numbered"] = RowFormat(("prompt", *NUMBERED), _numbered, beside)
    for name, found in spoken().items():
        convert = functools.partial(_with_rejected, convert=found.convert)
        formats[f"{name}-{REJECTED}"] = RowFormat((*found.required, REJECTED), convert, found.optional)
    for column in RANKED:
        convert = functools.partial(_ranked, column=column)
        formats[f"ranked {column}"] = RowFormat((column,), convert, (*QUESTIONS, *beside))
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
    answers = _without_prompt(row[asked], row[better], row[worse]) if asked is not None else []
    row = {**row, **dict(zip((better, worse), answers))}
    pair = pair_of(*(_side(row, name, before) for name in (better, worse)))
    return pair._replace(prompt_removed=bool(answers))


def _without_prompt(prompt: Any, *answers: Any) -> list[str]:
    """The answers without the prompt that both begin with in trl's old files; empty if they do not."""
    if not (isinstance(prompt, str) and len(prompt.strip()) >= LONG_PROMPT):
        return []
    if any(not isinstance(answer, str) or _dialogue(answer) or not answer.startswith(prompt) for answer in answers):
        return []
    rest = [answer.removeprefix(prompt).strip() for answer in answers]
    return rest if all(rest) else []


def _outputs(row: Row) -> Pair:
    answers = row["output"]
    if not (isinstance(answers, list) and len(answers) == 2):
        raise RowError("expected in column 'output' a list of two answers, the better one first", NO_COLUMN)
    return _chosen_and_rejected(row, "instruction", *answers)


def _chosen_and_rejected(row: Row, asked: str, better: Any, worse: Any) -> Pair:
    return _pair({**row, "chosen": better, "rejected": worse}, asked, "chosen", "rejected")


def _numbered(row: Row) -> Pair:
    is_second = judgement(row["better_response_id"])
    if is_second is None:
        raise RowError(f"expected 0 or 1 in column 'better_response_id', found {shown(row['better_response_id'])}")
    answers = row["response_0"], row["response_1"]
    return _chosen_and_rejected(row, "prompt", *(reversed(answers) if is_second else answers))


def _with_rejected(row: Row, convert: Callable[[Row], Conversation]) -> Pair:
    chosen = convert(row)
    rejected = Conversation([*chosen[:-1], *said(row, REJECTED)], tools=chosen.tools)
    return pair_of(chosen, checked(rejected))


def _ranked(row: Row, column: str) -> Pair:
    """The best answer and the worst one."""
    answers = row[column] if isinstance(row[column], list) else []
    keys = {key for answer in answers if isinstance(answer, dict) for key in answer}
    if not any(word in str(key) for key in (*keys, *row) for word in ("score", "rank", "rating")) or not answers:
        raise RowError("no column 'chosen' and 'rejected', nor others that make pairs of answers", NO_COLUMN)
    asked = next((name for name in QUESTIONS if not is_empty(row.get(name))), None)
    text = next((name for name in ANSWER if name in keys), None)
    values: dict[str, list[Any]] = {
        name: [_score(answer, name) for answer in answers] for name in (*SCORES, "rank") if name in keys
    }
    score, scores = next(iter(values.items()), ("", list[Any]([None])))
    if asked is None or text is None or None in scores:
        raise RowError(
            f"column {column!r} holds ranked answers that are not objects with a text ({', '.join(ANSWER)}) and a "
            f"score ({', '.join(SCORES)}, rank): make columns 'prompt', 'chosen' and 'rejected' of them",
            "ranked answers",
        )
    for number, answer in enumerate(answers, start=1):
        if the_one(answer, ANSWER) is None or answer.get(text) is None:
            raise RowError(f"answer {number} in column {column!r} has no {text!r}, which others have")
    for name, others in values.items():
        pairs = itertools.permutations(zip(scores, others), 2)
        if any(None not in (c, d) and a > b and c < d for (a, c), (b, d) in pairs):
            raise RowError(
                f"{score!r} and {name!r} of the answers in column {column!r} contradict each other: drop one"
            )
    order = sorted(range(len(scores)), key=lambda place: scores[place], reverse=True)
    if scores[order[0]] == scores[order[-1]]:
        raise RowError(f"the answers in column {column!r} have one score, so that none is better", "equal scores")
    return _chosen_and_rejected(row, asked, *(answers[place].get(text) for place in (order[0], order[-1])))


def _score(answer: Any, name: str) -> Any:
    """A number that is higher for a better answer; None if the answer has none."""
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, int | float) or found != found:
        return None
    return -found if name == "rank" else found


def _side(row: Row, column: str, before: list[Message]) -> Conversation:
    """One answer with the messages before it."""
    value = row[column]
    if isinstance(value, dict):
        row, value = {**row, column: [value]}, [value]
    turns = _dialogue(value) or (said(row, column) if isinstance(value, str) else messages_in(row, column))
    try:
        answer = conversation(turns, the_one(row, TOOLS, tools_in), column)
        if before and answer[0]["role"] == "assistant":
            answer = conversation([*before, *turns], the_one(row, TOOLS, tools_in), column)
        return checked(introduced(row, answer))
    except RowError as error:
        raise RowError(f"{column}: {error}", error.reason) from None


def _dialogue(value: object) -> list[Message]:
    """The messages of a text such as `\\n\\nHuman: …\\n\\nAssistant: …` (Anthropic/hh-rlhf); empty for others."""
    if not (isinstance(value, str) and value.startswith(TURNS)):
        return []
    _, *parts = re.split(f"({'|'.join(TURNS)})", value)
    turns = zip(parts[::2], parts[1::2])
    messages = [{"role": "user" if turn == TURNS[0] else "assistant", "content": said.strip()} for turn, said in turns]
    return messages if messages[-1]["content"] else messages[:-1]  # a prompt may end where the answer begins


def kto_formats(settings: SourceSettings, unused: Counter[str]) -> RowFormats:
    """The formats of judged answers: a conversation in any format of `chat_formats`.

    The label is a bool in a column `label` (trl) or `kto_tag` (LLaMA-Factory).
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
        raise RowError("the conversation does not end with a message of the assistant")
    return Judged(messages, label)
