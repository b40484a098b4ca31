"""Whatever a source gives comes with a position, from which another reader goes on with exactly the next thing."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slmkit.config import UserError
from slmkit.data.sources import PIECE, open_source
from slmkit.data.sources.settings import SourceSettings

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
TEXTS = [
    "one\nline more",
    'two, with "quotes" and é',
    "",
    "  \n",
    "a long one: " + "words é🙂 and\nlines, " * 9000,
    "three 🙂\n\n",
    "unbroken" * 20_000,
    "four",
]


def write(path: Path, texts: list[str]) -> Path:
    """The texts in a file of the kind that its name says."""
    kind, *compression = path.suffixes
    if kind == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=3)
        return path
    if kind == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
        content = path.read_bytes()
    elif kind == ".txt":
        content = b"\xef\xbb\xbf" + "\r\n<|endoftext|>\r\n".join(text.replace("\n", "\r\n") for text in texts).encode()
    else:
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(COMPRESS["".join(compression)](content))
    return path


def folder(tmp_path: Path, suffix: str) -> Path:
    """Two files of one kind, the second beginning where the first has ended."""
    write(tmp_path / f"1{suffix}", TEXTS)
    write(tmp_path / f"2{suffix}", TEXTS[::-1])
    return tmp_path


def everything(path: Path, start: Any = None, **options: Any) -> list[tuple[Any, Any]]:
    return list(open_source(SourceSettings(path=str(path), **options)).read(start))


SUFFIXES = [f"{kind}{compression}" for kind in (".txt", ".jsonl", ".csv") for compression in COMPRESS] + [".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reading_goes_on_with_exactly_the_next_document_from_every_position(tmp_path: Path, suffix: str):
    whole = everything(folder(tmp_path, suffix))
    for index, (_, position) in enumerate(whole):
        assert all(isinstance(value, int) for value in json.loads(json.dumps(position)).values())
        assert everything(tmp_path, position) == whole[index + 1 :]
    texts = "".join(document.text + "\0" * document.ends for document, _ in whole).split("\0")[:-1]
    kept = [text for text in TEXTS + TEXTS[::-1] if text.strip()]
    ends = "\n" if suffix.startswith(".txt") else ""  # the line end before a separator belongs to it
    assert texts == kept if not ends else [text.rstrip() for text in texts] == [text.rstrip() for text in kept]
    assert whole[-1][1]["documents"] == len(kept)


def test_conversations_go_on_too(tmp_path: Path):
    rows = [[{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "Yes"}] for number in range(9)]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet", row_group_size=4)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source = open_source(SourceSettings(path=str(tmp_path)))
    whole = list(source.read(kind="conversations"))
    assert [messages for messages, _ in whole] == rows * 2
    for index, (_, position) in enumerate(whole):
        assert list(source.read(position, "conversations")) == whole[index + 1 :]


@pytest.mark.parametrize("path", ["stories", "primer"])
def test_the_built_in_corpus_is_endless_and_goes_on(path: str):
    source = open_source(SourceSettings(path=path), seed=3)

    def five(items: Iterator[Any]) -> list[Any]:
        return [next(items) for _ in range(5)]

    whole = five(source.read())
    assert five(source.read(whole[1][1]))[:3] == whole[2:]
    assert five(open_source(SourceSettings(path=path), seed=4).read()) != whole
    talk = five(source.read(kind="conversations"))
    assert five(source.read(talk[1][1], "conversations"))[:3] == talk[2:]


def test_no_more_documents_come_than_were_asked_for_also_after_going_on(tmp_path: Path):
    whole = everything(folder(tmp_path, ".jsonl"), documents=8)
    assert whole == everything(tmp_path)[: len(whole)]
    assert [document.ends for document, _ in whole].count(True) == 8
    assert whole[-1][1]["file"] == 1, "the limit is on the source, not on each of its files"
    for index, (_, position) in enumerate(whole):
        assert everything(tmp_path, position, documents=8) == whole[index + 1 :]
    assert len(list(open_source(SourceSettings(path="stories", documents=3)).read())) == 3


def test_a_plain_file_is_sought_and_not_read_again(tmp_path: Path):
    """What lies before the position is not even looked at: it may be damaged meanwhile."""
    for suffix in (".txt", ".jsonl", ".csv"):
        path = write(tmp_path / f"a{suffix}", TEXTS)
        whole = everything(path)
        content = bytearray(path.read_bytes())
        content[20:60] = b"\xff" * 40
        path.write_bytes(content)
        with pytest.raises(UserError, match="UTF-8"):
            everything(path)
        assert everything(path, whole[3][1]) == whole[4:]


def test_a_separator_in_the_middle_of_a_line_is_text_wherever_reading_begins(tmp_path: Path):
    text = "x" * (PIECE - 5) + " <|endoftext|>\n" + "y" * PIECE  # which is cut before the separator
    (tmp_path / "a.txt").write_text(text)
    whole = everything(tmp_path / "a.txt")
    assert "".join(document.text for document, _ in whole) == text
    assert [document.ends for document, _ in whole] == [False] * (len(whole) - 1) + [True]
    for index, (_, position) in enumerate(whole):
        assert everything(tmp_path / "a.txt", position) == whole[index + 1 :]
