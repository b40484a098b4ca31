"""Rows as the well-known data sets have them become text, or conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmkit.config import UserError
from slmkit.data.source_settings import SourceSettings
from slmkit.data.sources import open_source

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SYSTEM = {"role": "system", "content": "Be kind."}

# Rows with the columns of each data set; what they mean.
CHATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "HuggingFaceTB/smoltalk": ({"messages": [SYSTEM, *TALK], "source": "everyday"}, [SYSTEM, *TALK]),
    "Open-Orca/SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind.", "weight": None},
                {"from": "human", "value": "Hi", "weight": 0.0},
                {"from": "gpt", "value": "Hello.", "weight": 1.0},
            ]
        },
        [SYSTEM, {**TALK[0], "weight": 0.0}, {**TALK[1], "weight": 1.0}],
    ),
    "allenai/tulu-3-sft-personas-code": ({"id": "1", "prompt": "Hi", "messages": TALK}, TALK),
    "tatsu-lab/alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is an instruction …"},
        [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}],
    ),
    "tatsu-lab/alpaca without input": (
        {"instruction": "Greet.", "input": "", "output": "Hi", "text": "Below is an instruction …"},
        [{"role": "user", "content": "Greet."}, {"role": "assistant", "content": "Hi"}],
    ),
}


def files(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The same rows as parquet and as JSON lines."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / "a.parquet", folder / "a.jsonl"]


@pytest.mark.parametrize("name", CHATS)
def test_the_columns_tell_what_a_conversation_is(tmp_path: Path, name: str):
    row, messages = CHATS[name]
    for path in files(tmp_path, [row, row]):
        source = open_source(SourceSettings(path=str(path)))
        assert [conversation for conversation, _ in source.read_conversations()] == [messages, messages]


def test_code_with_its_prompt_becomes_text(tmp_path: Path):
    row = {"prompt": "Sort a list.", "response": "sorted(a)", "programming_language": "Python"}
    for path in files(tmp_path, [row]):
        assert next(open_source(SourceSettings(path=str(path))).read())[0].text == "Sort a list.\n\nsorted(a)"
        with_text = open_source(SourceSettings(path=str(path), text_column="response"))
        assert next(with_text.read())[0].text == "sorted(a)", "a column that is named comes first"


def test_a_format_can_be_named_where_the_columns_would_mean_another(tmp_path: Path):
    row = {"messages": TALK, "instruction": "Add.", "output": "3"}
    for path in files(tmp_path, [row]):
        named = SourceSettings(path=str(path), row_format="instruction")
        assert next(open_source(named).read_conversations())[0][1]["content"] == "3"
        with pytest.raises(UserError, match="row_format 'instructions': did you mean 'instruction'"):
            next(open_source(SourceSettings(path=str(path), row_format="instructions")).read_conversations())
        with pytest.raises(UserError, match="no column 'conversations'; there are"):
            next(open_source(SourceSettings(path=str(path), row_format="conversations")).read_conversations())


@pytest.mark.parametrize(
    ("row", "expected", "reason"),
    [
        ({"messages": [TALK[1]]}, "assistant where it is the user's turn", "roles out of order"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "the assistant says nothing", "an empty turn"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "role 'narrator'", "not as expected"),
        ({"instruction": "Add.", "input": "", "output": ""}, "the assistant says nothing", "an empty turn"),
        ({"conversations": [{"who": "user", "content": "Hi"}]}, "message 1: role None", "not as expected"),
        ({"conversations": [{"from": "human", "value": None}]}, "expected text", "not as expected"),
        ({"instruction": 3, "output": "a"}, "expected text in column 'instruction', found int", "not as expected"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_place_or_counted(
    tmp_path: Path, row: dict[str, Any], expected: str, reason: str
):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*" + expected):
        list(open_source(SourceSettings(path=str(tmp_path))).read_conversations())
    source = open_source(SourceSettings(path=str(tmp_path), on_bad_row="skip"))
    assert [conversation for conversation, _ in source.read_conversations()] == [TALK]
    assert source.skipped == {reason: 1}
