"""The primer: short scenes of plain facts, most of them told twice, each followed by questions and their answers.

A model that reads stories alone takes long to notice that a name said once will be said again: the places where it
matters are one token in thirty. Here they are every other one. A scene told twice teaches to go on as it went on before
(an induction head, Olsson et al. 2022, arXiv:2209.11895), a question to look for who or what it is about; stories and
conversations are then learned by a model that can do both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from slmkit.data.stories.questions import Question, questions_about
from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import Teller, random_stream

FEWEST_QUESTIONS, MOST_QUESTIONS = 3, 7
RECITED = 0.6  # how many scenes are told twice, word for word, before the questions


@dataclass(frozen=True)
class Scene:
    """A few sentences, and questions about them in any order, no two with the same answer."""

    text: str
    questions: tuple[Question, ...]


def scene(chance: random.Random) -> Scene:
    """Any scene. Like the stories of the train split, none puts a held-out pair of hero's kind and thing together."""
    teller = Teller(load_library(plots="primer.txt"), "train", chance.random)
    teller.tell()
    questions = list(questions_about(teller))
    chance.shuffle(questions)
    by_answer = {question.answer: question for question in questions}
    return Scene(teller.text, tuple(by_answer.values())[: chance.randint(FEWEST_QUESTIONS, MOST_QUESTIONS)])


def primer_text(seed: int, index: int) -> str:
    """Number `index` of the stream `seed`: a scene, perhaps again, then its questions, each with its answer."""
    chance = random_stream("primer", seed, index)
    told = scene(chance)
    recited = [f"Once more: {told.text}"] if chance.random() < RECITED else []
    return " ".join([told.text, *recited, *(f"{asked.question} {asked.answer}" for asked in told.questions)])


def primer_texts(seed: int, count: int) -> Iterator[str]:
    """The first `count` of the stream `seed`."""
    return (primer_text(seed, index) for index in range(count))
