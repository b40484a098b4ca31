"""Windows and whole documents in rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slmkit.data.packing import IGNORED, pack_whole, padded, row_of_labels, windows


@given(st.integers(0, 200), st.integers(1, 20))
def test_windows_fill_rows_and_leave_only_the_last_incomplete_one(n_tokens: int, length: int):
    starts = windows(n_tokens, length)
    labels = [start + 1 + offset for start in starts for offset in range(length)]
    assert labels == list(range(1, len(labels) + 1))
    assert max(labels, default=0) <= max(0, n_tokens - 1) < len(labels) + 1 + length


@settings(max_examples=200)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 25))
def test_packing_puts_every_document_in_one_row_that_holds_it(lengths: list[int], row_length: int):
    packing = pack_whole(lengths, row_length)
    assert packing.too_long == [i for i, length in enumerate(lengths) if length > row_length]
    placed = [index for row in packing.rows for index in row]
    assert sorted(placed + packing.too_long) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_length for row in packing.rows)
    assert packing == pack_whole(lengths, row_length)


def test_packing_takes_the_tightest_row_that_has_room():
    assert pack_whole([5, 8, 2, 5, 3], 10).rows == [[1, 2], [0, 3], [4]]
    lengths = np.random.default_rng(0).integers(1, 200, 5000)
    assert len(pack_whole(lengths, 1000).rows) <= lengths.sum() // 1000 + 2


def test_a_label_is_the_next_token_where_that_is_learned():
    ids, learned = np.array([10, 11, 12, 13]), np.array([True, False, True, True])
    assert row_of_labels(ids, learned).tolist() == [IGNORED, 12, 13, IGNORED]


def test_padding_stands_behind_and_what_is_too_long_is_cut():
    parts = [np.array([1, 2]), np.array([3])]
    assert padded(parts, 5, 9).tolist() == [1, 2, 3, 9, 9]
    assert padded(parts, 2, 9).tolist() == [1, 2]
