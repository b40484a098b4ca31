"""What was stored of a teacher comes back with its row, and a writer that was killed goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.mixture import Phase
from slmkit.data.rows.teacher_cache import (
    HEADER,
    IDS,
    LOGITS,
    POSITIONS,
    PROGRESS,
    REST,
    CacheHeader,
    learned_starts,
    read_header,
    with_cached_logits,
    write_cache,
)
from slmkit.data.stream import MixtureStream, Rows, Stream

LENGTH, K = 6, 3


class Numbered(Rows):
    """Row i of source s learns i % LENGTH + 1 positions, which its ids tell apart from all others'."""

    rows_in_epoch = 0

    def __init__(self, source: int, count: int) -> None:
        self.source, self.rows_in_epoch = source, count

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = 1_000 * self.source + 10 * index + np.arange(LENGTH)
        labels = ids + 1
        labels[: LENGTH - 1 - index % LENGTH] = -100
        return ids, labels

    def documents(self, index: int) -> np.ndarray:
        return np.zeros(LENGTH, dtype=np.int64)


SOURCES: dict[str, Rows] = {"a": Numbered(1, 7), "b": Numbered(2, 10)}
WANTED = CacheHeader("t" * 64, "k" * 64, "d" * 64, "text", False, LENGTH, rows=17, tokens=70_000, k=K, temperature=2.0)


def answer(batch: Batch) -> np.ndarray:
    """Records that say of which position they are."""
    learned = batch.ids[batch.labels != -100].numpy()
    records = np.zeros(len(learned), WANTED.record)
    records["ids"], records["logits"], records["rest"] = learned[:, None] + [0, 1, 2], [0, -1, -2], -learned
    return records


def write(folder: Path, header: CacheHeader = WANTED, asked=answer, rows_at_once: int = 4) -> list[int]:
    """Returns the rows after which progress was told."""
    told: list[int] = []
    starts = learned_starts(SOURCES.values())
    write_cache(folder, header, SOURCES, starts, asked, rows_at_once, lambda rows, positions, size: told.append(rows))
    return told


def test_every_row_comes_with_what_was_said_of_its_learned_positions(tmp_path: Path) -> None:
    assert write(tmp_path) == [4, 8, 12, 16, 17]
    assert read_header(tmp_path) == WANTED
    for source, rows in with_cached_logits(SOURCES, tmp_path, WANTED).items():
        for index in range(rows.rows_in_epoch):
            ids, labels = rows.row(index)
            np.testing.assert_array_equal(ids, SOURCES[source].row(index)[0])
            learned, extra = ids[labels != -100], rows.extra(index)
            assert extra[LOGITS].shape == extra[IDS].shape == (LENGTH, K)
            np.testing.assert_array_equal(extra[IDS][: len(learned), 0], learned)
            np.testing.assert_array_equal(extra[REST], [*-learned, *[0] * (LENGTH - len(learned))])


def test_streams_carry_it_with_every_row(tmp_path: Path) -> None:
    write(tmp_path)
    rows = with_cached_logits(SOURCES, tmp_path, WANTED)
    mixture = MixtureStream(rows, [Phase(None, (0.5, 0.5))], "repeat", rows_per_step=8)
    for stream in (Stream(rows["b"], 8), mixture):
        for step in range(4):
            batch = stream.batch(step)
            learned = batch.labels != -100
            for row in range(8):
                count = int(learned[row].sum())
                assert (batch.extra[IDS][row, :count, 0] == batch.ids[row][learned[row]]).all()


def test_a_writer_that_was_killed_goes_on_and_leaves_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmkit.data.rows.teacher_cache.ROWS_BETWEEN_SYNCS", 4)
    write(tmp_path / "whole", rows_at_once=2)

    def killed(batch: Batch) -> np.ndarray:
        if batch.ids[0, 0] >= 2_030:  # row 10 of all
            raise KeyboardInterrupt
        return answer(batch)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", asked=killed, rows_at_once=2)
    with pytest.raises(UserError, match="was not finished: the same `slm distill-cache` goes on"):
        read_header(tmp_path / "cut")
    assert write(tmp_path / "cut", rows_at_once=2) == [10, 12, 14, 16, 17]  # what was written after row 8 is done again
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "cut" / PROGRESS).exists()
    assert write(tmp_path / "cut") == []  # all of it is there


@pytest.mark.parametrize("change", [{"data": "e" * 64}, {"teacher": "u" * 64}, {"length": 7}, {"temperature": 1.0}])
def test_another_cache_is_neither_gone_on_with_nor_overwritten(tmp_path: Path, change: dict) -> None:
    write(tmp_path)
    before = (tmp_path / POSITIONS).read_bytes()
    with pytest.raises(UserError, match=f"holds another cache .{next(iter(change))}"):
        write(tmp_path, dataclasses.replace(WANTED, **change))
    assert (tmp_path / POSITIONS).read_bytes() == before
    difference = read_header(tmp_path).difference(dataclasses.replace(WANTED, **change))
    assert difference is not None
    assert difference.startswith(next(iter(change)))


def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / POSITIONS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="delete it and make it again"):
        read_header(tmp_path)
    (tmp_path / HEADER).write_text(json.dumps(dataclasses.asdict(WANTED) | {"version": 99}))
    with pytest.raises(UserError, match="slmkit-teacher 99, this slmkit reads slmkit-teacher 1"):
        read_header(tmp_path)
    (tmp_path / HEADER).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_header(tmp_path)
    with pytest.raises(UserError, match="make it with `slm distill-cache`"):
        read_header(tmp_path / "none")


def test_ids_are_as_narrow_as_the_vocabulary_allows() -> None:
    assert WANTED.record.itemsize == 4 + K * (2 + 4)
    assert dataclasses.replace(WANTED, tokens=65_536).record.itemsize == 4 + K * (2 + 2)
