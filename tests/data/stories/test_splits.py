"""The pairs of hero's kind and thing that are held out are met in the held-out split alone."""

from __future__ import annotations

from slmkit.data.stories import Story
from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import Thing
from slmkit.data.stories.words import held_out_things


def test_no_pair_of_hero_and_thing_stands_in_both_splits(stories: list[Story], heldout_stories: list[Story]):
    train = {
        (story.hero_kind, entity.noun)
        for story in stories
        for entity in story.teller.bound.values()
        if isinstance(entity, Thing)
    }
    heldout = {(story.hero_kind, story.thing) for story in heldout_stories}
    assert len(heldout) > 300
    assert not train & heldout


def test_about_a_tenth_of_the_pairs_is_held_out():
    book = load_library().book
    for name in book.thing_lists:
        shares = [len(held_out_things(kind, book.lists[name])) / len(book.lists[name]) for kind in book.lists["anyone"]]
        assert 0.07 <= min(shares) <= max(shares) <= 0.13


def test_every_thing_is_met_in_the_train_split():
    book = load_library().book
    for name in book.thing_lists:
        held_out = [held_out_things(kind, book.lists[name]) for kind in book.lists["anyone"]]
        assert all(any(thing not in things for things in held_out) for thing in book.lists[name])
