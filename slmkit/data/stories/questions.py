"""Questions about a finished story, each with the one answer that follows from its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from slmkit.data.stories.cast import CHILDREN, Character, Entity, Place, Thing, Word
from slmkit.data.stories.script import AskedOf
from slmkit.data.stories.teller import Fact, Teller
from slmkit.data.stories.template import Sequence


@dataclass(frozen=True)
class Question:
    """A question about a story, its answer, and its form (`has`, `colour`, ...; `plot` for a plot's own)."""

    question: str
    answer: str
    form: str


class UnsettledError(Exception):
    """A sentence would name something that the story did not mention."""


class Narrator(Teller):
    """Fills sentences about a finished story; makes no choices."""

    def __init__(self, teller: Teller):
        super().__init__(teller.library, teller.split, teller.chance)
        self.bound = dict(teller.bound)

    def choose(self, options: tuple[str, ...]) -> int:
        """Raises `UnsettledError`: the story is finished."""
        raise UnsettledError

    def pick(self, words: tuple[str, ...]) -> str:
        """Raises `UnsettledError`: the story is finished."""
        raise UnsettledError

    def say(self, template: Sequence) -> str:
        """The template filled in from the story."""
        self.parts = []
        template.tell(self)
        return "".join(self.parts)


def questions_about(teller: Teller) -> tuple[Question, ...]:
    """Every question that the story answers, in the order of its facts; those with two answers are left out."""
    narrator = Narrator(teller)
    asked: dict[str, Question] = {}
    ambiguous = set()
    for question in _all_questions(narrator, teller):
        if asked.setdefault(question.question, question).answer != question.answer:
            ambiguous.add(question.question)
    return tuple(question for question in asked.values() if question.question not in ambiguous)


def _all_questions(narrator: Narrator, teller: Teller) -> Iterator[Question]:
    for wording in teller.plot.questions:
        yield from _ask(narrator, wording, "plot")
    for fact in [*teller.standing_facts(), *_facts_of_the_cast(teller)]:
        object_ = Word(narrator.say(fact.object)) if isinstance(fact.object, Sequence) else fact.object
        for name, entity in (("s", fact.subject), ("o", object_), ("r", fact.recipient)):
            if entity is None:
                narrator.bound.pop(name, None)
            else:
                narrator.bound[name] = entity
        for wording in teller.library.forms[fact.relation].wordings:
            yield from _ask(narrator, wording, fact.relation)


def _ask(narrator: Narrator, wording: AskedOf, form: str) -> Iterator[Question]:
    try:
        yield Question(narrator.say(wording.question), narrator.say(wording.answer), form)
    except UnsettledError:
        return


def _facts_of_the_cast(teller: Teller) -> Iterator[Fact]:
    """Facts that the text stated while naming characters and things: kinds, colours, looks."""
    entities: list[Entity] = [entity for name, entity in teller.bound.items() if not isinstance(entity, Word | Place)]
    for entity in entities:
        if isinstance(entity, Character) and entity.name and entity.kind:
            is_child, is_animal = entity.kind in CHILDREN, entity.kind in teller.book.lists["animal"]
            yield Fact("is_child" if is_child else "is_animal" if is_animal else "is_grownup", entity, None, None)
        if isinstance(entity, Thing) and entity.look:
            is_colour = entity.look in teller.book.lists["colour"]
            yield Fact("has_colour" if is_colour else "has_look", entity, None, None)
