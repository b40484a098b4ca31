"""Packing of tokens into rows: windows across documents, and whole documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

IGNORED = -100  # label that is not learned; cross-entropy's default


class Packing(NamedTuple):
    """`rows`: indices of the documents in each row, in order. `too_long`: documents longer than a row."""

    rows: list[list[int]]
    too_long: list[int]


def windows(n_tokens: int, length: int) -> range:
    """Starts of contiguous, full rows of `length` tokens; an incomplete last row is left out.

    A row at `start` has inputs [start, start + length) and labels one further, so every token but the first is a label
    at most once.
    """
    rows = max(0, n_tokens - 1) // length
    return range(0, rows * length, length)


def pack_whole(lengths: Sequence[int] | np.ndarray, row_length: int) -> Packing:
    """Pack whole documents into rows of `row_length` tokens by best-fit decreasing; `lengths` int [documents].

    Each document goes, longest first, into the fullest row that has room for it. Deterministic.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # by tokens left
    rooms = 0  # bit n is set if rows_with_room[n] is not empty: the best fit is the lowest set bit from `length` on
    too_long = []
    for index, length in zip(longest_first.tolist(), lengths[longest_first].tolist()):
        if length > row_length:
            too_long.append(index)
            continue
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
            rows[row].append(index)
        else:
            room, row = row_length, len(rows)
            rows.append([index])
        rows_with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return Packing(rows, sorted(too_long))


def row_of_labels(ids: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Next-token labels of a row: `labels[t] = ids[t + 1]` if `learned[t + 1]`, else `IGNORED`. All [length]."""
    labels = np.full(len(ids), IGNORED, dtype=np.int64)
    np.copyto(labels[:-1], ids[1:], where=learned[1:])
    return labels


def learned_ranges(learned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token of each learned range, and one past its last: bool [n] → int64 [ranges] each."""
    edges = np.diff(np.concatenate([[0], learned.astype(np.int8), [0]]))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def padded(parts: Iterable[np.ndarray], length: int, fill: int) -> np.ndarray:
    """Concatenate arrays [n], cut to `length` and right-pad with `fill`: int64 [length]."""
    row = np.full(length, fill, dtype=np.int64)
    end = 0
    for part in parts:
        part = part[: length - end]
        row[end : end + len(part)] = part
        end += len(part)
    return row


def numbered(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Document number of each token, 0, 1, …; padding has the next number. int [documents] → int64 [row_length]."""
    return padded([np.repeat(np.arange(len(lengths)), lengths)], row_length, len(lengths))
