"""The scripts stay small, and a mistake in one names the file and the line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slmkit.data.stories.script import FOLDER, load_library
from slmkit.data.stories.teller import CHARACTERS
from slmkit.data.stories.words import ScriptError
from tests.data.stories.test_scoring import WORLD


def test_all_templates_together_hold_at_most_12000_words():
    beats = [
        line
        for path in [FOLDER / "shared.txt", *FOLDER.glob("plots_*.txt")]
        for line in path.read_text().splitlines()
        if line.startswith(("*", " "))
    ]
    count = sum(len(re.findall(r"\{[^}]*\}|[A-Za-z']+", line)) for line in beats)
    assert 5000 < count <= 12_000


def test_no_script_has_more_than_400_lines():
    assert all(len(path.read_text().splitlines()) <= 400 for path in FOLDER.glob("*.txt"))


def test_every_fragment_is_told_by_some_plot():
    shared, plots = (
        (FOLDER / "shared.txt").read_text(),
        "".join(path.read_text() for path in FOLDER.glob("plots_*.txt")),
    )
    assert all(f"> {name}\n" in plots for name in re.findall(r"^-- (.+)$", shared, flags=re.MULTILINE))


def test_every_word_list_is_drawn_from():
    scripts = "".join(path.read_text() for path in FOLDER.glob("*.txt"))
    in_slots = {name.lower() for name in re.findall(r"\{(?:[Aa] )?(\w+)(?:=\w+)?\}", scripts)}
    in_roles = {
        name for line in re.findall(r"^[a-z_=][^:\n]*: (.+)$", scripts, re.MULTILINE) for name in line.split(" + ")
    }
    in_casts = {name for lists in CHARACTERS.values() for name in lists}
    assert set(load_library().book.lists) <= in_slots | in_roles | in_casts


def test_no_word_is_twice_in_a_list_or_in_the_lists_of_a_role():
    """Else a text would have two parses."""
    book = load_library().book
    groups = {**book.lists, **{f"looks of {thing}": looks for thing, looks in book.looks.items()}}
    for kind, names in (("things", book.thing_lists), ("places", book.place_lists)):
        groups[f"all {kind}"] = tuple(word for name in names for word in book.lists[name])
    assert all(words and all(words) and len(set(words)) == len(words) for words in groups.values())


def test_importing_the_package_reads_no_script():
    program = "import slmkit.data.stories, slmkit.data.stories.script as s; print(s.load_library.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"0\n"


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("plots_one.txt", "* {hero} was {gloomy}.", "gloomy"),
        ("plots_one.txt", "* {hero.kindness}", "kindness"),
        ("plots_one.txt", "* {hero} [ran|ran].", "different alternatives"),
        ("plots_one.txt", "* {hero} [ran", "without"),
        ("plots_one.txt", "* A {thing}.", "article"),
        ("plots_one.txt", "! hero owns thing", "owns"),
        ("plots_one.txt", "! hero has moon", "moon"),
        ("plots_one.txt", "> beginning", "beginning"),
        ("plots_one.txt", "And then?", "no beat"),
        ("plots_one.txt", "enemy: dragon", "dragon"),
        ("words.txt", "= pair: colour + taste", "taste"),
    ],
)
def test_a_mistake_names_the_file_and_the_line(file: str, line: str, problem: str, tmp_path: Path):
    for name, text in WORLD.items():
        (tmp_path / name).write_text(text)
    number = len(WORLD[file].splitlines()) + 1
    (tmp_path / file).write_text(WORLD[file].rstrip("\n") + f"\n{line}\n")
    with pytest.raises(ScriptError, match=rf"{re.escape(file)}:{number}: .*{problem}"):
        load_library(tmp_path)
