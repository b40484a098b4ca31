"""Exact-match accuracy on questions with one right answer, asked as conversations or as text that goes on."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmkit.config import UserError
from slmkit.generation.engine import Engine, Event, Request
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
    ends, given = end_tokens(tokenizer), list[str | None]([None] * len(prompts))
    asked = dict[int, Request]()
    for number, (prompt, room) in enumerate(zip(prompts, rooms)):
        if (room := min(room, decoder.max_positions - len(prompt))) >= 1:
            asked[number] = Request(prompt, room, settings[number], ends)
    running = {*asked}
    for key, event in run(Engine(decoder, tokenizer, max_rows=MAX_ROWS), asked):
        given[key] = (given[key] or "") + event.text
        if event.finish_reason:
            running.discard(key)
            progress(len(asked) - len(running), len(asked))
        if running and time.monotonic() >= until and min(running) >= LEAST_ASKED:
            break
    return given[: min(running, default=len(prompts))]


def run(engine: Engine, requests: Mapping[int, Request]) -> Iterator[tuple[int, Event]]:
    """The events of all requests, with their keys. Raises `UserError` for logits that are not finite."""
    handles = {engine.insert(request): key for key, request in requests.items()}
    try:
        while engine.is_busy:
            for event in engine.step():
                if event.error:
                    raise UserError(event.error)
                yield handles[event.handle], event
    finally:  # after an error, or if the caller has stopped
        for handle in [*handles] if engine.is_busy else list[int]():
            engine.remove(handle)
