"""Leaves documents out, and counts for which reason.

Single documents are checked in threads, a batch at a time; duplicates are decided in order, so that the result does
not depend on the number of threads. Memory: the documents of a few batches (the longest whole, unless
`max_characters` drops it while it is read), and for every kept document 8 bytes for exact duplicates and 8 bytes per
band for near-duplicates (`bands_and_rows`; 72 bytes at a threshold of 0.8).
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np

from slmkit.data.cleaning.duplicates import SeenKeys, band_keys, bands_and_rows
from slmkit.data.cleaning.words import any_in, check_scripts, evaluation_runs, hash_runs, hash_words, shares
from slmkit.data.ordered_map import batches, ordered_map
from slmkit.data.settings import CleaningSettings
from slmkit.data.sources import Document

BATCH_CHARACTERS = 1 << 20
EXACT, NEAR = "exact duplicate", "near duplicate"

Pieces = list[Document]  # the pieces of one document


class _Checks(NamedTuple):
    """For a batch of documents: the reason to leave each out, or None, and the keys for duplicates."""

    reasons: list[str | None]
    exact: np.ndarray  # uint64 [documents, 1]
    bands: np.ndarray  # uint64 [documents, bands]


class Cleaner:
    """Cleans one corpus, and counts the documents read and those dropped for each reason.

    Raises `UserError` for unknown scripts and unreadable evaluation files.
    """

    def __init__(self, settings: CleaningSettings) -> None:
        self.settings, self.documents, self.dropped = settings, 0, Counter[str]()
        self.scripts = tuple(settings.scripts)
        check_scripts(self.scripts)
        self.forbidden = evaluation_runs(settings.evaluation, settings.evaluation_words)
        self.bands, self.rows = bands_and_rows(settings.near_duplicates) if settings.near_duplicates else (0, 0)
        self.seen_exact, self.seen_near = SeenKeys(), SeenKeys()

    def clean(self, documents: Iterable[Document], pool: Executor, workers: int) -> Iterator[Document]:
        """The documents that are kept, in order."""
        if not self.settings.is_active:
            yield from documents
            return
        wholes = whole_documents(documents, self.settings.max_characters)
        in_batches = batches(wholes, lambda pieces: 1 + sum(len(piece.text) for piece in pieces), BATCH_CHARACTERS)
        for batch, checks in ordered_map(pool, self._checked, in_batches, ahead=2 * workers):
            reasons = checks.reasons
            if self.settings.exact_duplicates:
                _drop_seen(reasons, self.seen_exact, checks.exact, EXACT)
            if self.bands:
                _drop_seen(reasons, self.seen_near, checks.bands, NEAR)
            self.documents += len(batch)
            self.dropped.update(reason for reason in reasons if reason)
            yield from (piece for pieces, reason in zip(batch, reasons) if reason is None for piece in pieces)

    def report(self) -> dict[str, Any] | None:
        """Settings and counts for the header of shards; None without cleaning."""
        if not self.settings.is_active:
            return None
        settings = self.settings.model_dump(mode="json", exclude_defaults=True)
        kept, dropped = self.documents - self.dropped.total(), dict(self.dropped.most_common())
        return {"settings": settings, "documents": self.documents, "kept": kept, "dropped": dropped}

    def why_nothing(self) -> str:
        """For the error if no document is left: ` (of 1,000 documents: 0 kept; dropped 1,000 too short)`."""
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f" (of {self.documents:,} documents: 0 kept; dropped {dropped})" if self.documents else ""

    def _checked(self, batch: Sequence[Pieces]) -> _Checks:
        texts = ["".join(piece.text for piece in pieces) for pieces in batch]
        words = functools.cache(lambda: hash_words(texts))
        reasons = [self._odd_characters(text) for text in texts]
        if self.settings.min_words or self.settings.max_words:
            counts = words().counts.tolist()
            reasons = [
                reason or _odd_length(count, self.settings.min_words, self.settings.max_words)
                for reason, count in zip(reasons, counts)
            ]
        if len(self.forbidden):
            is_tainted = any_in(self.forbidden, hash_runs(words(), self.settings.evaluation_words, full=True))
            reasons = [reason or ("evaluation text" if bad else None) for reason, bad in zip(reasons, is_tainted)]
        bands = band_keys(words(), self.bands, self.rows) if self.bands else np.zeros((len(texts), 0), np.uint64)
        return _Checks(reasons, _exact_keys(texts) if self.settings.exact_duplicates else bands, bands)

    def _odd_characters(self, text: str) -> str | None:
        asked = self.settings
        if reason := _odd_length(len(text), asked.min_characters, asked.max_characters):
            return reason
        if self.scripts or asked.min_letter_share:
            letters, wanted = shares(text, self.scripts)
            if letters < (asked.min_letter_share or 0):
                return "few letters"
            if self.scripts and wanted < asked.min_script_share:
                return "another script"
        return None


def _odd_length(length: int, least: int | None, most: int | None) -> str | None:
    if length < (least or 0):
        return "too short"
    return "too long" if length > (most or length) else None


def whole_documents(documents: Iterable[Document], max_characters: int | None) -> Iterator[Pieces]:
    """The pieces of each document together; a document is truncated shortly after `max_characters`."""
    pieces: Pieces = []
    characters = 0
    for document in documents:
        characters += len(document.text)
        if max_characters is None or characters - len(document.text) <= max_characters:
            pieces.append(document)
        if document.ends:
            yield pieces
            pieces, characters = [], 0


def _exact_keys(texts: Sequence[str]) -> np.ndarray:
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 1)


def _drop_seen(reasons: list[str | None], seen: SeenKeys, keys: np.ndarray, reason: str) -> None:
    comparable = (keys != 0).any(axis=1).tolist()  # texts without words have keys of 0
    left = [index for index, other in enumerate(reasons) if other is None and comparable[index]]
    for index, is_new in zip(left, seen.new_ones(keys[left]).tolist()):
        if not is_new:
            reasons[index] = reason
