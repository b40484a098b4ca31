"""Questions about a scene or a story, with a right and a plausible wrong answer.

A wrong answer is that of another question with the same wording: the place where another character went, the colour of
another thing. It is from the same text if that has one, else from other scenes.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from slmkit.data.stories.primer import scene
from slmkit.data.stories.questions import Question
from slmkit.data.stories.story import tell
from slmkit.data.stories.talk import Message, pasted
from slmkit.data.stories.teller import random_stream

STORIES = 0.25  # share of questions about a whole story; the others are about a scene
OTHER_SCENES = 400  # scenes for wrong answers that the text itself does not have


@dataclass(frozen=True)
class AskedTwice:
    """A question as a conversation without its answer, the right answer and a wrong one."""

    messages: list[Message]
    right: str
    wrong: str


def question_pair(seed: int, index: int, split: str = "train") -> AskedTwice:
    """Item `index` of the stream `seed`."""
    chance = random_stream("question pair", seed, split, index)
    while True:
        text, questions = _text(chance, seed, index, split)
        for question in chance.sample(questions, len(questions)):
            wrong = _wrong_answer(question, questions, chance)
            if wrong is not None:
                messages = [{"role": "user", "content": pasted(chance, text, question)}]
                return AskedTwice(messages, question.answer, wrong)


def _text(chance: random.Random, seed: int, index: int, split: str) -> tuple[str, Sequence[Question]]:
    if chance.random() < STORIES:
        story = tell(seed, index, split)
        return story.text, story.questions
    told = scene(chance)
    return told.text, told.questions


def _wrong_answer(asked: Question, questions: Sequence[Question], chance: random.Random) -> str | None:
    others = _questions_of_others().get(asked.form, ())
    for other in (*questions, *chance.sample(others, len(others))):
        answer = adapted(other, asked)
        if answer is not None and answer != asked.answer:
            return answer
    return None


@functools.cache
def _questions_of_others() -> dict[str, list[Question]]:
    """Questions of a few hundred scenes, by form."""
    found: dict[str, list[Question]] = {}
    for index in range(OTHER_SCENES):
        for question in scene(random_stream("other scene", index)).questions:
            found.setdefault(question.form, []).append(question)
    return found


def adapted(other: Question, asked: Question) -> str | None:
    """The answer of `other`, adapted to the question `asked`; None if their wordings differ.

    `Where did Ada go?` → `Ada went to the mill.`, asked of Max: `Max went to the mill.`
    """
    theirs, ours = other.question.split(), asked.question.split()
    if other.form != asked.form or len(theirs) != len(ours):
        return None
    instead = {_bare(a): _bare(b) for a, b in zip(theirs, ours) if a != b}
    if len(instead) > 1 or len(instead) >= len(ours) / 2:
        return None
    words = other.answer.split()
    return " ".join(word.replace(_bare(word), instead.get(_bare(word), _bare(word)), 1) for word in words)


def _bare(word: str) -> str:
    """A word without trailing punctuation and endings: `Ada` for `Ada's` and `Ada?`."""
    word = word.rstrip(".?!,")
    return word.removesuffix("'s")
