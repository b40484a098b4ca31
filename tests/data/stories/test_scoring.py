"""The probability that a story comes with is the one that is found by reading its text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from slmkit.data.stories import Story
from slmkit.data.stories.script import load_library
from slmkit.data.stories.teller import Teller
from tests.data.stories.scoring import count_parses, log_probability, parses


def one_of_each_plot(stories: list[Story]) -> list[Story]:
    return list({story.plot: story for story in stories}.values())


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_story_has_one_parse_and_the_probability_it_was_told_with(
    split: str, stories: list[Story], heldout_stories: list[Story]
):
    told = stories if split == "train" else heldout_stories
    for story in one_of_each_plot(told) + told[:60]:
        assert parses(story.text, split) == pytest.approx([story.log_probability], abs=1e-9), story.text


def test_a_word_that_no_rule_produces_makes_a_story_impossible(stories: list[Story]):
    for story in one_of_each_plot(stories):
        words = story.text.split()
        words[len(words) // 2] = "spreadsheet"
        assert log_probability(" ".join(words)) == -math.inf


def test_a_story_that_stops_early_or_goes_on_is_impossible(stories: list[Story]):
    text = stories[0].text
    assert count_parses(text[: text.rindex(". ") + 1]) == 0
    assert count_parses(f"{text} The end.") == 0


def test_a_held_out_story_is_impossible_in_the_train_split(heldout_stories: list[Story]):
    assert all(log_probability(story.text, "train") == -math.inf for story in heldout_stories[:40])


WORLD = {
    "words.txt": """
= child
girl * 3, boy
= girl_name
Ann, Eve
= boy_name
Bob
= animal
fox, owl
= anyone: child + animal
= job
cook
= woman_name
Miss Dot
= man_name
Uncle Tim
= colour
red, blue, amber
= thing toy: colour
kite, ball, eel
""",
    "forms.txt": "= has: last of object\nWho has the {o}? => {s} has it.",
    "shared.txt": "-- end\n* {hero} [|ran and ]slept.\n* {He} slept.",
    "plots_one.txt": "== one\nhero: anyone\nfriend: anyone\nthing: toy\n"
    "* {hero}, {a hero.kind}, had {a thing.full}.\n* {A hero.kind} with {a thing}. It was {hero}.\n\n"
    "* {friend} was {a friend.kind}.\n*\n> end",
}


class Forced(Teller):
    """Makes the choices it is given, and notes how many ways there were at each."""

    def __init__(self, choices: tuple[int, ...], folder: Path, split: str):
        super().__init__(load_library(folder), split, lambda: 0.0)
        self.given = iter(choices)
        self.ways: list[int] = []

    def choose(self, options: Sequence[object]) -> int:
        self.ways.append(len(options))
        self.log_probability -= math.log(len(options))
        return next(self.given, 0)

    def pick(self, words: tuple[str, ...]) -> str:
        self.ways.append(len(words))
        index, weights = next(self.given, 0), self.book.weights_of(words) or [1] * len(words)
        self.chance = lambda: (sum(weights[:index]) + 0.5) / sum(weights)
        return super().pick(words)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_probabilities_of_all_stories_of_a_small_world_add_up_to_one(split: str, tmp_path: Path):
    for name, text in WORLD.items():
        (tmp_path / name).write_text(text)
    told: dict[str, float] = {}
    choices: list[int] | None = []
    while choices is not None:
        teller = Forced(tuple(choices), tmp_path, split)
        teller.tell()
        assert teller.text not in told
        told[teller.text] = math.exp(teller.log_probability)
        taken = list(itertools.islice(itertools.chain(choices, itertools.repeat(0)), len(teller.ways)))
        while taken and taken[-1] == teller.ways[len(taken) - 1] - 1:
            taken.pop()
        choices = [*taken[:-1], taken[-1] + 1] if taken else None
    assert len(told) > 500
    assert sum(told.values()) == pytest.approx(1.0, abs=1e-9)
