"""Words and word n-grams as 64-bit hashes, for many texts at once with array operations.

A word is a run of letters and digits, case ignored; in scripts without spaces between words, one character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmkit.data.order import random_keys

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
