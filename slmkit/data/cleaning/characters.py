"""The shares of letters, and of letters of given scripts, in a text."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import regex

from slmkit.config import UserError, did_you_mean

# Listed in the error message for an unknown script; Unicode has 170.
USUAL_SCRIPTS = (
    "Latin", "Cyrillic", "Greek", "Han", "Hiragana", "Katakana", "Hangul", "Arabic", "Hebrew", "Devanagari",
)  # fmt: skip
SPACE, LETTER, WANTED = 1, 2, 4  # bits of a character's class


def shares(text: str, scripts: tuple[str, ...]) -> tuple[float, float]:
    """The share of letters among all characters but white space, and of these scripts' letters among all letters.

    Both are from 0 to 1; the second is 1 for a text without letters.
    """
    classes = class_table(scripts)[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")]
    counts = np.bincount(classes, minlength=8)
    letters, wanted = int(counts[LETTER] + counts[LETTER | WANTED]), int(counts[LETTER | WANTED])
    visible = len(text) - int(counts[SPACE])
    return letters / max(1, visible), wanted / letters if letters else 1.0


@functools.cache
def class_table(scripts: tuple[str, ...]) -> np.ndarray:
    """The class of every character: uint8 [0x110000]."""
    everything = "".join(map(chr, range(0x110000)))
    table = np.zeros(0x110000, dtype=np.uint8)
    patterns = [(r"\s+", SPACE), (r"\p{L}+", LETTER)]
    patterns += [(rf"[\p{{Script={script}}}&&\p{{L}}]+", WANTED) for script in scripts]
    for pattern, bit in patterns:
        for match in regex.finditer(pattern, everything, flags=regex.V1):
            table[match.start() : match.end()] |= bit
    return table


def check_scripts(scripts: Sequence[str]) -> None:
    """Raises `UserError` for an unknown script."""
    for script in scripts:
        try:
            regex.compile(rf"\p{{Script={script}}}")
        except regex.error:
            raise UserError(
                f"cleaning.scripts: Unicode has no script {script!r}; {did_you_mean(script, USUAL_SCRIPTS)}"
            ) from None
