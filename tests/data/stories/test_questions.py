"""Questions have one answer, which can be read from the story."""

from __future__ import annotations

import re

from slmkit.data.stories import Story
from slmkit.data.stories.script import load_library

# Words by which an answer says what the story says in others.
OF_THE_ANSWER = {
    *("a", "an", "the", "it", "they", "was", "were", "had", "has", "have", "now", "at", "in", "on", "by", "to", "as"),
    *("lived", "home", "loved", "liked", "worked", "wanted", "wish", "found", "lost", "went", "gave", "got", "from"),
    *("lent", "helped", "made", "won", "kept", "friend", "felt", "heard", "ate"),
}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower().replace("'s", "")))


def test_every_story_yields_three_questions_of_different_forms(stories: list[Story]):
    assert all(len({question.form for question in story.questions}) >= 3 for story in stories[:1500])


def test_every_form_is_asked_and_there_are_at_least_a_dozen(stories: list[Story]):
    asked = {question.form for story in stories for question in story.questions}
    assert asked == {"plot", *load_library().forms}
    assert len(asked) >= 12


def test_a_question_is_asked_once_and_ends_as_a_question(stories: list[Story]):
    for story in stories[:1500]:
        asked = [question.question for question in story.questions]
        assert len(set(asked)) == len(asked)
        assert all(question.endswith("?") for question in asked)
        assert all(question.answer.endswith(".") for question in story.questions)


def test_an_answer_says_nothing_that_the_story_does_not_say(stories: list[Story]):
    for story in stories[:1500]:
        for question in story.questions:
            known = words(story.text) | words(question.question) | OF_THE_ANSWER
            assert words(question.answer) <= known, (question, story.text)


def test_no_sentence_has_a_flaw_of_form(stories: list[Story]):
    flaw = re.compile(r"[{}\[\]|_]|  |\b[Aa] [aeio]|\b[Aa]n [^aeiouh]|\b(the|a|an) (the|a|an)\b|\bNone\b")
    for story in stories[:1500]:
        for question in story.questions:
            assert not flaw.search(f"{question.question} {question.answer}"), question


def test_who_keeps_the_thing_at_the_end_is_who_has_it(stories: list[Story]):
    checked = 0
    for story in stories:
        if f"keeps the {story.thing} to this day" in story.text:
            answers = {question.question: question.answer for question in story.questions}
            assert answers[f"Who has the {story.thing} now?"] == f"{story.hero} has the {story.thing} now."
            checked += 1
    assert checked > 50


def test_the_last_feeling_is_the_one_at_the_end(stories: list[Story]):
    for story in stories[:1500]:
        for question in story.questions:
            if question.question == f"How did {story.hero} feel at the end?":
                feeling = question.answer.removeprefix(f"{story.hero} felt ").rstrip(".")
                assert story.text.rindex(feeling) > len(story.text) * 0.6


def test_colours_stand_before_their_things(stories: list[Story]):
    for story in stories[:1500]:
        for question in story.questions:
            if (
                match := re.fullmatch(r"The (.+) was (.+)\.", question.answer)
                if question.form == "has_colour"
                else None
            ):
                assert f"{match[2]} {match[1]}" in story.text
