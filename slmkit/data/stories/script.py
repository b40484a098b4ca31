"""The library of plots: reads the plot files and turns each plot into templates that are ready to be told.

A plot file is text. A line that begins with a space continues the line before it.

    # a comment
    -- opening                     a fragment: beats that several plots share
    == the broken kite             a plot; first who and what is in it
    hero: anyone                     a character: anyone, animal, child or grownup
    thing: toy + treasure            a thing, from these lists; every plot has a `hero` and a `thing`
    place: open                      a place, from these lists
    > opening                        the beats of a fragment, as if they stood here
    * One way to tell a beat.        a beat: one of the lines that begin with `*`, in a row, is told
    * Another way to tell it.        (an empty one leaves the beat out); a blank line ends the beat
    ! hero has thing                 a fact that holds after it, whichever way was told
    ! needs hero has thing           a fact that must hold here: telling fails where it does not
    ? Why was {hero} sad? => ...     a question and its answer, asked of the story that has been told

What stands in a beat is described in `template`; the relations of facts are the headings of `forms.txt`, and
questions follow from the facts. A slot, list, fragment or relation that is unknown is an error naming file and line.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

from slmkit.data.stories.teller import CHARACTERS, AskedOf, Form, Library, Plot, Role
from slmkit.data.stories.template import Node, Scope, Template, alternatives, parse_note, parse_template
from slmkit.data.stories.words import WHOLE, ScriptError, WordBook, load_words

FOLDER = Path(__file__).parent
PRIMER_PLOTS = "primer.txt"
ROLE_LINE = re.compile(r"([a-z_]+\d?): (.+)")


class Line(NamedTuple):
    """A line of a script file, and its file and line number."""

    text: str
    where: str


@functools.cache
def load_library(folder: Path = FOLDER, plots: str = "plots_*.txt", world: float = WHOLE) -> Library:
    """The words, forms and shared beats of a folder, and the plots of all files whose name matches; cached.

    A smaller `world` has this share of the words and plots, but all plots of the primer. A story of it is a story of
    the whole world, too.
    """
    book = load_words(folder / "words.txt", world)
    forms = _load_forms(folder / "forms.txt", book)
    fragments: dict[str, list[Line]] = {}
    sections: dict[str, list[Line]] = {}
    for path in sorted([folder / "shared.txt", *folder.glob(plots)]):
        _sort_sections(path, fragments, sections)
    names = sorted(sections) if plots == PRIMER_PLOTS else _part_of(sections, world)
    read = (_read_plot(name, sections[name], fragments, book, forms.keys()) for name in names)
    return Library(book, tuple(read), forms)


def _part_of(names: Iterable[str], share: float) -> list[str]:
    """Sorted names, or a share of them that a larger share contains."""
    names = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return sorted(names[: math.ceil(share * len(names))])


def read_lines(path: Path) -> Iterator[Line]:
    """Lines without comments, with continuation lines joined; blank lines are kept."""
    pending: Line | None = None
    for number, raw in enumerate(path.read_text(encoding="ascii").splitlines(), start=1):
        text = raw.rstrip()
        if text.startswith("#"):
            continue
        if text.startswith(" ") and pending:
            pending = Line(f"{pending.text} {text.strip()}", pending.where)
            continue
        if pending:
            yield pending
        pending = Line(text, f"{path.name}:{number}")
    if pending:
        yield pending


def _sort_sections(path: Path, fragments: dict[str, list[Line]], plots: dict[str, list[Line]]) -> None:
    """Add the lines of each `--` fragment and each `==` plot to the dictionaries by name."""
    section: list[Line] | None = None
    for line in read_lines(path):
        mark, name = line.text[:2], line.text[2:].strip()
        if mark in ("--", "=="):
            sections = fragments if mark == "--" else plots
            if name in sections:
                raise ScriptError(f"{line.where}: a second section named {name!r}")
            section = sections[name] = []
        elif section is not None:
            section.append(line)
        elif line.text:
            raise ScriptError(f"{line.where}: text before the first `--` or `==` heading")


def _expand(lines: list[Line], fragments: dict[str, list[Line]]) -> Iterator[Line]:
    """The lines of a plot with its fragments inserted."""
    for line in lines:
        if not line.text.startswith(">"):
            yield line
            continue
        name = line.text[1:].strip()
        if name not in fragments:
            raise ScriptError(f"{line.where}: no fragment is named {name!r}; there are {sorted(fragments)}")
        blank = Line("", line.where)  # separates a fragment's beats from those around it
        yield from _expand([blank, *fragments[name], blank], fragments)


def _read_plot(
    name: str, lines: list[Line], fragments: dict[str, list[Line]], book: WordBook, relations: Set[str]
) -> Plot:
    """Read one plot, its fragments included."""
    expanded = list(_expand(lines, fragments))
    roles = {role.name: role for line in expanded if (role := _role(line, book))}
    if not {"hero", "thing"} <= set(roles):
        raise ScriptError(f"plot {name!r} needs a `hero` and a `thing`")
    remembered = {word for line in expanded for word in re.findall(r"=(\w+)\}", line.text)}
    sorts = dict.fromkeys(remembered, "word") | {role.name: role.sort for role in roles.values()}
    scope = Scope(book, sorts, relations)
    nodes: list[Node] = []
    questions: list[AskedOf] = []
    beat: list[Line] = []
    for line in [*expanded, Line("", "")]:
        if beat and not line.text.startswith("*"):
            nodes += _beat(beat, scope)
            beat = []
        if line.text.startswith("*"):
            beat.append(line)
        elif line.text.startswith("!"):
            nodes.append(parse_note(line.text[1:], scope, line.where))
        elif line.text.startswith("?"):
            questions.append(_asked_of(line.text[1:], scope, line.where))
        elif line.text and not ROLE_LINE.fullmatch(line.text):
            raise ScriptError(f"{line.where}: a line that is no beat, fact, question, role or fragment: {line.text!r}")
    return Plot(name, roles, tuple(nodes), tuple(questions))


def _role(line: Line, book: WordBook) -> Role | None:
    """The role that a line like `hero: animal` declares; None for another line."""
    match = ROLE_LINE.fullmatch(line.text)
    if match is None:
        return None
    lists = tuple(part.strip() for part in match[2].split("+"))
    if len(lists) == 1 and lists[0] in CHARACTERS:
        return Role(match[1], "character", lists)
    for sort, known in (("thing", book.thing_lists), ("place", book.place_lists)):
        if known.issuperset(lists):
            return Role(match[1], sort, lists)
    raise ScriptError(f"{line.where}: {match[2]!r} is neither a class of characters nor lists of things or of places")


def _beat(lines: list[Line], scope: Scope) -> Template:
    """One beat: its only way, or the choice between its ways; each begins with the space after the beat before."""
    texts = [line.text[1:].strip() for line in lines]
    ways = [parse_template(f" {text}" if text else "", scope, line.where) for text, line in zip(texts, lines)]
    return ways[0] if len(ways) == 1 else (alternatives(ways, texts, lines[0].where),)


def _asked_of(text: str, scope: Scope, where: str) -> AskedOf:
    """A line `Question? => Answer.`"""
    question, arrow, answer = (part.strip() for part in text.partition("=>"))
    if not arrow:
        raise ScriptError(f"{where}: expected `Question? => Answer.`, found {text!r}")
    return AskedOf(parse_template(question, scope, where), parse_template(answer, scope, where))


def _load_forms(path: Path, book: WordBook) -> dict[str, Form]:
    """The forms of questions: `= relation` or `= relation: last of object`, then wordings with {s}, {o} and {r}."""
    forms: dict[str, Form] = {}
    relation = ""
    scope = Scope(book, dict.fromkeys("sor", "anything"), set())
    for line in read_lines(path):
        if line.text.startswith("="):
            relation, _, rule = (part.strip() for part in line.text[1:].partition(":"))
            forms[relation] = Form(rule.removeprefix("last of "))
        elif line.text:
            wordings = (*forms[relation].wordings, _asked_of(line.text, scope, line.where))
            forms[relation] = Form(forms[relation].last_of, wordings)
    return forms
