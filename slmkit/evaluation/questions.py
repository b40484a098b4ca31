"""Exact-match accuracy on questions with one right answer, asked as conversations or as text that goes on."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmkit.config import UserError
from slmkit.generation.engine import Engine, Request
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.text import end_tokens, prompt_ids
from slmkit.tokenizer import SLMTokenizer

Messages = Sequence[Mapping[str, Any]]
Progress = Callable[[int, int], None]  # requests done, all requests
LEAST_ASKED = 5
MAX_ROWS = 64  # texts that run at the same time
FIRST_SENTENCE = re.compile(r"\s*[^.!?]*[.!?]?")


@dataclass(frozen=True)
class Answer:
    """A question, its expected answer and the model's answer; None if the model's context had no room for it."""

    question: str
    expected: str
    given: str | None

    @property
    def is_right(self) -> bool:
        return self.given is not None and self.given.strip() == self.expected.strip()


@dataclass(frozen=True)
class QuestionReport:
    answers: tuple[Answer, ...]

    @property
    def share_right(self) -> float:
        return sum(answer.is_right for answer in self.answers) / len(self.answers)

    @property
    def standard_error(self) -> float:
        """Standard error of the share (binomial)."""
        return (self.share_right * (1 - self.share_right) / len(self.answers)) ** 0.5


def ask(
    decoder: LanguageModel,
    tokenizer: SLMTokenizer,
    questions: Sequence[tuple[Messages | str, str]],
    until: float = math.inf,
    progress: Progress = lambda done, requests: None,
) -> QuestionReport:
    """Generate answers greedily, many at once, and compare them word for word.

    `questions`: messages, or text that the answer continues (of what the model writes its first sentence counts), and
    the expected answer. After `until` (`time.monotonic`) only the first few are asked. Raises `UserError` for logits
    that are not finite.
    """
    prompts = [
        prompt_ids(tokenizer, asked)
        if isinstance(asked, str)
        else tokenizer.encode_chat(asked, add_generation_prompt=True).ids
        for asked, _ in questions
    ]
    rooms = [2 * len(tokenizer.encode(expected)) + 8 for _, expected in questions]
    settings = [SamplingSettings(do_sample=False)] * len(questions)
    given = write_all(decoder, tokenizer, prompts, rooms, settings, until, progress)
    answers = []
    for (asked, expected), answer in zip(questions, given):  # fewer if the time is up
        if not isinstance(asked, str):
            answers.append(Answer(asked[-1]["content"], expected, answer))
            continue
        first = None if answer is None else FIRST_SENTENCE.match(answer)
        answers.append(Answer(asked, expected, first and first[0]))
    return QuestionReport(tuple(answers))


def write_all(
    decoder: LanguageModel,
    tokenizer: SLMTokenizer,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    settings: Sequence[SamplingSettings],
    until: float = math.inf,
    progress: Progress = lambda done, requests: None,
) -> list[str | None]:
    """Continue all prompts at the same time, each by at most as many tokens as `rooms` says.

    None for a prompt that fills the context. After `until` the texts that are finished, without a gap: short ones are
    not chosen over long ones. Raises `UserError` for logits that are not finite.
    """
    engine, ends = Engine(decoder, tokenizer, max_rows=MAX_ROWS), end_tokens(tokenizer)
    handles: dict[int, int] = {}
    for number, (prompt, room) in enumerate(zip(prompts, rooms)):
        room = min(room, decoder.max_positions - len(prompt))
        if room >= 1:
            handles[engine.insert(Request(prompt, room, settings[number], ends))] = number
    given: list[str | None] = [None] * len(prompts)
    running = set(handles.values())
    while running and (time.monotonic() < until or min(running) < LEAST_ASKED):
        for event in engine.step():
            if event.error:
                raise UserError(event.error)
            number = handles[event.handle]
            given[number] = (given[number] or "") + event.text
            if event.finish_reason:
                running.discard(number)
        progress(len(handles) - len(running), len(handles))
    return given[: min(running, default=len(prompts))]
