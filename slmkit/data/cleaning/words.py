"""What texts are made of: words and word n-grams as 64-bit hashes, those of evaluation texts, letters and scripts.

A word is a run of letters and digits, case ignored; in scripts without spaces between words, one character.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from slmkit.config import UserError, did_you_mean
from slmkit.data.order import random_keys
from slmkit.data.sources import BadRow, open_source
from slmkit.data.sources.files import local_file
from slmkit.data.sources.folders import find
from slmkit.data.sources.rows import ROWS
from slmkit.data.sources.settings import SourceSettings

_LETTERS = b"0123456789abcdefghijklmnopqrstuvwxyz" + bytes(range(0x80, 0x100))
IS_WORD = np.isin(np.arange(256), np.frombuffer(_LETTERS, dtype=np.uint8))
WIDE, WIDER = 0xE0, 0xF0  # smallest first byte of UTF-8 characters of three bytes, and of four
PUNCTUATION = {0xC2: range(0x80, 0xC0), 0xE2: (0x80, 0x81), 0xE3: (0x80,)}  # « “ … 。 by their first two bytes
BYTE_KEYS = np.where(IS_WORD, random_keys(256, 1), np.uint64(0))
PLACES = random_keys(64, 2) | np.uint64(1)  # factors by place: of a byte in a word, of a word in an n-gram


class HashedWords(NamedTuple):
    """Words of several texts: hashes uint64 [words], each text's first word and one past its last int64 [texts]."""

    hashes: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @property
    def counts(self) -> np.ndarray:  # int64 [texts]
        return self.stops - self.starts


def hash_words(texts: Sequence[str]) -> HashedWords:
    """The hashed words of each text, in order."""
    encoded = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
    text_bytes = np.frombuffer(b"\n".join([*encoded, b""]), dtype=np.uint8)  # each text ends with a line end
    text_stops = np.cumsum([len(text) + 1 for text in encoded])
    is_word, begins = _words_in(text_bytes)
    places = np.flatnonzero(begins)
    stops = np.searchsorted(places, text_stops)
    if not len(places):
        return HashedWords(np.zeros(0, dtype=np.uint64), stops, stops)
    lengths = np.diff(places, append=len(text_bytes))
    place_in_word = np.arange(places[0], len(text_bytes)) - np.repeat(places, lengths)
    keys = np.where(is_word, BYTE_KEYS[text_bytes], 0)[places[0] :] * PLACES[place_in_word % len(PLACES)]
    hashes = _mixed(np.add.reduceat(keys, places - places[0]))
    return HashedWords(hashes, np.concatenate([[0], stops[:-1]]), stops)


def hash_runs(words: HashedWords, length: int, full: bool = False) -> HashedWords:
    """All n-grams of `length` words within a text; a text with fewer words is one n-gram, or with `full` none."""
    total = np.zeros(len(words.hashes), dtype=np.uint64)
    stop_of_word = np.repeat(words.stops, words.counts)
    place = np.arange(len(total))
    for number in range(min(length, len(total))):
        following = words.hashes[number:] * PLACES[number % len(PLACES)]
        is_within = (place + number < stop_of_word)[: len(following)]
        total[: len(following)] += np.where(is_within, following, 0)
    kept = place + length <= stop_of_word
    if not full:
        kept |= place == np.repeat(words.starts, words.counts)
    stops = np.concatenate([[0], np.cumsum(kept)])[words.stops]
    return HashedWords(_mixed(total[kept]), np.concatenate([[0], stops[:-1]]), stops)


def any_in(sorted_keys: np.ndarray, words: HashedWords) -> np.ndarray:
    """Whether any hash of each text is in `sorted_keys` (uint64 [keys]): bool [texts]."""
    if not len(sorted_keys) or not len(words.hashes):
        return np.zeros(len(words.starts), dtype=bool)
    found = sorted_keys[np.minimum(np.searchsorted(sorted_keys, words.hashes), len(sorted_keys) - 1)] == words.hashes
    before = np.concatenate([[0], np.cumsum(found)])
    return before[words.stops] > before[words.starts]


def _words_in(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which bytes, uint8 [bytes], belong to words, and which begin one: bool [bytes] each."""
    is_word = IS_WORD[text]
    is_apart = np.zeros(len(text), dtype=bool)  # bytes of characters that are words by themselves
    for first, seconds in PUNCTUATION.items():
        found = np.flatnonzero(text == first)
        found = found[np.isin(text[found + 1], seconds)]  # the text ends with a line end
        for place in range(2 if first < WIDE else 3):
            is_word[found + place] = False
    wide = np.flatnonzero((text >= WIDE) & is_word)
    for place in range(3):
        is_apart[wide + place] = True
    is_apart[np.flatnonzero(text >= WIDER) + 3] = True
    before = np.concatenate([[False], is_word[:-1]])
    was_apart = np.concatenate([[False], is_apart[:-1]])
    return is_word, is_word & (~before | (text >= WIDE) | (was_apart & ~is_apart))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix the bits of sums of products, uint64 [n] → uint64 [n]."""
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(32))


# -- evaluation texts, for the contamination check ---------------------------------------------------------------------

KINDS = (".txt", ".jsonl", ".json", ".csv")


def evaluation_runs(paths: Sequence[str], length: int) -> np.ndarray:
    """The n-grams of `length` words in all text columns of these files, hashed: uint64 [runs], sorted.

    Raises `UserError` for unreadable files, and if no text is that long.
    """
    found = [hash_runs(hash_words([text]), length, full=True).hashes for text in _all_texts(paths)] if paths else []
    runs = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.uint64)
    if paths and not len(runs):
        raise UserError(f"{paths[0]}: no text in it has {length} words; lower evaluation_words")
    return runs


def _all_texts(paths: Sequence[str]) -> Iterator[str]:
    for path in itertools.chain.from_iterable(find(Path(path), KINDS, split=None).paths for path in paths):
        file = local_file(path)
        if file.kind == ".txt":
            yield from (document.text for document, _ in open_source(SourceSettings(path=str(path))).read())
            continue
        for row in ROWS[file.kind](file, {}):
            if isinstance(row.value, BadRow):
                raise UserError(row.value.message)
            yield "\n".join(_texts(row.value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


# -- letters and scripts -----------------------------------------------------------------------------------------------

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
