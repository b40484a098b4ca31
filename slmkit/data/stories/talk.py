"""Conversations about stories, pairs of a right and a wrong answer to a question, and small sums.

A user asks for or pastes a story, asks questions about it, or makes small talk.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from slmkit.data.stories.script import FOLDER, read_lines
from slmkit.data.stories.story import Question, Scene, Story, primer_text, scene, tell, with_questions
from slmkit.data.stories.teller import dress, random_stream
from slmkit.data.stories.words import WHOLE, ScriptError

Message = dict[str, str]

KINDS = {"request": 4, "pasted": 3, "scene": 9, "small talk": 1}  # relative frequency of each kind of conversation
SMALL_TALK = ("hello", "who", "thanks", "bye")
ABOUT_STORIES = 0.25  # share of question pairs about a whole story; the others are about a scene
OTHER_SCENES = 400  # scenes for wrong answers that the text itself does not have
LARGEST = 20  # largest summand
SUMS = ("What is {a} + {b}?", "{a} + {b} = ?", "How much is {a} plus {b}?")
NEAR = (-10, -2, -1, 1, 2, 10)  # errors of wrong answers: off by one or two, or a wrong carry


def conversation(seed: int, index: int, split: str = "train", world: float = WHOLE) -> list[Message]:
    """Conversation `index` of the stream `seed`; the story in it, if any, is `tell(seed, index, split, world)`."""
    chance = random_stream("conversation", seed, split, index)
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "small talk":
        return _small_talk(chance)
    if kind == "scene":
        told = scene(chance, world)
        messages = _questioned(chance, told.text, told.questions)
    elif kind == "pasted":
        story = tell(seed, index, split, world)
        messages = _questioned(chance, story.text, drawn_questions(chance, story.questions, chance.randint(4, 8)))
    else:
        story = tell(seed, index, split, world)
        messages = story_request(chance, story)
        messages += _next_questions(chance, drawn_questions(chance, story.questions, chance.randint(3, 7)))
    if chance.random() < 0.2:
        messages += _exchange(*_pair(chance, chance.choice(("thanks", "bye"))))
    return messages


def revision_texts(seed: int, count: int, world: float = WHOLE) -> Iterator[str]:
    """The first `count` texts of the stream `seed`: in turn a story with questions and their answers, and a scene."""
    for index in range(count):
        if index % 2:
            yield primer_text(seed, index, world)
            continue
        chance, story = random_stream("revision", seed, index), tell(seed, index, world=world)
        yield with_questions([story.text], drawn_questions(chance, story.questions, chance.randint(4, 8)))


def held_out_questions(count: int, seed: int = 0, world: float = WHOLE) -> list[tuple[list[Message], str]]:
    """Questions about stories of the held-out split: the messages up to the question, and the right answer."""
    asked = []
    for index in range(count):
        chance = random_stream("held-out question", seed, index)
        story = tell(seed, index, "heldout", world)
        (question,) = drawn_questions(chance, story.questions, 1)
        if index % 2:
            messages = [*story_request(chance, story), {"role": "user", "content": question.question}]
        else:
            messages = [{"role": "user", "content": pasted(chance, story.text, question)}]
        asked.append((messages, question.answer))
    return asked


def held_out_scene(index: int, world: float = WHOLE) -> tuple[Scene, list[tuple[list[Message], str]]]:
    """A scene that is not in training, and each of its questions as a conversation, with the right answer."""
    chance = random_stream("held-out scene", index)
    told = scene(chance, world)
    asked = [[{"role": "user", "content": pasted(chance, told.text, question)}] for question in told.questions]
    return told, [(messages, question.answer) for messages, question in zip(asked, told.questions)]


def story_request(chance: random.Random, story: Story) -> list[Message]:
    """A wish for a story about the hero's kind and the thing, and the story."""
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


def drawn_questions(chance: random.Random, questions: Sequence[Question], count: int) -> list[Question]:
    """Questions of different forms, each form equally likely, in random order."""
    forms: dict[str, list[Question]] = {}
    for question in questions:
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


class AskedTwice(NamedTuple):
    """A question as a conversation without its answer, the right answer and a wrong one.

    The wrong answer is that of another question with the same wording: the place where another character went, the
    colour of another thing. It is from the same text if that has one, else from other scenes.
    """

    messages: list[Message]
    right: str
    wrong: str


def question_pair(seed: int, index: int, split: str = "train", world: float = WHOLE) -> AskedTwice:
    """Item `index` of the stream `seed`."""
    chance = random_stream("question pair", seed, split, index)
    while True:
        text, questions = _text(chance, seed, index, split, world)
        for question in chance.sample(questions, len(questions)):
            wrong = _wrong_answer(question, questions, chance, world)
            if wrong is not None:
                messages = [{"role": "user", "content": pasted(chance, text, question)}]
                return AskedTwice(messages, question.answer, wrong)


def _text(chance: random.Random, seed: int, index: int, split: str, world: float) -> tuple[str, Sequence[Question]]:
    if chance.random() < ABOUT_STORIES:
        story = tell(seed, index, split, world)
        return story.text, story.questions
    told = scene(chance, world)
    return told.text, told.questions


def _wrong_answer(
    asked: Question, questions: Sequence[Question], chance: random.Random, world: float
) -> str | None:  # fmt: skip
    others = _questions_of_others(world).get(asked.form, ())
    for other in (*questions, *chance.sample(others, len(others))):
        answer = adapted(other, asked)
        if answer is not None and answer != asked.answer:
            return answer
    return None


@functools.cache
def _questions_of_others(world: float) -> dict[str, list[Question]]:
    """Questions of a few hundred scenes, by form."""
    found: dict[str, list[Question]] = {}
    for index in range(OTHER_SCENES):
        for question in scene(random_stream("other scene", index), world).questions:
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


def sum_pair(seed: int, index: int, held_out: bool = False) -> tuple[str, str, str]:
    """A question, its answer and a wrong one close to it: item `index` of the stream `seed`.

    A tenth of all sums is held out: asked only with `held_out`.
    """
    chance = random_stream("sum", seed, held_out, index)
    while True:
        a, b = chance.randint(0, LARGEST), chance.randint(0, LARGEST)
        if is_held_out_sum(a, b) == held_out:
            break
    wrong = chance.choice([a + b + near for near in NEAR if a + b + near >= 0])
    return chance.choice(SUMS).format(a=a, b=b), str(a + b), str(wrong)


def is_held_out_sum(a: int, b: int) -> bool:
    """Whether this sum is held out from training."""
    return random_stream("held-out sum", a, b).random() < 0.1
