"""Conversations take turns, keep to their story, and can be marked."""

from __future__ import annotations

import re

from slmkit.data.stories import conversation, held_out_questions, tell


def test_user_and_assistant_take_turns_and_the_assistant_has_the_last_word():
    for index in range(400):
        roles = [message["role"] for message in conversation(2, index)]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_a_conversation_depends_on_seed_index_and_split_alone():
    assert conversation(2, 5) == conversation(2, 5)
    assert len({str(conversation(2, index, split)) for index in range(40) for split in ("train", "heldout")}) > 60


def test_a_story_that_is_asked_for_is_about_the_hero_and_the_thing_named():
    told = 0
    for index in range(400):
        request, reply, *_ = conversation(2, index)
        story = tell(2, index)
        if reply["content"] == story.text:
            told += 1
            assert f" {story.hero_kind} " in request["content"]
            assert story.thing in request["content"]
    assert 60 < told < 160


def test_questions_are_answered_as_the_story_answers_them():
    answered = 0
    for index in range(400):
        story, messages = tell(2, index), conversation(2, index)
        if not any(story.text in message["content"] for message in messages):
            continue  # small talk, or about a scene
        known = {question.question: question.answer for question in story.questions}
        for asked, reply in zip(messages[::2], messages[1::2]):
            ends = [question for question in known if asked["content"].endswith(question)]
            if ends:
                answered += 1
                assert known[max(ends, key=len)] == reply["content"]
    assert answered > 200


def test_questions_about_a_scene_are_answered_with_what_it_says():
    answered = 0
    for index in range(400):
        first, *_ = messages = conversation(2, index)
        if not re.search(r"[.!]\n.*\?$", first["content"]) or tell(2, index).text in first["content"]:
            continue
        for reply in messages[1::2]:
            if reply["content"].startswith(("You are", "Thank you", "Goodbye", "Good night")):
                continue
            answered += 1
            looks = re.search(r"(?:colour|was|the) (\w+)\.$", reply["content"])
            assert looks is None or looks[1] in first["content"]
            names = re.findall(r"(?<!^)(?<!\. )\b[A-Z][a-z]+", reply["content"])
            assert all(name in first["content"] for name in names), (first, reply)
    assert answered > 300


def test_conversations_leave_no_slot_open():
    for index in range(400):
        for message in conversation(4, index):
            assert not set("{}[]|\\") & set(message["content"])


def test_held_out_questions_end_with_the_users_question_about_a_held_out_story():
    asked = held_out_questions(60, seed=1)
    assert len(asked) == 60
    for index, (messages, answer) in enumerate(asked):
        story = tell(1, index, "heldout")
        assert messages[-1]["role"] == "user"
        assert story.text in messages[0]["content"] + messages[-2 if len(messages) > 1 else -1]["content"]
        answers = [q.answer for q in story.questions if messages[-1]["content"].endswith(q.question)]
        assert answer in answers
