"""Token shards: whole on disk or not there at all, and read back as they were written."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from slmkit.config import UserError
from slmkit.data.shards import reader as shards_module
from slmkit.data.shards import writer as shard_writer
from slmkit.data.shards.reader import TokenShards
from slmkit.data.shards.writer import write_shards
from tests.data.byte_tokenizer import ByteTokenizer
from tests.data.written_shards import written


def write(directory: Path, lengths: list[int], *, size: int = 260, masked: bool = False, **options: int) -> np.ndarray:
    """Documents of these lengths; the tokens that were written."""
    tokens = np.random.default_rng(0).integers(0, size, sum(lengths))
    written(directory, ByteTokenizer(size), tokens, np.cumsum(lengths), tokens % 2 if masked else None, **options)
    return tokens


@pytest.mark.parametrize(("size", "dtype"), [(260, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_what_is_written_is_read_back(tmp_path: Path, size: int, dtype: str):
    tokens = write(tmp_path / "shards", [3, 5, 4], size=size, masked=True)
    shards = TokenShards.open(tmp_path / "shards")
    assert len(shards) == 12
    assert shards.header.dtype == dtype == shards.tokens_in(0, 1).dtype.name
    assert np.array_equal(shards.tokens_in(0, 12), tokens)
    assert np.array_equal(shards.trained_in(2, 9), tokens[2:9] % 2 == 1)
    assert shards.document_ends.tolist() == [3, 8, 12]


@pytest.mark.parametrize("shard_tokens", [1, 2, 3, 5, 7, 11, 12, 100])
def test_any_range_is_read_across_shard_borders(tmp_path: Path, shard_tokens: int):
    tokens = write(tmp_path / "shards", [3, 5, 4, 1], shard_tokens=shard_tokens, masked=True)
    shards = TokenShards.open(tmp_path / "shards")
    assert len(shards.header.shards) == -(-13 // shard_tokens)
    assert shards.document_ends.tolist() == [3, 8, 12, 13]
    for start in range(14):
        for stop in range(start, 14):
            assert np.array_equal(shards.tokens_in(start, stop), tokens[start:stop])
            assert np.array_equal(shards.trained_in(start, stop), tokens[start:stop] % 2 == 1)
            runs = shards.runs([start, 0, 13 - (stop - start)], stop - start)
            assert np.array_equal(runs[0], tokens[start:stop])
            assert np.array_equal(runs[2], tokens[13 - (stop - start) :])
    for wrong in (-1, 13):
        with pytest.raises(IndexError):
            shards.tokens_in(wrong, wrong + 1)
        with pytest.raises(IndexError):
            shards.runs([0, wrong], 1)


def test_a_shard_knows_nothing_of_those_before_it(tmp_path: Path):
    write(tmp_path / "shards", [3, 5, 4], shard_tokens=6)
    assert np.fromfile(tmp_path / "shards" / "00000.ends", dtype="<i8").tolist() == [3]
    assert np.fromfile(tmp_path / "shards" / "00001.ends", dtype="<i8").tolist() == [2, 6]


def test_more_shards_than_files_may_be_open_are_read_by_threads_and_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards_module, "OPEN_FILES", 2)
    tokens = write(tmp_path, [40], shard_tokens=4)
    shards = TokenShards.open(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc").exists() else 0
    with ThreadPoolExecutor(4) as threads:
        read = threads.map(lambda start: shards.tokens_in(start, start + 4), list(range(36)) * 20)
        assert all(np.array_equal(found, tokens[start : start + 4]) for start, found in zip([*range(36)] * 20, read))
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 2
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(shards.tokens_in, (3, 30)), tokens[3:30])


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path):
    write(tmp_path, [3, 5])
    shards = TokenShards.open(tmp_path)
    os.truncate(tmp_path / "00000.tokens", 7)
    with pytest.raises(UserError, match=r"00000\.tokens: cut short since it was opened"):
        shards.runs([0], 8)
    write(tmp_path, [3, 5])
    other = TokenShards.open(tmp_path)
    (tmp_path / "00000.tokens").unlink()
    with pytest.raises(UserError, match=r"00000\.tokens: cannot be read: No such file"):
        other.tokens_in(0, 8)


def test_the_header_says_what_is_inside(tmp_path: Path):
    sources = [{"path": "a.txt", "bytes": 8, "sha256": "…"}]
    ids, ends = np.arange(8), np.array([4, 8])
    written(tmp_path / "shards", ByteTokenizer(), ids, ends, text_bytes=6, sources=sources, shard_tokens=5)
    header = json.loads((tmp_path / "shards" / "header.json").read_text())
    first, second = header.pop("shards")
    assert header == {
        "format": "slmkit-tokens",
        "version": 2,
        "dtype": "uint16",
        "tokenizer": "bytes" * 8,
        "vocab_size": 260,
        "eos_token_id": 256,
        "pad_token_id": 257,
        "tokens": 8,
        "documents": 2,
        "text_bytes": 6,
        "sources": sources,
        "masked": False,
        "judged": False,
        "perfect_loss": None,
        "shuffle_seed": None,
        "cleaning": None,
    }
    assert (first["name"], first["tokens"], first["documents"]) == ("00000", 5, 1)
    assert (second["name"], second["tokens"], second["documents"]) == ("00001", 3, 1)
    content = (tmp_path / "shards" / "00001.tokens").read_bytes()
    assert second["sha256"]["tokens"] == hashlib.sha256(content).hexdigest()
    assert sorted(os.listdir(tmp_path)) == ["shards"]


def test_another_tokenizers_shards_are_refused(tmp_path: Path):
    write(tmp_path / "shards", [3])
    shards = TokenShards.open(tmp_path / "shards")
    shards.check_tokenizer(ByteTokenizer())
    with pytest.raises(UserError, match="made by tokenizer bytesbytesby .* not by this one, another"):
        shards.check_tokenizer(ByteTokenizer(fingerprint="another"))


@pytest.mark.parametrize("name", ["00000.tokens", "00001.ends", "00000.trained"])
def test_a_truncated_or_missing_file_is_found_when_opening(tmp_path: Path, name: str):
    write(tmp_path, [3, 5], shard_tokens=6, masked=True)
    path = tmp_path / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match=f"{name}: has .* bytes where its header says"):
        TokenShards.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no token shards here"),
        ("{", "not a readable header.json: "),
        ("[]", "expected an object, found a list"),
        ('{"format": "slmkit-tokens", "version": 3}', "format version 3, this slmkit reads 2"),
        ('{"format": "slmkit-tokens", "version": 2, "shards": []}', "damaged header"),
    ],
)
def test_a_header_that_says_nothing_useful_is_refused(tmp_path: Path, content: str | None, expected: str):
    if content:
        (tmp_path / "header.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        TokenShards.open(tmp_path)


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path: Path):
    write(tmp_path, [3, 5])
    shards = TokenShards.open(tmp_path)
    shards.verify()
    path = tmp_path / "00000.tokens"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(UserError, match=r"00000\.tokens: its checksum is wrong"):
        shards.verify()


def test_a_new_preparation_replaces_the_old_one(tmp_path: Path):
    write(tmp_path / "shards", [3], shard_tokens=1)
    tokens = write(tmp_path / "shards", [5, 6])
    assert np.array_equal(TokenShards.open(tmp_path / "shards").tokens_in(0, 11), tokens)
    assert sorted(os.listdir(tmp_path)) == ["shards"]
    assert sorted(os.listdir(tmp_path / "shards")) == ["00000.ends", "00000.tokens", "header.json"]


def test_a_failed_preparation_leaves_what_was_there(tmp_path: Path):
    tokens = write(tmp_path / "shards", [3])

    def parts() -> Iterator[tuple[dict[str, np.ndarray], int]]:
        yield {"tokens": np.arange(8), "ends": np.array([8])}, 8
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "shards", ByteTokenizer(), parts())
    assert os.listdir(tmp_path) == ["shards"]
    assert np.array_equal(TokenShards.open(tmp_path / "shards").tokens_in(0, 3), tokens)


def test_the_directory_appears_only_when_all_of_it_is_on_disk(tmp_path: Path):
    def parts() -> Iterator[tuple[dict[str, np.ndarray], int]]:
        yield {"tokens": np.arange(8), "ends": np.array([8])}, 8
        assert not (tmp_path / "new" / "shards").exists()

    write_shards(tmp_path / "new" / "shards", ByteTokenizer(), parts())
    assert len(TokenShards.open(tmp_path / "new" / "shards")) == 8


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path):
    (tmp_path / ".partial-shards").mkdir()
    (tmp_path / ".partial-shards" / "00007.tokens").write_text("half")
    write(tmp_path / "shards", [3])
    assert os.listdir(tmp_path) == ["shards"]
    assert not (tmp_path / "shards" / "00007.tokens").exists()


def test_a_failed_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokens = write(tmp_path / "shards", [3])
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".partial"):
            raise PermissionError(1, "not permitted")
        replace(source, target)

    monkeypatch.setattr(shard_writer.os, "replace", failing)
    with pytest.raises(UserError, match="cannot be written: not permitted"):
        write(tmp_path / "shards", [5])
    assert np.array_equal(TokenShards.open(tmp_path / "shards").tokens_in(0, 3), tokens)


def test_a_directory_of_something_else_is_never_replaced(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not token shards"):
        write(tmp_path, [3])
    with pytest.raises(UserError, match="holds files that are not token shards"):
        write(tmp_path / "thesis.txt", [3])
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_nothing_to_write_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="there is no text"):
        write_shards(tmp_path / "shards", ByteTokenizer(), [])
    assert os.listdir(tmp_path) == []


def test_tokens_beyond_the_vocabulary_are_a_mistake(tmp_path: Path):
    with pytest.raises(ValueError, match="expected tokens below 260, found 0 to 260"):
        written(tmp_path / "shards", ByteTokenizer(), np.array([0, 260]), np.array([2]))


def full_disk(directory: str) -> None:
    """Run in a process of its own: files there may grow to 100 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        write(Path(directory), [40_000] * 4)
    except UserError as error:
        print(error)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path):
    tokens = write(tmp_path / "shards", [3])
    code = f"from tests.data.shards.test_reader import full_disk; full_disk({str(tmp_path / 'shards')!r})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "no space left after 0 tokens" in output
    assert output.count("\n") == 1
    assert os.listdir(tmp_path) == ["shards"]
    assert np.array_equal(TokenShards.open(tmp_path / "shards").tokens_in(0, 3), tokens)
