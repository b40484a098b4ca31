"""Stories and scenes by number, the same on every machine, and the questions that they answer.

The primer is short scenes of plain facts, most of them told twice, each followed by questions and their answers. In
stories only one token in thirty depends on a name mentioned before, so a model trained on stories alone learns slowly
to look names up. In the primer it is every other token. A scene told twice teaches copying (induction heads, Olsson et
al. 2022, arXiv:2209.11895), a question teaches looking up an entity. Stories and conversations are trained afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from slmkit.data.stories.script import PRIMER_PLOTS, load_library
from slmkit.data.stories.teller import (
    CHILDREN,
    AskedOf,
    Character,
    Fact,
    Place,
    Teller,
    Thing,
    Word,
    random_stream,
)
from slmkit.data.stories.template import Template
from slmkit.data.stories.words import SPLITS, WHOLE

FEWEST_QUESTIONS, MOST_QUESTIONS = 3, 7  # about a scene
RECITED = 0.6  # share of scenes that are told twice, word for word, before the questions


@dataclass(frozen=True)
class Question:
    """A question about a story, its answer, and its form (`has`, `colour`, ...; `plot` for a plot's own)."""

    question: str
    answer: str
    form: str


@dataclass(frozen=True)
class Story:
    """A story, its log-probability in nats, its plot, hero and thing."""

    text: str
    log_probability: float
    plot: str
    hero: str
    hero_kind: str
    thing: str
    teller: Teller = field(repr=False, compare=False)  # with the state of the world at the story's end

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """The questions that the text answers, made on first use."""
        return questions_about(self.teller)


@dataclass(frozen=True)
class Scene:
    """A few sentences, and questions about them in any order, no two with the same answer."""

    text: str
    questions: tuple[Question, ...]


def tell(seed: int, index: int, split: str = "train", world: float = WHOLE) -> Story:
    """Story `index` of the stream `seed`, in a world of this size. Raises `UserError` for an unknown split."""
    if split not in SPLITS:
        from slmkit.config import UserError  # not at the top: its import takes longer than this whole package's

        raise UserError(f"split {split!r} of the story corpus: expected one of {', '.join(SPLITS)}")
    teller = Teller(load_library(world=world), split, random_stream("story", seed, split, index).random)
    teller.tell()
    hero, thing = teller.bound["hero"], teller.bound["thing"]
    assert isinstance(hero, Character)
    assert isinstance(thing, Thing)
    return Story(teller.text, teller.log_probability, teller.plot.name, hero.name, hero.kind, thing.noun, teller)


def tell_many(
    seed: int, count: int, split: str = "train", start: int = 0, world: float = WHOLE
) -> Iterator[Story]:  # fmt: skip
    """Stories `start` to `start + count` of the stream `seed`."""
    return (tell(seed, index, split, world) for index in range(start, start + count))


def scene(chance: random.Random, world: float = WHOLE) -> Scene:
    """A random scene. As in the train split, no held-out pair of hero's kind and thing occurs."""
    teller = Teller(load_library(plots=PRIMER_PLOTS, world=world), "train", chance.random)
    teller.tell()
    questions = list(questions_about(teller))
    chance.shuffle(questions)
    by_answer = {question.answer: question for question in questions}
    return Scene(teller.text, tuple(by_answer.values())[: chance.randint(FEWEST_QUESTIONS, MOST_QUESTIONS)])


def primer_text(seed: int, index: int, world: float = WHOLE) -> str:
    """Item `index` of the stream `seed`: a scene, perhaps repeated, then its questions, each with its answer."""
    chance = random_stream("primer", seed, index)
    told = scene(chance, world)
    recited = [f"Once more: {told.text}"] if chance.random() < RECITED else []
    return with_questions([told.text, *recited], told.questions)


def primer_texts(seed: int, count: int, world: float = WHOLE) -> Iterator[str]:
    """The first `count` texts of the stream `seed`."""
    return (primer_text(seed, index, world) for index in range(count))


def with_questions(texts: Sequence[str], questions: Sequence[Question]) -> str:
    """Texts, then questions, each with its answer."""
    return " ".join([*texts, *(f"{asked.question} {asked.answer}" for asked in questions)])


class UnsettledError(Exception):
    """A sentence would name something that the story did not mention."""


class Narrator(Teller):
    """Fills sentences about a finished story; makes no choices."""

    def __init__(self, teller: Teller):
        super().__init__(teller.library, teller.split, teller.chance)
        self.bound = dict(teller.bound)

    def choose(self, options: Sequence[object]) -> int:
        """Raises `UnsettledError`: the story is finished."""
        raise UnsettledError

    def pick(self, words: tuple[str, ...]) -> str:
        """Raises `UnsettledError`: the story is finished."""
        raise UnsettledError

    def say(self, template: Template) -> str:
        """The template filled in from the story."""
        self.parts = []
        self.tell_all(template)
        return "".join(self.parts)

    def ask(self, wordings: Sequence[AskedOf], form: str) -> Iterator[Question]:
        """The questions in these wordings that the story settles."""
        for wording in wordings:
            try:
                yield Question(self.say(wording.question), self.say(wording.answer), form)
            except UnsettledError:
                continue


def questions_about(teller: Teller) -> tuple[Question, ...]:
    """Every question that the story answers, in the order of its facts; those with two answers are left out."""
    asked: dict[str, Question] = {}
    ambiguous = set()
    for question in _all_questions(Narrator(teller), teller):
        if asked.setdefault(question.question, question).answer != question.answer:
            ambiguous.add(question.question)
    return tuple(question for question in asked.values() if question.question not in ambiguous)


def _all_questions(narrator: Narrator, teller: Teller) -> Iterator[Question]:
    yield from narrator.ask(teller.plot.questions, "plot")
    for fact in [*teller.standing_facts(), *_facts_of_the_cast(teller)]:
        object_ = Word(narrator.say(fact.object)) if isinstance(fact.object, tuple) else fact.object
        for name, entity in (("s", fact.subject), ("o", object_), ("r", fact.recipient)):
            if entity is None:
                narrator.bound.pop(name, None)
            else:
                narrator.bound[name] = entity
        yield from narrator.ask(teller.library.forms[fact.relation].wordings, fact.relation)


def _facts_of_the_cast(teller: Teller) -> Iterator[Fact]:
    """Facts that the text stated while naming characters and things: kinds, colours, looks."""
    entities = [entity for entity in teller.bound.values() if not isinstance(entity, Word | Place)]
    for entity in entities:
        if isinstance(entity, Character) and entity.name and entity.kind:
            is_child, is_animal = entity.kind in CHILDREN, entity.kind in teller.book.lists["animal"]
            yield Fact("is_child" if is_child else "is_animal" if is_animal else "is_grownup", entity)
        if isinstance(entity, Thing) and entity.look:
            is_colour = entity.look in teller.book.lists["colour"]
            yield Fact("has_colour" if is_colour else "has_look", entity)
