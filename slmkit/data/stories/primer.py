"""The primer: short scenes of plain facts, most of them told twice, each followed by questions and their answers.

In stories only one token in thirty depends on a name mentioned before, so a model trained on stories alone learns
slowly to look names up. In the primer it is every other token. A scene told twice teaches copying (induction heads,
Olsson et al. 2022, arXiv:2209.11895), a question teaches looking up an entity. Stories and conversations are trained
afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from slmkit.data.stories.questions import Question, questions_about
from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import Teller, random_stream

FEWEST_QUESTIONS, MOST_QUESTIONS = 3, 7
RECITED = 0.6  # share of scenes that are told twice, word for word, before the questions


@dataclass(frozen=True)
class Scene:
    """A few sentences, and questions about them in any order, no two with the same answer."""

    text: str
    questions: tuple[Question, ...]


def scene(chance: random.Random) -> Scene:
    """A random scene. As in the train split, no held-out pair of hero's kind and thing occurs."""
    teller = Teller(load_library(plots="primer.txt"), "train", chance.random)
    teller.tell()
    questions = list(questions_about(teller))
    chance.shuffle(questions)
    by_answer = {question.answer: question for question in questions}
    return Scene(teller.text, tuple(by_answer.values())[: chance.randint(FEWEST_QUESTIONS, MOST_QUESTIONS)])


def primer_text(seed: int, index: int) -> str:
    """Item `index` of the stream `seed`: a scene, perhaps repeated, then its questions, each with its answer."""
    chance = random_stream("primer", seed, index)
    told = scene(chance)
    recited = [f"Once more: {told.text}"] if chance.random() < RECITED else []
    return " ".join([told.text, *recited, *(f"{asked.question} {asked.answer}" for asked in told.questions)])


def primer_texts(seed: int, count: int) -> Iterator[str]:
    """The first `count` texts of the stream `seed`."""
    return (primer_text(seed, index) for index in range(count))
