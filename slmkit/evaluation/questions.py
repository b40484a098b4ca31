"""Exact-match accuracy on questions with one right answer, asked as conversations."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.generator import TextStream
from slmkit.generation.sampling_settings import SamplingSettings
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
    """Generate answers greedily and compare them. `questions`: pairs of messages and the expected answer.

    After `until` (`time.monotonic`) only the first few are asked.
    """
    greedy = SamplingSettings(do_sample=False)
    answers: list[Answer] = []
    for messages, expected in questions:
        if len(answers) >= LEAST_ASKED and time.monotonic() >= until:
            break
        prompt = tokenizer.encode_chat(messages, add_generation_prompt=True).ids
        room = min(2 * len(tokenizer.encode(expected)) + 8, decoder.max_positions - len(prompt))
        given = ""  # counted as wrong if the prompt fills the context
        if room >= 1:
            given = "".join(TextStream(decoder, tokenizer, prompt, settings=greedy, max_new_tokens=room))
        answers.append(Answer(messages[-1]["content"], expected, given))
    return QuestionReport(tuple(answers))
