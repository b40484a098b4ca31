"""The built-in sums: right, seeded, and some of them never trained on."""

from __future__ import annotations

import re

from slmkit.data.sources import BUILT_IN, open_source
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.stories.talk import sum_pair


def terms(question: str) -> tuple[int, int]:
    a, b = map(int, re.findall(r"\d+", question))
    return a, b


def test_answers_are_right_and_wrong_ones_are_near() -> None:
    for index in range(300):
        question, right, wrong = sum_pair(0, index)
        assert int(right) == sum(terms(question))
        assert 0 < abs(int(wrong) - int(right)) <= 10
        assert int(wrong) >= 0


def test_what_is_held_out_is_never_asked_in_training() -> None:
    train = {terms(sum_pair(0, index)[0]) for index in range(4000)}
    held_out = {terms(sum_pair(1, index, held_out=True)[0]) for index in range(500)}
    assert len(held_out) > 20
    assert not train & held_out


def test_they_are_a_source_of_conversations_of_questions_and_of_pairs() -> None:
    source = open_source(SourceSettings(path="sums", documents=3), seed=5)
    question, right, wrong = sum_pair(5, 0)
    asked = {"role": "user", "content": question}
    answered = [asked, {"role": "assistant", "content": right}]
    assert next(one for one, _ in source.read(kind="conversations")) == next(
        one for one, _ in source.read(kind="questions")
    )
    assert next(one for one, _ in source.read(kind="questions")) == answered
    pair = next(source.read(kind="pairs"))[0]
    assert (pair.chosen, pair.rejected) == (answered, [asked, {"role": "assistant", "content": wrong}])
    assert BUILT_IN["sums"].text(5, 0, False) == f"{question} {right}"
