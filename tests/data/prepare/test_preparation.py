"""Shards of a large text: the same whatever the number of threads, shuffled by seed, and gone on with after a kill."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slmkit.config import UserError
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.shards import folder
from slmkit.data.shards.folder import cut
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document
from tests.data.byte_tokenizer import ByteTokenizer
from tests.data.prepare.test_text_to_shards import documents_in

TOKENIZER = ByteTokenizer()
TEXTS = [f"document {i} " + "word " * (i % 13) for i in range(500)]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmkit.data.prepare.text_to_shards.BATCH_CHARACTERS", 300)


def prepare(directory: Path, texts: list[str] = TEXTS, **options: object) -> TokenShards:
    return prepare_text(iter(texts), TOKENIZER, directory, shard_characters=2000, **options)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_number_of_workers_changes_no_byte(tmp_path: Path, seed: int | None):
    for workers in (1, 2, 7):
        prepare(tmp_path / str(workers), workers=workers, shuffle_seed=seed)
    expected = files(tmp_path / "1")
    assert len(expected) > 20
    assert files(tmp_path / "2") == files(tmp_path / "7") == expected


def test_shards_hold_whole_documents_in_order(tmp_path: Path):
    shards = prepare(tmp_path / "shards")
    assert documents_in(shards) == [[*text.encode(), 256] for text in TEXTS]
    assert len(shards.header.shards) == 11
    assert sum(shard.documents for shard in shards.header.shards) == len(TEXTS)
    assert shards.header.text_bytes == sum(map(len, TEXTS))
    shards.verify()


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[:3]])
def test_a_shuffle_is_a_permutation_that_the_seed_names(tmp_path: Path, texts: list[str]):
    ordered = documents_in(prepare(tmp_path / "ordered", texts))
    one = documents_in(prepare(tmp_path / "one", texts, shuffle_seed=1))
    assert sorted(one) == sorted(ordered)
    assert one == documents_in(prepare(tmp_path / "again", texts, shuffle_seed=1))
    if len(texts) > 100:
        other = documents_in(prepare(tmp_path / "other", texts, shuffle_seed=2))
        assert ordered != one != other
        places = np.array([ordered.index(document) for document in one])
        # Far from where they were: a shuffle within shards would leave a correlation of nearly 1.
        assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.15
        first_shard = places[: len(places) // 11]
        assert np.ptp(first_shard) > 0.8 * len(places)
    assert TokenShards.open(tmp_path / "one").header.shuffle_seed == 1
    names = TokenShards.open(tmp_path / "one").header.file_sizes()
    assert sorted(os.listdir(tmp_path / "one")) == sorted([*names, "header.json"])


def test_cutting_knows_the_documents_alone():
    documents = [Document("a" * 10, ends=i % 3 == 2) for i in range(30)]
    works = list(cut(documents, 60, 25))
    assert [document for work in works for document in work.documents] == documents
    shards = [[work for work in works if work.shard == number] for number in range(works[-1].shard + 1)]
    assert [[len(work.documents) for work in shard] for shard in shards] == [[3, 3]] * 5
    assert all(shard[-1].documents[-1].ends for shard in shards)


class Killed(BaseException):
    """Stands for whatever ends a process."""


def until_killed(texts: list[str], count: int) -> Iterator[str]:
    yield from texts[:count]
    raise Killed


@pytest.mark.parametrize("seed", [None, 5])
def test_what_is_finished_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None):
    expected = files(prepare(tmp_path / "whole", shuffle_seed=seed).directory)
    with pytest.raises(Killed):
        prepare(tmp_path / "shards", until_killed(TEXTS, 400), shuffle_seed=seed)  # type: ignore[arg-type]
    partial = tmp_path / ".partial-shards" / ("" if seed is None else "ordered")
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("*.tokens")}
    assert 5 <= len(finished) < 11
    encoded: list[Document] = []
    monkeypatch.setattr(
        "slmkit.data.prepare.text_to_shards.encode",
        lambda tokenizer, part: encoded.extend(part) or folder.encode(tokenizer, part),
    )
    stamps = {path.name: path.stat().st_ino for path in finished}
    shards = prepare(tmp_path / "shards", shuffle_seed=seed)
    assert files(shards.directory) == expected
    assert 0 < len(encoded) <= len(TEXTS) - sum(shard.documents for shard in shards.header.shards[: len(finished)]) + 5
    if seed is None:
        assert all((shards.directory / name).stat().st_ino == inode for name, inode in stamps.items())
    assert sorted(os.listdir(tmp_path)) == ["shards", "whole"]


def test_a_finished_shard_of_other_text_or_another_tokenizer_or_a_damaged_one_is_made_again(tmp_path: Path):
    for case in ("text", "tokenizer", "damage"):
        directory = tmp_path / case
        with pytest.raises(Killed):
            prepare(directory, until_killed(TEXTS, 400))  # type: ignore[arg-type]
        texts, tokenizer = list(TEXTS), TOKENIZER
        if case == "text":
            texts[3] = texts[3].replace("document", "DOCUMENT")
        elif case == "tokenizer":
            tokenizer = ByteTokenizer(fingerprint="another")
        else:
            damaged = tmp_path / ".partial-damage" / "00002.tokens"
            damaged.write_bytes(damaged.read_bytes()[:-2] + b"\0\0")
        shards = prepare_text(texts, tokenizer, directory, shard_characters=2000)
        shards.check_tokenizer(tokenizer)
        shards.verify()
        assert documents_in(shards) == [[*text.encode(), 256] for text in texts]


def test_fewer_documents_than_before_leave_nothing_of_the_rest(tmp_path: Path):
    with pytest.raises(Killed):
        prepare(tmp_path / "shards", until_killed(TEXTS, 400))  # type: ignore[arg-type]
    shards = prepare(tmp_path / "shards", TEXTS[:100])
    assert documents_in(shards) == [[*text.encode(), 256] for text in TEXTS[:100]]
    assert len(os.listdir(shards.directory)) == 1 + 2 * len(shards.header.shards)


def test_an_error_before_the_first_shard_leaves_nothing(tmp_path: Path):
    with pytest.raises(Killed):
        prepare(tmp_path / "shards", until_killed(TEXTS, 10))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there is no text to prepare"):
        prepare(tmp_path / "shards", [])
    assert os.listdir(tmp_path) == []


def slow_preparation(directory: str) -> None:
    """Run in a process of its own, to be killed."""

    def slowly() -> Iterator[str]:
        for text in TEXTS:
            time.sleep(0.005)
            yield text
        time.sleep(600)

    prepare_text(slowly(), TOKENIZER, directory, shard_characters=2000)


def test_a_killed_process_leaves_shards_to_go_on_with(tmp_path: Path):
    shards = str(tmp_path / "shards")
    code = f"from tests.data.prepare.test_preparation import slow_preparation; slow_preparation({shards!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 240
    while len(finished := list(tmp_path.glob(".partial-shards/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    inodes = {path.stem: path.with_suffix(".tokens").stat().st_ino for path in finished}
    assert len(inodes) >= 3
    assert not (tmp_path / "shards").exists()
    shards = prepare(tmp_path / "shards")
    assert files(shards.directory) == files(prepare(tmp_path / "whole").directory)
    assert all((shards.directory / f"{name}.tokens").stat().st_ino == inode for name, inode in inodes.items())


def on_a_full_disk(directory: str) -> None:
    """Run in a process of its own: no file there may grow beyond 50 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    texts = ["short"] * 2000 + ["long " * 10_000]
    try:
        prepare_text(texts, TOKENIZER, directory, shard_characters=2000)
    except UserError as error:
        print(error)


def test_a_full_disk_is_one_line_and_finished_shards_stay(tmp_path: Path):
    code = (
        f"from tests.data.prepare.test_preparation import on_a_full_disk; on_a_full_disk({str(tmp_path / 'shards')!r})"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "no space left" in output
    assert "the same call continues" in output
    assert output.count("\n") == 1
    assert os.listdir(tmp_path) == [".partial-shards"]
    names = [path.name for path in (tmp_path / ".partial-shards").iterdir()]
    assert all(name.split(".")[0] + ".json" in names for name in names)
