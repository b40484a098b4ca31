"""A smaller world has fewer words and plots, and its stories are stories of the whole world."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from slmkit.data.sources import BUILT_IN, STORIES
from slmkit.data.stories import (
    Story,
    conversation,
    held_out_questions,
    held_out_scene,
    primer_texts,
    question_pair,
    tell_many,
)
from slmkit.data.stories.reader import read_story
from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import Thing
from slmkit.data.stories.words import FEWEST_WORDS, SMALL, WHOLE
from tests.data.stories.scoring import parses


@pytest.fixture(scope="module")
def small() -> list[Story]:
    return list(tell_many(seed=11, count=1500, world=SMALL))


def words_of(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def test_every_list_keeps_its_first_words() -> None:
    small, whole = (load_library(world=size).book for size in (SMALL, WHOLE))
    for name, words in small.lists.items():
        if name not in whole.unions:
            assert words == whole.lists[name][: len(words)]
            assert len(words) == min(
                len(whole.lists[name]), max(FEWEST_WORDS, math.ceil(SMALL * len(whole.lists[name])))
            )
    assert set(small.lists["anyone"]) == {*small.lists["child"], *small.lists["animal"]}
    assert set(small.looks["kite"]) < set(whole.looks["kite"])


def test_a_larger_world_has_the_plots_of_a_smaller_one() -> None:
    names = [{plot.name for plot in load_library(world=size).plots} for size in (0.05, SMALL, 0.5, WHOLE)]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(names))
    assert len(load_library(plots="primer.txt", world=SMALL).plots) == len(load_library(plots="primer.txt").plots)


def test_its_stories_have_a_fraction_of_the_words(small: list[Story], stories: list[Story]) -> None:
    few, many = words_of([story.text for story in small]), words_of([story.text for story in stories[:1500]])
    assert len(few) < len(many) / 2


def test_its_stories_are_stories_of_the_whole_world(small: list[Story]) -> None:
    for story in small[:40]:
        assert not read_story(story.text).faults


def test_a_story_is_more_likely_in_it_than_in_the_whole_world(small: list[Story]) -> None:
    for story in small[:10]:
        found = [one for split in ("train", "heldout") for one in parses(story.text, split)]
        assert all(one < story.log_probability for one in found)
        assert found


def test_no_pair_of_hero_and_thing_stands_in_both_of_its_splits(small: list[Story]) -> None:
    train = {
        (story.hero_kind, entity.noun)
        for story in small
        for entity in story.teller.bound.values()
        if isinstance(entity, Thing)
    }
    held_out = {(s.hero_kind, s.thing) for s in tell_many(seed=11, count=400, split="heldout", world=SMALL)}
    assert len(held_out) > 20
    assert not train & held_out


def test_questions_and_conversations_keep_to_its_words(small: list[Story]) -> None:
    scenes = [held_out_scene(index, SMALL)[0].text for index in range(50)]
    pairs = [question_pair(0, index, world=SMALL) for index in range(50)]
    asked = [messages[-1]["content"] for messages, _ in held_out_questions(50, world=SMALL)]
    talks = [message["content"] for index in range(50) for message in conversation(0, index, world=SMALL)]
    texts = [*scenes, *primer_texts(0, 100, SMALL), *asked, *talks, *(pair.wrong for pair in pairs)]
    names = {name.lower() for name in load_library().book.lists["girl_name"][9:]}
    assert words_of([story.text for story in tell_many(11, 300)]) & names
    assert not words_of(texts) & names


def test_it_is_a_source_of_its_own() -> None:
    for kind in ("text", "conversations", "pairs"):
        assert BUILT_IN["small-stories"].item(kind, 0, 3, False) != BUILT_IN[STORIES].item(kind, 0, 3, False)
