"""What cannot be read is named by file and place, refused or left out as asked, and counted: nothing gets lost."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slmkit.config import UserError
from slmkit.data.sources import Source, files, open_source
from slmkit.data.sources.settings import SourceSettings

GOOD = b'{"text": "good"}\n'


def source(path: Path, on_bad_row: str = "skip") -> Source:
    return open_source(SourceSettings(path=str(path), on_bad_row=on_bad_row))


def texts(opened: Source) -> list[str]:
    return [document.text for document, _ in opened.read()]


BAD_ROWS = {
    "not JSON": (".jsonl", GOOD + b'{"text": \n' + GOOD, "not valid JSON", "a.jsonl:2"),
    "not an object": (".jsonl", GOOD + b'["text"]\n' + GOOD, "not a JSON object", "a.jsonl:2"),
    "a key twice": (
        ".jsonl",
        GOOD + b'{"text": "a", "text": "b"}\n' + GOOD,
        "not valid JSON",
        "a.jsonl:2: the key",
    ),
    "a key twice within": (
        ".jsonl",
        GOOD + b'{"text": "a", "x": [{"k": 1, "k": 2}]}\n' + GOOD,
        "not valid JSON",
        "a.jsonl:2: the key 'k'",
    ),
    "another column": (".jsonl", GOOD + b'{"body": "b"}\n' + GOOD, "no such column", "a.jsonl:2"),
    "null": (".jsonl", GOOD + b'{"text": null}\n' + GOOD, "not as expected", "a.jsonl:2"),
    "latin 1": (".jsonl", GOOD + b'{"text": "caf\xe9"}\n' + GOOD, "not UTF-8", "at offset 30"),
    "half a pair": (".jsonl", GOOD + b'{"text": "\\ud83d"}\n' + GOOD, "not UTF-8", "a.jsonl:2"),
    "a zero byte": (".jsonl", GOOD + b'{"text": "\0"}\n' + GOOD, "not UTF-8", "at offset 27"),
    "too long": (".jsonl", GOOD + b'{"text": "' + b"x" * 3000 + b'"}\n' + GOOD, "row too long", "offset 17 has 3,013"),
    "blank": (".jsonl", GOOD + b'{"text": " \\n"}\n' + GOOD, "blank", "a.jsonl"),
    "a field too few": (".csv", b"id,text\n1,good\n2\n3,good\n", "wrong number of fields", "row 2 (line 3)"),
    "a field too many": (".csv", b"id,text\n1,good\n2,a,b\n3,good\n", "wrong number of fields", "row 2 (line 3)"),
    "latin 1 in CSV": (".csv", b"id,text\n1,good\n2,caf\xe9\n3,good\n", "not UTF-8", "at offset 20"),
    "a quote inside": (".csv", b'id,text\n1,good\n2,"a"b\n3,good\n', "not valid CSV", "a.csv:3"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_or_counted_and_the_next_ones_come(tmp_path: Path, name: str, monkeypatch):
    suffix, content, reason, place = BAD_ROWS[name]
    monkeypatch.setattr(files, "LONGEST_ROW", 2000)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    opened = source(path)
    read = list(opened.read())
    assert [document.text for document, _ in read] == ["good", "good"]
    assert opened.skipped == {reason: 1}
    assert place in opened.report()[0]
    assert f"1 skipped ({reason})" in opened.report()[0]
    again = source(path)
    assert list(again.read(read[0][1])) == read[1:]
    assert again.skipped == opened.skipped
    if name == "blank":
        assert texts(source(path, "refuse")) == ["good", "good"]
    else:
        with pytest.raises(UserError) as error:
            texts(source(path, "refuse"))
        assert place in str(error.value)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("row", ['"Hi"', "[]", '["Hi"]'])
def test_a_row_that_is_no_conversation_is_counted(tmp_path: Path, row: str):
    good = [{"role": "user", "content": "Hi"}]
    content = "".join(f'{{"messages": {value}}}\n' for value in (json.dumps(good), row, json.dumps(good)))
    (tmp_path / "a.jsonl").write_text(content)
    opened = source(tmp_path)
    assert [conversation for conversation, _ in opened.read(kind="conversations")] == [good, good]
    assert opened.skipped == {"not as expected": 1}


def test_bytes_that_are_no_text_are_left_out_of_a_text_file_wherever_reading_begins(tmp_path: Path):
    chance = random.Random(0)
    words = "".join(f"line {number} é🙂\r\n" * chance.randint(0, 2) for number in range(20_000)).encode()
    content = bytearray(words)
    places = sorted(chance.sample(range(len(content)), 40), reverse=True)
    for place in places:
        content[place:place] = chance.choice([b"\xff", b"\0", b"\xc3", b"\x9f\x98"])
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    opened = source(path)
    read = list(opened.read())
    whole = "".join(document.text for document, _ in read)
    expected = content.decode(errors="surrogateescape").replace("\r\n", "\n")
    assert whole == re.sub("[\0\udc80-\udcff]", "", expected)
    lost = len(content) - len(content.decode(errors="ignore").replace("\0", "").encode())
    assert opened.skipped == {"not UTF-8": lost}
    assert len(read) >= 5
    for index, (_, position) in enumerate(read):
        assert list(source(path).read(position)) == read[index + 1 :]
    with pytest.raises(UserError, match="found a byte that is not UTF-8 at offset"):
        texts(source(path, "refuse"))


OF_ANOTHER_KIND = {
    "gzip": (gzip.compress(b"Once."), r"it is a gzip file: end its name in \.gz"),
    "zstd": (zstandard.compress(b"Once."), r"it is a zstd file"),
    "UTF-16": ('{"text": "Once."}'.encode("utf-16"), "it is UTF-16 text: save it as UTF-8"),
    "an office document": (b"PK\x03\x04\x14\0word/document.xml", "it is a zip archive or an office document"),
}


@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".csv"])
@pytest.mark.parametrize("what", OF_ANOTHER_KIND)
def test_nothing_is_read_of_a_file_that_is_no_text(tmp_path: Path, what: str, kind: str):
    content, message = OF_ANOTHER_KIND[what]
    path = tmp_path / f"a{kind}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\{kind}: cannot be read: {message}"):
        texts(source(path, "refuse"))
    (tmp_path / "b.txt").write_text("Once.")
    (tmp_path / "c.jsonl").write_text('{"text": "Once."}')
    opened = source(tmp_path)
    assert set(texts(opened)) == {"Once."}
    assert opened.skipped == ({} if kind == ".md" else {"unreadable file": 1})


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_table_between_semicolons_or_tabs_is_read_from_any_place(tmp_path: Path, mark: str):
    path = tmp_path / "a.csv"
    path.write_bytes(f'\ufeff"id"{mark}"text"\n1{mark}"Once, twice"\n2{mark}Then.\n'.encode())
    read = list(source(path, "refuse").read())
    assert [document.text for document, _ in read] == ["Once, twice", "Then."]
    assert list(source(path, "refuse").read(read[0][1])) == read[1:]


def damaged_parquet(path: Path, group: int) -> None:
    """Four row groups of 25 rows, one of which is overwritten."""
    table = pa.table({"text": [random.Random(number).randbytes(50).hex() for number in range(100)]})
    pq.write_table(table, path, row_group_size=25, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + 30 : column.data_page_offset + column.total_compressed_size] = b"\xaa" * (
        column.total_compressed_size - 30
    )
    path.write_bytes(content)


def test_a_damaged_row_group_is_counted_and_the_next_one_is_read(tmp_path: Path):
    damaged_parquet(tmp_path / "1.parquet", group=1)
    pq.write_table(pa.table({"text": ["last"]}), tmp_path / "2.parquet")
    opened = source(tmp_path)
    read = list(opened.read())
    assert len(read) + opened.skipped["unreadable file"] == 101
    assert [position["row"] for _, position in read] == [*range(1, 26), *range(51, 101), 1]
    assert "1.parquet: rows 26 to 50 cannot be read as parquet" in opened.report()[0]
    assert list(opened.read(read[24][1])) == read[25:]
    with pytest.raises(UserError, match=r"1\.parquet: rows 26 to 50 cannot be read"):
        texts(source(tmp_path, "refuse"))


def test_a_file_that_is_no_parquet_at_all_is_counted_and_the_next_one_is_read(tmp_path: Path):
    (tmp_path / "1.parquet").write_bytes(b"not a table")
    pq.write_table(pa.table({"body": ["a", "b"]}), tmp_path / "2.parquet")
    pq.write_table(pa.table({"text": ["last"]}), tmp_path / "3.parquet")
    opened = source(tmp_path)
    assert texts(opened) == ["last"]
    assert opened.skipped == {"unreadable file": 1, "no such column": 2}
    assert "1.parquet: cannot be read as parquet" in opened.first_seen["unreadable file"]


def test_a_row_of_parquet_that_is_no_utf_8_is_counted(tmp_path: Path):
    raw = pa.array([b"good", b"caf\xe9", b"good"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}), tmp_path / "a.parquet")
    opened = source(tmp_path)
    assert texts(opened) == ["good", "good"]
    assert opened.skipped == {"not UTF-8": 1}
    assert "a.parquet: row 2" in opened.report()[0]


def test_an_arrow_file_whose_lengths_are_damaged_is_read_up_to_there(tmp_path: Path):
    table = pa.table({"text": ["good"] * 4})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    content = (tmp_path / "a.arrow").read_bytes()
    offsets = b"".join(place.to_bytes(4, "little") for place in (0, 4, 8))
    before, _, behind = content.rpartition(offsets)
    (tmp_path / "a.arrow").write_bytes(before + offsets[:8] + (1).to_bytes(4, "little") + behind)
    opened = source(tmp_path)
    assert texts(opened) == ["good"] * 2
    assert opened.skipped == {"unreadable file": 2}
    with pytest.raises(UserError, match=r"a\.arrow: rows 3 to 4 cannot be read as arrow"):
        texts(source(tmp_path, "refuse"))


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_files_that_are_compressed_inside_are_refused_as_archives(tmp_path: Path, kind: str):
    (tmp_path / f"a{kind}.gz").write_bytes(gzip.compress(b"columns"))
    with pytest.raises(UserError, match=r"all but \.parquet and \.arrow also as \.gz"):
        source(tmp_path / f"a{kind}.gz")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_what_comes_before_the_end_of_an_archive_cut_short_is_read(tmp_path: Path, kind: str, suffix: str):
    rows = [json.dumps({"text": random.Random(number).randbytes(200).hex()}) + "\n" for number in range(1000)]
    content = "".join(rows).encode()
    compressed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    (tmp_path / f"1{kind}{suffix}").write_bytes(compressed[: len(compressed) * 3 // 4])
    (tmp_path / f"2{kind}").write_text('{"text": "last"}' if kind == ".jsonl" else "last")
    opened = source(tmp_path)
    *read, last = texts(opened)
    assert last == "last"
    assert opened.skipped == {"unreadable file": 1}
    assert f"1{kind}{suffix}: cannot be read (behind " in opened.report()[0]
    if kind == ".jsonl":
        assert 400 < len(read) < 1000
        assert read == [json.loads(row)["text"] for row in rows[: len(read)]]
    else:
        assert 100_000 < len("".join(read)) < len(content)
        assert content.decode().startswith("".join(read))
    with pytest.raises(UserError, match=r"cannot be read \(behind"):
        texts(source(tmp_path, "refuse"))


@pytest.mark.parametrize("damage", ["cut", "a byte"])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.csv.gz"])
def test_what_comes_before_a_damage_is_the_same_wherever_reading_begins(tmp_path: Path, name: str, damage: str):
    words = [random.Random(number).randbytes(150).hex() for number in range(1500)]
    content = {
        ".txt": "\n<|endoftext|>\n".join(words),
        ".jsonl": "".join(json.dumps({"text": word}) + "\n" for word in words),
        ".json": json.dumps([{"text": word} for word in words]),
        ".csv": "text\n" + "\n".join(words),
    }[Path(name).suffixes[0]].encode()
    pack = gzip.compress if name.endswith(".gz") else zstandard.ZstdCompressor(write_checksum=True).compress
    packed = bytearray(pack(content))
    if damage == "cut":
        del packed[len(packed) * 2 // 3 :]
    else:
        packed[len(packed) * 2 // 3] ^= 255
    (tmp_path / name).write_bytes(packed)
    opened = source(tmp_path / name)
    read = [(item.text, position) for item, position in opened.read()]
    # zstd unpacks whole blocks of 128 KiB, and Python's reader of gzip 8 KiB more than it gives.
    assert len(read) > (300 if name.endswith(".zst") else 800)
    assert opened.skipped["unreadable file"] == 1
    for number in (1, 2, 250, len(read) - 1):
        again = [item.text for item, _ in source(tmp_path / name).read(read[number - 1][1])]
        assert [text for text, _ in read[:number]] + again == [text for text, _ in read]


def test_a_small_archive_that_is_cut_gives_what_is_whole_in_it(tmp_path: Path):
    packed = gzip.compress(b"A cat.\n<|endoftext|>\nA dog.\n")
    for number, damaged in enumerate((packed[:-9], packed + b"xx")):
        (tmp_path / f"{number}.txt.gz").write_bytes(damaged)
        assert texts(source(tmp_path / f"{number}.txt.gz")) == ["A cat."]


PEAK = r"""
import re, sys
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.sources import open_source
source = open_source(SourceSettings(path=sys.argv[1], on_bad_row="skip"))
def peak():  # of this process alone, in KiB; ru_maxrss begins with what its parent had
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read()).group(1))
before = peak()
characters = sum(len(document.text) for document, _ in source.read())
print(characters, sum(source.skipped.values()), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of memory")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_a_line_of_any_length_is_read_in_bounded_memory(tmp_path: Path, suffix: str):
    """A text file has it in pieces; as a row it is too long, and is left out."""
    megabytes = 96
    path = tmp_path / f"a{suffix}"
    with path.open("wb") as file:
        file.write({".jsonl": b'{"text": "', ".csv": b"text\n", ".txt": b""}[suffix])
        for _ in range(megabytes):
            file.write(b"x" * (1 << 20))
        file.write({".jsonl": b'"}\n{"text": "good"}\n', ".csv": b"\ngood\n", ".txt": b""}[suffix])
    printed = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, env=os.environ, check=True
    ).stdout
    characters, skipped, kilobytes = map(int, printed.split())
    assert (characters, skipped) == ((megabytes << 20, 0) if suffix == ".txt" else (4, 1))
    assert kilobytes < {".txt": 20, ".jsonl": 80, ".csv": 80}[suffix] << 10
