"""Stories with one planted error of each kind, for tests of the reader."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from slmkit.data.stories import Story
from slmkit.data.stories.sentences import SENTENCE_END
from slmkit.data.stories.teller import Character, Place, Thing, Word

OTHER_PRONOUN = {"he": "she", "she": "he", "He": "She", "She": "He"}


def planted(kind: str, story: Story, other: Story, chance: random.Random) -> str | None:
    """The text with one error of this kind (a key of `reader.FAULTS`); None where the story has no room for it."""
    return PLANT[kind](story, other, chance)


def _with_other(text: str, word: str, others: Sequence[str], chance: random.Random) -> str | None:
    """The text with one later mention of the word, not the first, replaced by another word that takes its article."""
    mentions = [*re.finditer(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)][1:]
    others = [one for one in others if one not in text and (one[0] in "aeiou") == (word[0] in "aeiou")]
    if not mentions or not others:
        return None
    at = chance.choice(mentions)
    return text[: at.start()] + chance.choice(others) + text[at.end() :]


def _entities(story: Story, sort: type) -> list:
    return [entity for entity in story.teller.bound.values() if isinstance(entity, sort)]


def _pronoun(story: Story, other: Story, chance: random.Random) -> str | None:
    mentions = [*re.finditer(r"\b(he|she|He|She)\b", story.text)]
    if not mentions:
        return None
    at = chance.choice(mentions)
    return story.text[: at.start()] + OTHER_PRONOUN[at[0]] + story.text[at.end() :]


def _name(story: Story, others: Callable[[Character], Sequence[str]], chance: random.Random) -> str | None:
    hero = chance.choice([one for one in _entities(story, Character) if one.name])
    return _with_other(story.text, hero.name, others(hero), chance)


def _stranger(story: Story, other: Story, chance: random.Random) -> str | None:
    lists = story.teller.book.lists
    both = ("woman_name", "man_name"), ("girl_name", "boy_name")
    return _name(
        story, lambda one: lists[both[one.name in lists["girl_name"] + lists["boy_name"]][not one.female]], chance
    )


def _person(story: Story, other: Story, chance: random.Random) -> str | None:
    """One mention of a character is another one's name; `_with_other` would refuse it, since it is in the text."""
    cast = [one for one in _entities(story, Character) if one.name]
    if len(cast) < 2:
        return None
    this, that = chance.sample(cast, 2)
    mentions = [*re.finditer(rf"\b{this.name}\b", story.text)][1:]
    if not mentions:
        return None
    at = chance.choice(mentions)
    return story.text[: at.start()] + that.name + story.text[at.end() :]


def _kind(story: Story, other: Story, chance: random.Random) -> str | None:
    cast = [one for one in _entities(story, Character) if one.kind]
    one, lists = chance.choice(cast), story.teller.book.lists
    if one.kind in ("girl", "boy"):  # a girl's name with a boy
        return story.text.replace(one.kind, {"girl": "boy", "boy": "girl"}[one.kind], 1)
    return _with_other(story.text, one.kind, lists["animal" if one.kind in lists["animal"] else "job"], chance)


def _thing(story: Story, other: Story, chance: random.Random) -> str | None:
    one = chance.choice([one for one in _entities(story, Thing) if one.noun])
    return _with_other(story.text, one.noun, one.role.things(story.hero_kind, story.teller), chance)


def _look(story: Story, other: Story, chance: random.Random) -> str | None:
    things = [one for one in _entities(story, Thing) if one.look]
    if not things:
        return None
    one = chance.choice(things)
    return _with_other(story.text, one.look, story.teller.book.looks[one.noun], chance)


def _place(story: Story, other: Story, chance: random.Random) -> str | None:
    places = [one for one in _entities(story, Place) if one.noun]
    if not places:
        return None
    one, book = chance.choice(places), story.teller.book
    nouns = [noun for name in one.role.lists for noun in book.lists[name]]
    same = [noun for noun in nouns if book.prepositions[noun] == book.prepositions[one.noun]]
    return _with_other(story.text, one.noun, same, chance)


def _detail(story: Story, other: Story, chance: random.Random) -> str | None:
    words = [one.text for one in _entities(story, Word)]
    if not words:
        return None
    word, lists = chance.choice(words), story.teller.book.lists
    return _with_other(story.text, word, [one for words in lists.values() if word in words for one in words], chance)


def _sentences(change: Callable[[list[str], Story, random.Random], None]) -> Callable[..., str | None]:
    def plant(story: Story, other: Story, chance: random.Random) -> str | None:
        sentences = SENTENCE_END.split(story.text)
        change(sentences, other, chance)
        return " ".join(sentences)

    return plant


def _shuffle_words(sentences: list[str], other: Story, chance: random.Random) -> None:
    at = chance.randrange(len(sentences))
    words = sentences[at].split()
    sentences[at] = " ".join(chance.sample(words, len(words)))


def _swap(sentences: list[str], other: Story, chance: random.Random) -> None:
    at = chance.randrange(len(sentences) - 1)
    sentences[at : at + 2] = sentences[at + 1], sentences[at]


def _insert(sentences: list[str], other: Story, chance: random.Random) -> None:
    foreign = SENTENCE_END.split(other.text)
    sentences.insert(chance.randrange(2, len(sentences)), foreign[len(foreign) // 2])


def _drop_end(sentences: list[str], other: Story, chance: random.Random) -> None:
    sentences.pop()


PLANT: dict[str, Callable[..., str | None]] = {
    "sentence": _sentences(_shuffle_words), "plot": _sentences(_insert), "order": _sentences(_swap),
    "end": _sentences(_drop_end), "stranger": _stranger, "person": _person, "kind": _kind, "pronoun": _pronoun,
    "thing": _thing, "look": _look, "place": _place, "detail": _detail,
}  # fmt: skip
