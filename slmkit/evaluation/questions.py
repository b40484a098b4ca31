"""Exact-match accuracy on questions with one right answer, asked as conversations."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmkit.config import UserError
from slmkit.generation.engine import Engine, Request
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.text import end_tokens
from slmkit.tokenizer import SLMTokenizer

Messages = Sequence[Mapping[str, Any]]
LEAST_ASKED = 5


@dataclass(frozen=True)
class Answer:
    """A question, its expected answer and the model's answer."""

    question: str
    expected: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given.strip() == self.expected.strip()


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
    questions: Sequence[tuple[Messages, str]],
    until: float = math.inf,
) -> QuestionReport:
    """Generate answers greedily, many at once, and compare them. `questions`: messages and the expected answer of each.

    After `until` (`time.monotonic`) only the first few are asked. Raises `UserError` for logits that are not finite.
    """
    engine, greedy, ends = Engine(decoder, tokenizer), SamplingSettings(do_sample=False), end_tokens(tokenizer)
    handles: dict[int, int] = {}
    for number, (messages, expected) in enumerate(questions):
        prompt = tokenizer.encode_chat(messages, add_generation_prompt=True).ids
        room = min(2 * len(tokenizer.encode(expected)) + 8, decoder.max_positions - len(prompt))
        if room >= 1:  # else the answer is empty, and counts as wrong
            handles[engine.insert(Request(prompt, room, greedy, ends))] = number
    given, unanswered = [""] * len(questions), set(handles.values())
    while unanswered and (time.monotonic() < until or min(unanswered) < LEAST_ASKED):
        for event in engine.step():
            if event.error:
                raise UserError(event.error)
            given[handles[event.handle]] += event.text
            if event.finish_reason:
                unanswered.discard(handles[event.handle])
    asked = min(unanswered, default=len(questions))  # short answers are not chosen over long ones
    return QuestionReport(
        tuple(
            Answer(messages[-1]["content"], expected, answer)
            for (messages, expected), answer in zip(questions[:asked], given)
        )
    )
