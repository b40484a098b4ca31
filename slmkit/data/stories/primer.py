"""The primer: short scenes of plain facts, each followed by questions and their answers.

A model that reads stories alone takes long to notice that a name said once will be said again: the places where it
matters are one token in thirty. Here they are every other one, so that looking back is learned in the first minute,
and stories and answers are then learned by a model that can do it.
"""

from __future__ import annotations

from collections.abc import Iterator

from slmkit.data.stories.questions import questions_about
from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import Teller, random_stream

FEWEST_QUESTIONS, MOST_QUESTIONS = 3, 7


def primer_text(seed: int, index: int) -> str:
    """Number `index` of the stream `seed`: a scene, then questions about it in any order, each with its answer.

    Like the stories of the train split, it never puts a held-out pair of hero's kind and thing together.
    """
    chance = random_stream("primer", seed, index)
    teller = Teller(load_library(plots="primer.txt"), "train", chance.random)
    teller.tell()
    questions = list(questions_about(teller))
    chance.shuffle(questions)
    by_answer = {question.answer: question.question for question in questions}  # nothing is answered twice alike
    asked = list(by_answer.items())[: chance.randint(FEWEST_QUESTIONS, MOST_QUESTIONS)]
    return " ".join([teller.text, *(f"{question} {answer}" for answer, question in asked)])


def primer_texts(seed: int, count: int) -> Iterator[str]:
    """The first `count` of the stream `seed`."""
    return (primer_text(seed, index) for index in range(count))
