"""Right answers and wrong ones that sound like them."""

from __future__ import annotations

from slmkit.data.stories import question_pair
from slmkit.data.stories.story import Question
from slmkit.data.stories.talk import adapted


def test_a_pair_depends_on_its_numbers_alone() -> None:
    assert question_pair(3, 5) == question_pair(3, 5)
    assert question_pair(3, 5) != question_pair(3, 6) != question_pair(4, 6)


def test_wrong_answers_are_wrong_and_have_the_words_of_an_answer() -> None:
    pairs = [question_pair(0, index) for index in range(150)]
    assert all(pair.right != pair.wrong for pair in pairs)
    alike = [
        bool(set(pair.right.split()) & set(pair.wrong.split())) or len(pair.right.split()) == len(pair.wrong.split())
        for pair in pairs
    ]
    assert all(alike)
    assert len({pair.wrong for pair in pairs}) > 100  # no single answer that would be wrong whatever was asked


def test_an_answer_is_adapted_to_who_was_asked_about() -> None:
    theirs = Question("What was Ada's home?", "Ada's home was a den.", "lived")
    asked = Question("What was Max's home?", "Max's home was a mill.", "lived")
    assert adapted(theirs, asked) == "Max's home was a den."
    assert adapted(theirs, Question("Where did Max live?", "Max lived in a mill.", "lived")) is None
    assert adapted(theirs, Question("What was Max's home?", "", "went")) is None
