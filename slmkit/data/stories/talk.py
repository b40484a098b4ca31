"""Conversations about stories: a user asks for or pastes a story, asks questions about it, or makes small talk."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from slmkit.data.stories.primer import Scene, scene
from slmkit.data.stories.questions import Question
from slmkit.data.stories.script import FOLDER, read_lines
from slmkit.data.stories.story import Story, tell
from slmkit.data.stories.teller import random_stream
from slmkit.data.stories.template import dress
from slmkit.data.stories.words import ScriptError

Message = dict[str, str]

KINDS = {"request": 4, "pasted": 3, "scene": 9, "small talk": 1}  # relative frequency of each kind of conversation
SMALL_TALK = ("hello", "who", "thanks", "bye")


def conversation(seed: int, index: int, split: str = "train") -> list[Message]:
    """Conversation `index` of the stream `seed`; the story in it, if any, is `tell(seed, index, split)`."""
    chance = random_stream("conversation", seed, split, index)
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "small talk":
        return _small_talk(chance)
    if kind == "scene":
        told = scene(chance)
        messages = _questioned(chance, told.text, told.questions)
    elif kind == "pasted":
        story = tell(seed, index, split)
        messages = _questioned(chance, story.text, _draw(chance, story, chance.randint(4, 8)))
    else:
        story = tell(seed, index, split)
        messages = _request(chance, story)
        messages += _next_questions(chance, _draw(chance, story, chance.randint(3, 7)))
    if chance.random() < 0.2:
        messages += _exchange(*_pair(chance, chance.choice(("thanks", "bye"))))
    return messages


def held_out_questions(count: int, seed: int = 0) -> list[tuple[list[Message], str]]:
    """Questions about stories of the held-out split: the messages up to the question, and the right answer."""
    asked = []
    for index in range(count):
        chance = random_stream("held-out question", seed, index)
        story = tell(seed, index, "heldout")
        (question,) = _draw(chance, story, 1)
        if index % 2:
            messages = [*_request(chance, story), {"role": "user", "content": question.question}]
        else:
            messages = [{"role": "user", "content": pasted(chance, story.text, question)}]
        asked.append((messages, question.answer))
    return asked


def held_out_scene(index: int) -> tuple[Scene, list[tuple[list[Message], str]]]:
    """A scene that is not in training, and each of its questions as a conversation, with the right answer."""
    chance = random_stream("held-out scene", index)
    told = scene(chance)
    asked = [[{"role": "user", "content": pasted(chance, told.text, question)}] for question in told.questions]
    return told, [(messages, question.answer) for messages, question in zip(asked, told.questions)]


def _request(chance: random.Random, story: Story) -> list[Message]:
    about = {"kind": dress(story.hero_kind, "a", False), "thing": dress(story.thing, "a", False)}
    return _exchange(_say(chance, "request", **about), story.text)


def _questioned(chance: random.Random, text: str, questions: Sequence[Question]) -> list[Message]:
    """The user pastes a text with a question about it, then asks further questions."""
    first, *others = questions
    return [*_exchange(pasted(chance, text, first), first.answer), *_next_questions(chance, others)]


def pasted(chance: random.Random, text: str, question: Question) -> str:
    return _say(chance, "pasted", story=text, question=question.question)


def _next_questions(chance: random.Random, questions: Sequence[Question]) -> list[Message]:
    messages: list[Message] = []
    for question in questions:
        messages += _exchange(_say(chance, "next question", question=question.question), question.answer)
    return messages


def _small_talk(chance: random.Random) -> list[Message]:
    """One to three exchanges in this order: hello, who are you, thank you, goodbye."""
    messages: list[Message] = []
    for topic in sorted(chance.sample(SMALL_TALK, chance.randint(1, 3)), key=SMALL_TALK.index):
        messages += _exchange(*_pair(chance, topic))
    return messages


def _draw(chance: random.Random, story: Story, count: int) -> list[Question]:
    """Questions of different forms, each form equally likely, in random order."""
    forms: dict[str, list[Question]] = {}
    for question in story.questions:
        forms.setdefault(question.form, []).append(question)
    drawn = chance.sample(list(forms), min(count, len(forms)))
    return [chance.choice(forms[form]) for form in drawn]


def _exchange(asked: str, answered: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _say(chance: random.Random, topic: str, **words: str) -> str:
    """A random line of a topic, filled in."""
    return chance.choice(_wordings()[topic]).format(**words).replace("\\n", "\n")


def _pair(chance: random.Random, topic: str) -> tuple[str, str]:
    """The user's message and the reply."""
    asked, _, answered = chance.choice(_wordings()[topic]).partition(" => ")
    return asked, answered


@functools.cache
def _wordings() -> dict[str, list[str]]:
    """The lines of `talk.txt` by topic."""
    wordings: dict[str, list[str]] = {}
    topic = ""
    for line in read_lines(FOLDER / "talk.txt"):
        if line.text.startswith("="):
            topic = line.text[1:].strip()
            wordings[topic] = []
        elif line.text and not topic:
            raise ScriptError(f"{line.where}: a line before the first `= topic` heading")
        elif line.text:
            wordings[topic].append(line.text)
    return wordings
