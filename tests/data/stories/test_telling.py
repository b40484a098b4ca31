"""Stories are told the same everywhere, in a rich vocabulary, and read as plain English."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from slmkit.config import UserError
from slmkit.data.stories import Story, tell, tell_many
from slmkit.data.stories.script import load_library


def test_a_story_is_the_same_in_every_process():
    program = "from slmkit.data.stories import tell; print(tell(3, 14).text, tell(3, 14).questions)"
    told = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout.decode()
        for seed in ("0", "12345")
    }
    assert told == {f"{tell(3, 14).text} {tell(3, 14).questions}\n"}


def test_the_stream_can_be_entered_anywhere():
    assert list(tell_many(5, 3, start=7)) == [tell(5, 7), tell(5, 8), tell(5, 9)]


def test_streams_of_different_seeds_share_no_story(stories: list[Story]):
    assert not {story.text for story in stories} & {story.text for story in tell_many(12, 2000)}


def test_no_story_is_told_twice(stories: list[Story]):
    assert len({story.text for story in stories}) == len(stories)


def test_an_unknown_split_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match="'test'.*expected one of train, heldout"):
        tell(1, 1, split="test")


def test_stories_have_60_to_250_words_and_about_a_hundred_and_forty_on_average(stories: list[Story]):
    lengths = [len(story.text.split()) for story in stories]
    assert min(lengths) >= 60
    assert max(lengths) <= 250
    assert 110 <= sum(lengths) / len(lengths) <= 150


def test_a_perfect_model_still_pays_for_the_free_choices(stories: list[Story]):
    words = sum(len(story.text.split()) for story in stories)
    assert 0.55 <= -sum(story.log_probability for story in stories) / words <= 0.75


def test_every_plot_is_told(stories: list[Story]):
    plots = {plot.name for plot in load_library().plots}
    assert len(plots) >= 40
    assert {story.plot for story in stories} == plots


def test_the_vocabulary_has_more_than_2500_words():
    words = {word for story in tell_many(1, 20_000) for word in re.findall(r"[a-z']+", story.text.lower())}
    assert len(words) >= 2500


@pytest.mark.parametrize(
    "flaw",
    [
        r"[^A-Za-z0-9 .,!?'\":;-]",  # anything but plain text: no slot, bracket or bar is left over
        r"  | $|^ ",  # spaces at the ends, or two in a row
        r"\b[Aa] [aeio]",  # a apple
        r"\b[Aa]n [^aeiouh]",  # an pear
        r"[.?!] [a-z]",  # a sentence without a capital
        r" [.,!?;:]",  # a space before a mark
        r"[.,!?]{2}(?<!\.\.\.)(?!\.)",  # two marks in a row
        r"\b(\w+) \1\b(?<!\bhad had)(?<!\bTick tick)",  # a word said twice
        r"\b(the|a) (the|a|an)\b",
        r"[^.!?\"]$",  # an end in the middle of a sentence
    ],
)
def test_the_text_is_plain_and_grammatical(flaw: str, stories: list[Story], heldout_stories: list[Story]):
    found = [story.text for story in [*stories, *heldout_stories] if re.search(flaw, story.text)]
    assert not found, found[0]


def test_quotation_marks_come_in_pairs(stories: list[Story]):
    assert all(story.text.count('"') % 2 == 0 for story in stories)
