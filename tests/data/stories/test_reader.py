"""A reader of stories finds no fault in the generator's own, and finds the error that is planted in one."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from slmkit.data.stories import Story, tell, tell_many
from slmkit.data.stories.reader import FAULTS, read_story
from slmkit.data.stories.sentences import SENTENCE_END
from tests.data.stories.planted import PLANT
from tests.data.stories.scoring import count_parses


def is_possible(text: str) -> bool:
    """Whether the generator can tell this, by the exact parser, in one split or the other."""
    return bool(count_parses(text, "train") or count_parses(text, "heldout"))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_generators_own_stories_have_no_fault(split: str):
    for story in tell_many(5, 250, split):
        reading = read_story(story.text)
        assert not reading.faults, story.text
        assert reading.plot == story.plot
        assert reading.possible == reading.sentences == len(SENTENCE_END.split(story.text))


@pytest.mark.parametrize("kind", PLANT)
def test_a_planted_error_is_found_exactly_where_it_makes_the_story_impossible(kind: str):
    chance = random.Random(kind)
    texts = (
        (story, PLANT[kind](story, tell(7, index), chance))
        for index, story in enumerate(
            itertools.chain.from_iterable(zip(tell_many(6, 400), tell_many(6, 400, "heldout")))
        )
    )
    changed = itertools.islice(((story, text) for story, text in texts if text not in (None, story.text)), 8)
    found: Counter[str] = Counter()
    for story, text in changed:
        reading = read_story(text)
        assert bool(reading.faults) != is_possible(text), (story.text, text)
        found.update({"owner": "person"}.get(fault.kind, fault.kind) for fault in dict.fromkeys(reading.faults))
    assert found.most_common(1)[0][0] == kind, f"what was planted is what is found most: {found}"


def test_each_kind_of_fault_is_planted_and_explained():
    assert FAULTS.keys() - PLANT.keys() == {"owner"}, "planted as `person`: which of both depends on the sentence"


def story_with(plot: str) -> Story:
    return next(story for story in tell_many(3, 2_000) if story.plot == plot)


def test_the_sentence_with_the_fault_is_quoted():
    story = story_with("learning to swim")
    last = SENTENCE_END.split(story.text)[-1]
    stranger = "Zelda" if story.teller.bound["hero"].female else "Eddie"
    assert story.hero in last
    reading = read_story(story.text.replace(last, last.replace(story.hero, stranger)))
    assert [(fault.kind, stranger in fault.sentence) for fault in reading.faults] == [("stranger", True)]
    assert reading.possible == reading.sentences, "alone, each of its sentences is possible"


def test_a_thing_with_another_character_is_a_fault_of_its_own():
    for story in tell_many(3, 2_000):
        friend = story.teller.bound.get("friend")
        if getattr(friend, "name", "") and story.text.endswith(f"{story.hero} keeps the {story.thing} to this day."):
            break
    (fault,) = read_story(story.text.replace(f"{story.hero} keeps", f"{friend.name} keeps")).faults
    assert fault.kind == "owner"


@pytest.mark.parametrize(
    "text", ["", "   ", "x", "Nothing of this is a story. Not at all!", '"', "{hero}", "\ue000 \uf8ff"]
)
def test_any_text_is_read(text: str):
    reading = read_story(text)
    assert reading.possible == 0
    assert {fault.kind for fault in reading.faults} == {"sentence", "end"}


def test_a_story_that_is_cut_off_lacks_its_end():
    text = tell(4, 0).text
    kinds = [fault.kind for fault in read_story(text[: len(text) // 2]).faults]
    assert kinds[-1] == "end"
    assert read_story(" ".join(SENTENCE_END.split(text)[:4])).possible == 4
