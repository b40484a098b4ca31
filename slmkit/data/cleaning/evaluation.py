"""Evaluation text as hashed n-grams of words, for the contamination check."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.config import UserError
from slmkit.data.cleaning.words import hash_runs, hash_words
from slmkit.data.sources import BadRow, open_source
from slmkit.data.sources.files import local_file
from slmkit.data.sources.folders import find
from slmkit.data.sources.rows import ROWS
from slmkit.data.sources.settings import SourceSettings

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
