"""JSON files that are one list, or one object with a list in it, read a row at a time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from slmkit.config import UserError
from slmkit.data.sources import Source, open_source
from slmkit.data.sources.settings import SourceSettings

ROWS = [{"text": f'{number} é🙂 [{{\\" }}] ' + "x" * number * 40, "n": number} for number in range(60)]
LAYOUTS = {
    "a list": json.dumps(ROWS),
    "a list, indented": "\ufeff \n" + json.dumps(ROWS, indent=2, ensure_ascii=False),
    "a list in an object": json.dumps({"version": "1", "info": {"a": [1]}, "data": ROWS, "end": None}),
    "a list in an object, indented": json.dumps({"data": ROWS, "size": 60}, indent=1),
    "JSON Lines": "".join(json.dumps(row) + "\n" for row in ROWS),
}


def opened(path: Path, content: str, **changes: Any) -> Source:
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return open_source(SourceSettings(path=str(path), **changes))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows_from_every_position(tmp_path: Path, layout: str, name: str):
    source = opened(tmp_path / name, LAYOUTS[layout])
    whole = list(source.read())
    assert [document.text for document, _ in whole] == [row["text"] for row in ROWS]
    for index in range(0, 60, 7):
        assert list(source.read(json.loads(json.dumps(whole[index][1])))) == whole[index + 1 :]


def test_a_list_called_jsonl_and_a_row_of_several_lines_are_read(tmp_path: Path):
    assert len(list(opened(tmp_path / "a.jsonl", LAYOUTS["a list"]).read())) == 60
    assert [one.text for one, _ in opened(tmp_path / "b.json", json.dumps(ROWS[0], indent=1)).read()] == [
        ROWS[0]["text"]
    ]
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    for indent in (None, 1):
        assert len(list(opened(tmp_path / "c.json", json.dumps(talk, indent=indent)).read(kind="conversations"))) == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"text": tru, "b": [1, "}"]}', "not valid JSON"),
        ('{"text": "a" "b": 2}', "not valid JSON"),
        ('{"text": "a", "b": {}, "text": "c"}', "not valid JSON"),
        ("7", "not a JSON object"),
        ("[" * 3000 + "]" * 3000, "not valid JSON"),
        ('{"text": "\\ud83d"}', "not UTF-8"),
        ('{"text": ' + "9" * 5000 + "}", "not as expected"),
        ('{"text": NaN}', "not as expected"),
        ('{"body": "b"}', "no such column"),
    ],
)
def test_a_bad_row_is_a_fault_of_that_row(tmp_path: Path, bad: str, reason: str):
    content = f'[{{"text": "one"}}, {bad}, {{"text": "two"}}]'
    with pytest.raises(UserError, match=r"a\.json: row 2: "):
        list(opened(tmp_path / "a.json", content).read())
    source = opened(tmp_path / "a.json", content, on_bad_row="skip")
    assert [document.text for document, _ in source.read()] == ["one", "two"]
    assert source.skipped == {reason: 1}


@pytest.mark.parametrize("end", ["", ',{"text": "tw', ',{"text": "two"} {"text": 3}]', '] [{"text": "two"}]'])
def test_a_list_that_breaks_off_is_read_up_to_there(tmp_path: Path, end: str):
    source = opened(tmp_path / "a.json", '[{"text": "one"}' + end, on_bad_row="skip")
    assert next(source.read())[0].text == "one"
    list(source.read())
    assert sum(source.skipped.values()) == 1
    with pytest.raises(UserError, match=r"a\.json"):
        list(opened(tmp_path / "a.json", '[{"text": "one"}' + end).read())


def test_an_object_with_two_lists_of_rows_or_none_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="a second list of rows"):
        list(opened(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS})).read())
    with pytest.raises(UserError, match=r"a\.json"):
        list(opened(tmp_path / "a.json", json.dumps({"a": 1}, indent=1)).read())


def test_a_file_of_one_row_is_gone_on_from_its_end_and_its_bytes_are_text(tmp_path: Path):
    source = opened(tmp_path / "a.json", json.dumps(ROWS[0], indent=1))
    ((_, position),) = source.read()
    assert list(source.read(position)) == []
    (tmp_path / "b.json").write_bytes(b'{"text":\n "\xed\xa0\xbd"}')
    with pytest.raises(UserError, match=r"b\.json: not UTF-8, or half a surrogate pair"):
        list(open_source(SourceSettings(path=str(tmp_path / "b.json"))).read())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"text":"a"},{"text":"5" tall"},{"text":"c"}]', "behind row 1: Expecting ',' delimiter at offset 26"),
        ('{"v":1,"data":[{"text":"a"},{"text":"x"y"}]}', "behind row 1: Expecting ',' delimiter at offset 39"),
        ('{"text":"a\nb"}', "behind row 0: Invalid control character at offset 10"),
        ("{'text':'a'}", "behind row 0: Expecting property name enclosed in double quotes at offset 1"),
        ('[{"text":"a"},\n{"text":"b\nc"}]', "row 2: .*: Invalid control character at offset 25"),
        ('[{"text":"a"},{"text":"b"', "behind row 1: it breaks off"),
        ("[", "behind row 0: it breaks off"),
    ],
)
def test_a_fault_in_a_list_is_said_with_its_place_in_the_file(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=problem):
        [*open_source(SourceSettings(path=str(tmp_path / "a.json"))).read()]
