"""Reading local files: every kind, in bounded pieces, and every mistake named by file and place."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slmkit.config import UserError
from slmkit.data.sources import PIECE, Document, cut_point, open_source
from slmkit.data.sources.settings import SourceSettings
from tests.data.read_files import read_conversations, read_documents

TEXTS = ["one\nline more", 'two, with "quotes" and é', "three 🙂"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def as_txt(texts: list[str]) -> bytes:
    return "\n<|endoftext|>\n".join(texts).encode()


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def as_csv(texts: list[str], path: Path) -> bytes:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    return path.read_bytes()


def texts_of(paths: object, **options: str) -> list[str]:
    """Whole texts, pieces put together again."""
    texts, begun = [], ""
    for document in read_documents(paths, **options):
        begun += document.text
        if document.ends:
            texts.append(begun)
            begun = ""
    assert not begun
    return texts


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, kind: str, compression: str):
    content = {".txt": as_txt, ".csv": lambda texts: as_csv(texts, tmp_path / "plain")}.get(kind, as_jsonl)(TEXTS)
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESS[compression](content))
    assert texts_of(path) == TEXTS


def test_parquet_gives_the_same_documents(tmp_path: Path):
    pq.write_table(pa.table({"story": TEXTS, "id": [1, 2, 3]}), tmp_path / "a.parquet", row_group_size=2)
    assert texts_of(tmp_path / "a.parquet", text_column="story") == TEXTS


def test_archives_of_several_parts_are_read_to_the_end(tmp_path: Path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(COMPRESS[suffix](b"first\n") + COMPRESS[suffix](b"second\n"))
        assert texts_of(path) == ["first\nsecond\n"]


def test_a_folder_is_read_sorted_with_its_subfolders_and_without_other_files(tmp_path: Path):
    for name in ("b/2.txt", "b/1.txt", "a.txt", "README.md", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["a.txt", "b/1.txt", "b/2.txt"]
    assert texts_of(tmp_path / "b") == ["b/1.txt", "b/2.txt"]


def test_a_text_file_without_separators_is_one_text_in_pieces_cut_at_line_ends(tmp_path: Path):
    text = "".join(f"line {number} of a long text\n" for number in range(8000))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_documents(tmp_path / "a.txt"))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 2
    assert all(len(piece.text) <= PIECE and piece.text.endswith("\n") for piece in pieces)


def test_a_line_longer_than_a_piece_loses_nothing_where_it_is_cut(tmp_path: Path):
    text = "é🙂" * PIECE
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([text]))
    as_csv([text], tmp_path / "a.csv")
    assert all(texts_of(tmp_path / f"a.{kind}") == [text] for kind in ("txt", "jsonl", "csv"))
    assert all(len(piece.text) <= PIECE for piece in read_documents(tmp_path))


def test_a_long_document_before_a_separator_ends_at_it(tmp_path: Path):
    (tmp_path / "a.txt").write_text("word " * PIECE + "\n<|endoftext|>\n\n<|endoftext|>\nshort")
    assert texts_of(tmp_path / "a.txt") == ["word " * PIECE, "short"]
    (tmp_path / "a.txt").write_text("x" * PIECE + "\n\n\n<|endoftext|>\nshort")
    assert texts_of(tmp_path / "a.txt") == ["x" * PIECE + "\n\n", "short"]


def test_a_cut_keeps_words_and_runs_of_blank_lines_whole():
    assert cut_point("ab\ncd\n\nef", 7) == 7  # no single line end in the second half: after the last one
    assert cut_point("abcd\nefg\n\nh", 10) == len("abcd\nefg\n\n")
    assert cut_point("abcdef\ngh\n\nhi", 11) == len("abcdef\n")
    assert cut_point("two words", 5) == 3
    assert cut_point("unbroken", 5) == 5


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\nlines")
    assert texts_of(tmp_path / "a.txt") == ["one", "two\nlines"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n')
    assert texts_of(tmp_path / "a.jsonl") == ["one"]


def test_conversations_come_as_given_from_json_lines_and_parquet(tmp_path: Path):
    conversations = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations))
    pq.write_table(pa.table({"messages": conversations}), tmp_path / "b.parquet")
    assert list(read_conversations(tmp_path)) == conversations * 2


def test_sources_are_described_by_size_and_checksum(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abc")
    assert open_source(SourceSettings(path=str(tmp_path / "a.txt"))).describe() == [
        {
            "path": str(tmp_path / "a.txt"),
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        }
    ]


MISTAKES = {
    "empty.txt": (b"", "the file is empty"),
    "blank.txt": (b" \n\n", "no documents found"),
    "rows.jsonl": (b"\n", "no documents found"),
    "page.pdf": (b"%PDF", "expected text (.txt, .md, source code), .jsonl, .json, .csv, .tsv, .parquet or .arrow"),
    "nul.txt": (b"line\nab\0cd", "at offset 7"),
    "latin.txt": (b"line\ncaf\xe9 au lait", "at offset 8"),
    "cut.txt": ("line\ncafé".encode()[:-1], "at offset 8"),
    "utf16.txt": ("text".encode("utf-16"), "cannot be read: it is UTF-16 text"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": ', "bad.jsonl:2: expected a JSON object, found"),
    "array.json": (b'["a"]\n', "array.json: row 1: expected a JSON object, found '\"a\"'"),
    "column.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', "column.jsonl:2: no column 'text'; there are: 'body'"),
    "null.jsonl": (b'{"text": null}\n', "null.jsonl:1: expected text in column 'text', found nothing"),
    "half.jsonl": (
        b'{"text": "\\ud83d\\uDE42"}\n{"text": "\\uD83D"}\n',
        "half.jsonl:2: not UTF-8, or half a surrogate pair",
    ),
    "column.csv": (b"id,body\n1,a\n", "column.csv:1: no column 'text'; there are: 'id', 'body'"),
    "short.csv": (b"id,text\n1,a\n2\n", "short.csv: row 2 (line 3): expected 2 fields"),
    "long.csv": (b"id,text\n1,a,b\n", "long.csv: row 1 (line 2): expected 2 fields"),
    "quote.csv": (b'id,text\n1,"a', "quote.csv:2: not valid CSV"),
    "damaged.txt.gz": (gzip.compress(b"text" * 1000)[:-9], "cannot be read"),
    "damaged.txt.zst": (zstandard.compress(bytes(range(1, 100)) * 9)[:-5], "cannot be read"),
    "none.txt.gz": (b"not an archive", "cannot be read"),
    "none.parquet": (b"not a table", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_file_that_cannot_be_read_gets_one_line_that_names_it(tmp_path: Path, name: str):
    content, expected = MISTAKES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_documents(tmp_path / name))
    assert name in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"missing\.txt: no such file or folder"):
        read_documents(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="no .* file in this folder"):
        read_documents(tmp_path)
    pq.write_table(pa.table({"body": ["a"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; there are: 'body', 'number'"):
        list(read_documents(tmp_path))
    with pytest.raises(UserError, match=r"a\.parquet: row 1: expected text in column 'number', found a whole number"):
        list(read_documents(tmp_path, text_column="number"))


@pytest.mark.parametrize("row", ['"Hi"', "[]", '["Hi"]'])
def test_a_row_that_is_no_conversation_is_refused(tmp_path: Path, row: str):
    (tmp_path / "a.jsonl").write_text(f'{{"messages": {row}}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: expected in column 'messages' a list of messages"):
        list(read_conversations(tmp_path))
    with pytest.raises(UserError, match=r"expected \.jsonl, \.json, \.csv, \.tsv, \.parquet or \.arrow"):
        list(read_conversations(__file__))


def test_texts_where_conversations_are_read_are_refused_with_the_reason(tmp_path: Path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=r"such as .*a\.txt: expected \.jsonl, \.json, \.csv"):
        list(read_conversations(tmp_path))
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match=r"^separator: it is for text files .*; remove it$"):
            list(open_source(SourceSettings(path=str(path), separator="\n")).read(kind="conversations"))


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_without_pyarrow_the_line_says_what_to_install(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / name).write_bytes(b"something")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install slmkit\[train\]"):
        list(read_documents(tmp_path / name))


def test_a_document_is_whole_unless_said_otherwise():
    assert Document("text").ends
