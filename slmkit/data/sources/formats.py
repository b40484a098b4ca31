"""The formats of rows in public data sets: which columns make a text, a conversation, a pair or a judged answer.

`docs/sources.md` has the table.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from slmkit.config import kind_of_value
from slmkit.data.sources.documents import WORDS, Conversation, Judged, Message, Pair, RowError
from slmkit.data.sources.turns import (
    EXAMPLE,
    MEDIA,
    REASONING,
    TOOLS,
    checked,
    conversation,
    from_json,
    is_empty,
    judgement,
    shown,
    the_one,
    tools_in,
)

RowDict = dict[str, Any]
NO_COLUMN = "no such column"  # reason for rows whose columns fit no format
NO_LABEL = "no label"  # for rows whose label is neither true nor false
SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = "history"  # earlier exchanges: a list of [question, answer]
CONTEXT = ("input", "context")  # what a question is about
LABELS = ("label", "kto_tag")
CHATS = ("messages", "conversations", "conversation", "dialogue")
EXCHANGES: dict[str, list[str]] = WORDS["exchanges"]  # question and answer columns, in order of precedence
# Columns that change a conversation: refused if a format does not use them.
MEANING = (
    *TOOLS, *SYSTEM, HISTORY, *REASONING, *MEDIA, "tool_calls", "chat_template", "chat_template_kwargs", "inputs",
    "options", "choices", "rejected_response",
)  # fmt: skip
QUESTIONS = ("prompt", "question", "instruction", "query", *CHATS)  # of pairs
ANSWERS = {"chosen": "rejected", "response_j": "response_k", "chosen_response": "rejected_response"}  # better: worse
SCORED = ("score_{}", "{}_score", "{}_rating", "{}-rating", "{}_reward")  # columns with the scores of these
TURNS = ("\n\nHuman:", "\n\nAssistant:")  # beginnings of turns in a dialogue given as one text
RANKED = ("answers", "completions", "responses", "generations")
ANSWER = ("response", "answer", "text", "content", "completion", "output")  # of a ranked answer
SCORES = ("overall_score", "score", "pm_score", "rating")  # of a ranked answer; the highest is the best
LONG_PROMPT = 20  # characters; a shorter prompt (`Hello`) may be the beginning of both answers by chance
REJECTED = "rejected_response"  # next to a conversation that ends with the better answer (ms-swift)


class RowFormat(NamedTuple):
    """Required and optional columns, and the conversion of a row, by `function(row, *required)`."""

    required: tuple[str, ...]
    function: Callable[..., Any]
    optional: tuple[str, ...] = ()

    def convert(self, row: RowDict) -> Any:
        """The item of a row with the required columns. Raises `RowError`."""
        return self.function(row, *self.required)

    @property
    def used(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


def _text(row: RowDict, column: str) -> str:
    if not isinstance(row[column], str):
        raise RowError(f"expected text in column {column!r}, found {kind_of_value(row[column])}")
    return str(row[column])


def _prompt_and_response(row: RowDict, *columns: str) -> str:
    if name := next((name for name in (*SYSTEM, *CONTEXT, HISTORY) if not is_empty(row.get(name))), None):
        line = f"column {name!r} belongs to a conversation: set objective: sft, or remove it"
        raise RowError(line, f"column {name!r}")
    return "\n\n".join(_text(row, column) for column in columns)


def _talk(row: RowDict, column: str) -> Conversation:
    turns = _messages(row, column)
    has_pair = "chosen" in row and "rejected" in row
    if has_pair and conversation(turns, column=column)[-1]["role"] != "assistant":
        raise RowError("columns 'chosen' and 'rejected' hold the answers: objective: dpo", "pairs of answers")
    return _conversation(row, turns, column)


def _exchange(row: RowDict, asked: str, answer: str) -> Conversation:
    turns = _messages(row, answer) if isinstance(row[answer], list) else _said(row, answer)
    reasoning = the_one(row, REASONING)
    if not is_empty(reasoning):
        turns = [*turns[:-1], {**turns[-1], "reasoning_content": reasoning}]
    return _conversation(row, [*_question(row, asked), *turns], asked)


def _question(row: RowDict, column: str) -> list[Message]:
    """The messages of a row's question, with its history before it and its context in it."""
    if isinstance(row[column], list):
        return _messages(row, column)
    asked = [_text(row, column)]
    asked += [_text(row, name) for name in CONTEXT if name != column and not is_empty(row.get(name))]
    history = [] if is_empty(row.get(HISTORY)) else from_json(row[HISTORY], HISTORY)
    before = []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError(f"expected in column {HISTORY!r} a list of [question, answer], found {shown(pair)}")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*before, {"role": "user", "content": "\n\n".join(asked)}]


def _said(row: RowDict, column: str) -> list[Message]:
    return [{"role": "assistant", "content": _text(row, column)}]


def _messages(row: RowDict, column: str) -> list[Message]:
    value = row[column]
    if isinstance(value, str) and value.lstrip().startswith("["):  # JSON in a text column
        value = from_json(value, f"column {column!r}")
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        found = f"a list of {len(value)}" if isinstance(value, list) else kind_of_value(value)
        raise RowError(f"expected in column {column!r} a list of messages such as {EXAMPLE}, found {found}")
    return value


def _conversation(row: RowDict, turns: list[Message], column: str) -> Conversation:
    """The turns as messages, with the row's tools, and its system prompt first."""
    messages = conversation(turns, the_one(row, TOOLS, tools_in), column)
    prompt = the_one(row, SYSTEM)
    if not is_empty(prompt):
        name = next(name for name in SYSTEM if not is_empty(row.get(name)))
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": _text(row, name)})
        elif messages[0]["content"].strip() != _text(row, name).strip():
            raise RowError(f"column {name!r} and the first message are two system prompts: drop one")
    return checked(messages)


def pair_of(chosen: list[Message], rejected: list[Message]) -> Pair:
    """The pair. Raises `RowError` if the two answer different questions, or are the same."""
    same = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected))
    shared = len([*same])
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


def _pair(row: RowDict, asked: str | None, better: str, worse: str) -> Pair:
    """The pair of the answers in two columns: texts, a message or messages each, or whole conversations."""
    for form in SCORED:
        scores = [row.get(form.format(name)) for name in (better, worse)]
        if all(isinstance(score, int | float) for score in scores) and scores[0] < scores[1]:  # type: ignore[operator]
            found = f"{form.format(better)} {scores[0]} is less than {form.format(worse)} {scores[1]}"
            raise RowError(f"{found}: the pair is the wrong way round", "pairs the wrong way round by their scores")
    before, rest = [], []
    if asked is not None and not is_empty(row[asked]):
        before = _dialogue(row[asked]) or _question(row, asked)
        rest = _without_prompt(row[asked], row[better], row[worse])
    row = {**row, **dict(zip((better, worse), rest))}
    pair = pair_of(*(_side(row, name, before) for name in (better, worse)))
    return pair._replace(prompt_removed=bool(rest))


def _without_prompt(prompt: Any, *answers: Any) -> list[str]:
    """The answers without the prompt that both begin with in trl's old files; empty if they do not."""
    if not (isinstance(prompt, str) and len(prompt.strip()) >= LONG_PROMPT):
        return []
    if any(not isinstance(answer, str) or _dialogue(answer) or not answer.startswith(prompt) for answer in answers):
        return []
    rest = [answer.removeprefix(prompt).strip() for answer in answers]
    return rest if all(rest) else []


def _side(row: RowDict, column: str, before: list[Message]) -> Conversation:
    """One answer with the messages before it."""
    value = row[column]
    if isinstance(value, dict):
        row = {**row, column: [value]}
    turns = _dialogue(value) or (_said(row, column) if isinstance(value, str) else _messages(row, column))
    try:
        if before and conversation(turns, column=column)[0]["role"] == "assistant":
            turns = [*before, *turns]
        return _conversation(row, turns, column)
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


def _chosen_and_rejected(row: RowDict, asked: str | None, chosen: Any, rejected: Any) -> Pair:
    return _pair({**row, "chosen": chosen, "rejected": rejected}, asked, "chosen", "rejected")


def _outputs(row: RowDict, asked: str, column: str) -> Pair:
    answers = row[column]
    if not (isinstance(answers, list) and len(answers) == 2):
        raise RowError(f"expected in column {column!r} a list of two answers, the better one first", NO_COLUMN)
    return _chosen_and_rejected(row, asked, *answers)


def _numbered(row: RowDict, asked: str, first: str, second: str, better: str) -> Pair:
    is_second = judgement(row[better])
    if is_second is None:
        raise RowError(f"expected 0 or 1 in column {better!r}, found {shown(row[better])}")
    answers = row[first], row[second]
    return _chosen_and_rejected(row, asked, *(reversed(answers) if is_second else answers))


def _with_rejected(talk: RowFormat, row: RowDict, *columns: str) -> Pair:
    chosen: Conversation = talk.convert(row)
    rejected = Conversation([*chosen[:-1], *_said(row, columns[-1])], tools=chosen.tools)
    return pair_of(chosen, checked(rejected))


def _ranked(row: RowDict, column: str) -> Pair:
    """The best answer and the worst one."""
    answers = row[column] if isinstance(row[column], list) else []
    keys = {key for answer in answers if isinstance(answer, dict) for key in answer}
    if not any(word in str(key) for key in (*keys, *row) for word in ("score", "rank", "rating")) or not answers:
        raise RowError("no column 'chosen' and 'rejected', nor others that make pairs of answers", NO_COLUMN)
    asked = next((name for name in QUESTIONS if not is_empty(row.get(name))), None)
    text = next((name for name in ANSWER if name in keys), None)
    ranks = [name for name in (*SCORES, "rank") if name in keys]
    values: dict[str, list[Any]] = {name: [_score(answer, name) for answer in answers] for name in ranks}
    score = next(iter(values), "")
    scores = values.get(score, [None])
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
        both = [(one, other) for one, other in zip(scores, others) if other is not None]
        if any(a > b and c < d for (a, c), (b, d) in itertools.permutations(both, 2)):
            line = f"{score!r} and {name!r} of the answers in column {column!r} contradict each other: drop one"
            raise RowError(line)
    # Of equal scores the first answer is the best, and the last one the worst.
    order = sorted(range(len(scores)), key=lambda place: scores[place], reverse=True)
    if scores[order[0]] == scores[order[-1]]:
        raise RowError(f"the answers in column {column!r} have one score, so that none is better", "equal scores")
    return _chosen_and_rejected(row, asked, answers[order[0]][text], answers[order[-1]][text])


def _score(answer: Any, name: str) -> Any:
    """A number that is higher for a better answer; None if the answer has none."""
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, int | float) or found != found:
        return None
    return -found if name == "rank" else found


def _judged(talk: RowFormat, row: RowDict, *columns: str) -> Judged:
    label = judgement(row[columns[-1]])
    if label is None:
        found = f"in column {columns[-1]!r}, found {shown(row[columns[-1]])}"
        raise RowError(f"expected true or false (1 or 0, good or bad) {found}", NO_LABEL)
    if any(judgement(row[name]) is not label for name in LABELS if not is_empty(row.get(name))):
        raise RowError(f"columns {' and '.join(map(repr, LABELS))} contradict each other", "contradicting labels")
    messages = talk.convert(row)
    if messages[-1].get("weight") == 0:
        raise RowError("its answer is not to be learned", "not to be learned", harmless=True)
    if messages[-1]["role"] != "assistant":
        raise RowError("the conversation does not end with a message of the assistant")
    return Judged(messages, label)


AROUND = (*SYSTEM, *TOOLS)  # a conversation
BESIDE = (*AROUND, HISTORY, *CONTEXT)  # a pair
TEXTS = {
    "text": RowFormat(("text",), _text),
    # nampdn-ai/tiny-codes
    "prompt-response": RowFormat(("prompt", "response"), _prompt_and_response, (*SYSTEM, *CONTEXT, HISTORY)),
}
columns: tuple[str, ...]
CONVERSATIONS = {name: RowFormat((name,), _talk, AROUND) for name in CHATS}
for name, both in EXCHANGES.items():
    columns = (*both,)
    besides = (*REASONING, HISTORY, *(context for context in CONTEXT if context not in columns))
    CONVERSATIONS[name] = RowFormat(columns, _exchange, (*AROUND, *besides))
# HuggingFaceH4/ultrafeedback_binarized, mlabonne/orpo-dpo-mix-40k, trl's explicit and implicit prompts, and others.
PAIRS: dict[str, RowFormat] = {}
for better, worse in ANSWERS.items():
    for asked in QUESTIONS:
        name = "preference" if (asked, better) == ("prompt", "chosen") else f"{asked}-{better}".removesuffix("-chosen")
        PAIRS[name] = RowFormat((asked, better, worse), _pair, BESIDE)
PAIRS["whole"] = RowFormat(("chosen", "rejected"), lambda row, *columns: _pair(row, None, *columns), AROUND)
PAIRS["outputs"] = RowFormat(("instruction", "output"), _outputs, BESIDE)
# PKU-Alignment/PKU-SafeRLHF
PAIRS["numbered"] = RowFormat(("prompt", "response_0", "response_1", "better_response_id"), _numbered, BESIDE)
for name, talk in CONVERSATIONS.items():
    columns = (*talk.required, REJECTED)
    PAIRS[f"{name}-{REJECTED}"] = RowFormat(columns, functools.partial(_with_rejected, talk), talk.optional)
PAIRS |= {f"ranked {name}": RowFormat((name,), _ranked, (*QUESTIONS, *BESIDE)) for name in RANKED}
JUDGED: dict[str, RowFormat] = {}
for label in LABELS:  # a bool in a column `label` (trl) or `kto_tag` (LLaMA-Factory), beside any conversation
    for name, talk in CONVERSATIONS.items():
        columns, besides = (*talk.required, label), (*talk.optional, *LABELS)
        JUDGED[f"{name}-{label}"] = RowFormat(columns, functools.partial(_judged, talk), besides)


class Kind(NamedTuple):
    """A kind of items: what they are, what reads them, and the formats of their rows; the first that fits applies."""

    what: str
    reader: str
    formats: dict[str, RowFormat]

    def find(self, columns: Iterable[str]) -> RowFormat | None:
        """The first format whose columns are all there; None if there is none."""
        present = {*columns}
        return next((one for one in self.formats.values() if present.issuperset(one.required)), None)


KINDS = {
    "pairs": Kind("pairs of answers", "objective: dpo, or prepare --pairs", PAIRS),
    "judgements": Kind("judged answers", "objective: kto, or prepare --judged", JUDGED),
    "conversations": Kind("conversations", "objective: sft, or prepare --chat", CONVERSATIONS),
    "text": Kind("texts", "objective: pretrain", TEXTS),
}
KINDS["questions"] = KINDS["conversations"]
