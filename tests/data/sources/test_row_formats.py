"""Rows as public data sets have them: what they mean, and that nothing in them is lost without a word."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmkit.config import UserError
from slmkit.data.sources import Source, open_source
from slmkit.data.sources.documents import BadRow
from slmkit.data.sources.row_formats import RowFormats
from slmkit.data.sources.settings import SourceSettings
from tests.data.public_rows import ALL, SHAREGPT, SYSTEM, TALK, say, user

DOCS = Path(__file__).parents[3] / "docs" / "sources.md"
NO_FILE = SourceSettings(path="a.jsonl")


def formats_of(reads: str) -> RowFormats:
    return RowFormats(reads, NO_FILE, Counter())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows in a file of the kind that its name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, rows: list[dict[str, Any]], **changes: Any) -> Source:
    return open_source(SourceSettings(path=str(write(path, rows)), **changes))


def meaning(item: Any) -> Any:
    """What a test compares: a text, a conversation, both of a pair."""
    if hasattr(item, "chosen"):
        return ([*item.chosen], [*item.rejected])
    if hasattr(item, "label"):
        return [*item.messages]
    return item.text if hasattr(item, "text") else [*item]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("name", ALL)
def test_a_row_of_every_public_schema_is_read_and_what_it_has_besides_is_counted(tmp_path: Path, name: str, kind: str):
    reads, schema = ALL[name]
    source = opened(tmp_path / f"a.{kind}", [{**schema.row, "score": 0.5, "note": None}] * 2)
    items = [item for item, _ in source.read(kind=reads)]
    assert [meaning(item) for item in items] == [schema.means] * 2
    assert all(getattr(item, "tools", None) == schema.tools for item in items if reads == "conversations")
    unused = {} if kind == "parquet" else {"score": 2}  # of a table the columns are counted, whatever is in them
    assert unused.items() <= source.unused.items()
    assert re.search(r"'score'.* \(2 rows\)", source.report()[-1])


@pytest.mark.parametrize("name", ALL)
def test_the_documentation_has_a_line_for_every_public_schema(name: str):
    reads, schema = ALL[name]
    required = formats_of(reads).kind.find(schema.row).required
    table = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    assert any(all(f"`{column}`" in line for column in required) for line in table), required


@pytest.mark.parametrize(
    "column",
    ["tools", "system", "history", "images", "inputs", "choices", "options", "audios", "documents", "reasoning"],
)
def test_a_column_with_a_meaning_is_used_or_the_row_is_refused(tmp_path: Path, column: str):
    row = {"messages": TALK, column: "[1]" if column == "tools" else "something"}
    source = opened(tmp_path / "a.jsonl", [row, {"messages": TALK}], on_bad_row="skip")
    kept = [[*one] for one, _ in source.read(kind="conversations")]
    assert kept == ([[{"role": "system", "content": "something"}, *TALK], TALK] if column == "system" else [TALK])
    assert sum(source.skipped.values()) == (0 if column == "system" else 1)
    empty = opened(tmp_path / "b.jsonl", [{"messages": TALK, column: value} for value in (None, "", [], {}, [""])])
    assert len(list(empty.read(kind="conversations"))) == 5


CALL = {"name": "f", "arguments": {}}
SAID_TWICE = {  # two names for one thing: the value of the first, one that means the same, and another
    ("system", "system_prompt"): ("Be kind.", "Be kind.\n", "Be brief."),
    ("role", "from"): ("assistant", "gpt", "human"),
    ("content", "value"): ("Hello.", [{"type": "text", "text": "Hello."}], "No."),
    ("reasoning_content", "reasoning"): ("Think.", "Think.", "Not."),
    ("tool_calls", "function_call"): ([{"function": CALL}], CALL, {**CALL, "name": "g"}),
}


@pytest.mark.parametrize("names", SAID_TWICE, ids="-".join)
def test_what_a_row_says_twice_has_to_be_the_same(tmp_path: Path, names: tuple[str, str]):
    first, same, other = SAID_TWICE[names]
    turn = {"role": "assistant", "content": "Hello.", names[0]: first}
    rows = [
        {"instruction": "Hi", "output": "Hello.", names[0]: first, names[1]: second}
        if "system" in names
        else {"messages": [TALK[0], {**turn, names[1]: second}]}
        for second in (same, other, None)
    ]
    source = opened(tmp_path / "a.jsonl", rows, on_bad_row="skip")
    talks = [[*one] for one, _ in source.read(kind="conversations")]
    assert len(talks) == 2
    assert talks[0] == talks[1]
    assert source.skipped == {"contradictions": 1}
    assert f"column {names[0]!r} and column {names[1]!r} contradict each other: drop one" in source.report()[0]


@pytest.mark.parametrize("key", ["images", "train_detail", "audio", "refusal", "channel"])
def test_a_key_of_a_message_with_a_meaning_is_refused_and_another_one_counted(tmp_path: Path, key: str):
    row = {"messages": [TALK[0], {**TALK[1], key: ["x"], "id": 7}]}
    source = opened(tmp_path / "a.jsonl", [row, {"messages": [TALK[0], {**TALK[1], "id": 7}]}], on_bad_row="skip")
    assert [[*one] for one, _ in source.read(kind="conversations")] == [TALK]
    assert source.skipped == {f"messages with {key!r}": 1}
    assert "column 'id' of messages is not used (1 row)" in source.report()[-1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train", False),
        ("weight", 0),
        ("loss", False),
        ("loss_weight", 0.0),
        ("training", False),
        ("trainable", False),
        ("learn", 0),
        ("do_train", False),
    ],
)
def test_a_turn_or_a_row_that_says_so_is_not_learned(tmp_path: Path, key: str, value: Any):
    later = [user("And?"), say("Good.")]
    rows: list[dict[str, Any]] = [
        {"messages": [TALK[0], {**TALK[1], key: value}, *later]},
        {"messages": TALK, key: value},
    ]
    source = opened(tmp_path / "a.jsonl", [*rows, {"messages": TALK, key: 1}])
    (first, _), (second, _) = source.read(kind="conversations")
    assert [message.get("weight") for message in first] == [None, 0, None, None]
    assert [*second] == TALK
    assert source.skipped == {"not to be learned": 1}
    with pytest.raises(UserError, match=rf"a\.jsonl:1: message 2: {key} 0.3; expected 1 \(learned\) or 0"):
        list(opened(tmp_path / "a.jsonl", [{"messages": [TALK[0], {**TALK[1], key: 0.3}]}]).read(kind="conversations"))


@pytest.mark.parametrize(
    ("key", "value", "fine"),
    [
        ("mask", True, None), ("loss_mask", [0, 1], None), ("train_on_turn", [False, True], True),
        ("trainable_turns", [1], None), ("lossMask", 1, None), ("no_train", True, None), ("is_masked", False, None),
        ("skip_loss", True, None), ("delete", True, False), ("skipped", 1, False), ("ignored", "yes", "no"),
        ("do_learn", False, True), ("turn_weight", 0.5, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_keys_that_may_say_what_is_learned_are_refused(
    tmp_path: Path, kind: str, key: str, value: Any, fine: Any
):
    for row in ({"messages": TALK, key: value}, {"messages": [TALK[0], {**TALK[1], key: value}]}):
        source = opened(tmp_path / f"a.{kind}", [row, {"messages": TALK, key: None}], on_bad_row="skip")
        assert len(list(source.read(kind="conversations"))) == 1
        assert key in next(iter(source.skipped))
    rows = [{"messages": TALK, key: fine, "constraints": "glossary", "unlearning": None}]
    assert len(list(opened(tmp_path / f"b.{kind}", rows).read(kind="conversations"))) == 1


@pytest.mark.parametrize("reads", ["text", "conversations"])
@pytest.mark.parametrize(
    ("key", "value"), [("deleted", True), ("loss", 0), ("train", "false"), ("skip", 1), ("split", "test")]
)
def test_rows_that_are_not_meant_are_left_out_and_counted(tmp_path: Path, reads: str, key: str, value: Any):
    row = {"text": "Hi"} if reads == "text" else {"messages": TALK}
    other = {"split": "train", "deleted": False, "skip": 0}.get(key)
    for kind in ("jsonl", "parquet"):
        rows = [{**row, key: value}, {**row, key: other}]
        source = opened(tmp_path / f"a.{kind}", rows)
        assert len(list(source.read(kind=reads))) == 1
        assert source.skipped == {"of split test" if key == "split" else "not to be learned": 1}


def test_what_belongs_to_a_conversation_is_not_lost_from_a_text(tmp_path: Path):
    with pytest.raises(UserError, match="column 'system' belongs to a conversation"):
        list(opened(tmp_path / "a.jsonl", [{"prompt": "Hi", "response": "Yes", "system": "Be kind."}]).read())


def test_calls_of_one_turn_are_one_message(tmp_path: Path):
    call = {"from": "function_call", "value": '{"name": "find", "arguments": {"a": 1}}'}
    answer = [{"from": "observation", "value": "[]"}, {"from": "gpt", "value": "None."}]
    row = {"conversations": [SHAREGPT[0], {"from": "gpt", "value": "I look."}, call, call, *answer]}
    ((talk, _),) = opened(tmp_path / "a.jsonl", [row]).read(kind="conversations")
    assert [message["role"] for message in talk] == ["user", "assistant", "tool", "assistant"]
    assert (talk[1]["content"], len(talk[1]["tool_calls"])) == ("I look.", 2)


def test_labelled_answers_and_pairs_are_not_learned_as_conversations(tmp_path: Path):
    with pytest.raises(UserError, match=r"a\.jsonl:1: column 'label' labels the answer good or bad: objective: kto"):
        list(opened(tmp_path / "a.jsonl", [{"messages": TALK, "label": False}]).read(kind="conversations"))
    row = {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "No."}}
    for asked in (SHAREGPT[:1], SHAREGPT[:1] * 2):
        with pytest.raises(UserError, match="columns 'chosen' and 'rejected' hold the answers: objective: dpo"):
            list(opened(tmp_path / "a.jsonl", [row | {"conversations": asked}]).read(kind="conversations"))
    for answers, message in (
        ([{"text": "a", "score": 1}, {"text": "b", "score": 1}], "have one score, so that none is better"),
        (
            [{"said": "a", "score": 1}, {"said": "b", "score": 2}],
            "make columns 'prompt', 'chosen' and 'rejected'",
        ),
        (
            [{"text": "a", "score": 1, "rank": 1}, {"text": "b", "score": 2, "rank": 2}],
            "'score' and 'rank' of the answers in column 'answers' contradict each other",
        ),
        (
            [{"text": "a", "score": 9, "overall_score": 1}, {"text": "b", "score": 2, "overall_score": 5}],
            "'overall_score' and 'score' of the answers",
        ),
        ([{"text": "a", "score": 1}, {"answer": "b", "score": 2}], "answer 1 in column 'answers' has no 'answer'"),
        (
            [{"text": "a", "content": "x", "score": 1}, {"text": "b", "score": 2}],
            "column 'text' and column 'content' contradict each other",
        ),
    ):
        with pytest.raises(UserError, match=message):
            list(opened(tmp_path / "a.jsonl", [{"prompt": "Hi", "answers": answers}]).read(kind="pairs"))


def test_a_prompt_in_front_of_both_answers_is_removed_and_counted(tmp_path: Path):
    prompt = "Question: Why is the sky blue?\n\nAnswer: "
    old = {"prompt": prompt, "chosen": prompt + "Air scatters light.", "rejected": prompt + "Paint."}
    short = {"prompt": "Hello", "chosen": "Hello there.", "rejected": "Hello you."}  # an answer of its own
    source = opened(tmp_path / "a.jsonl", [old, short, old])
    assert [[side[-1]["content"] for side in pair.sides] for pair, _ in source.read(kind="pairs")] == [
        ["Air scatters light.", "Paint."], ["Hello there.", "Hello you."], ["Air scatters light.", "Paint."],
    ]  # fmt: skip
    (line,) = source.report()
    assert "2 pairs whose answers began with the prompt, which was removed from them, such as" in line


def test_the_split_that_is_read_is_no_unused_column(tmp_path: Path):
    source = opened(tmp_path / "a.jsonl", [{"text": "a", "split": "train"}, {"text": "b", "split": "Training"}])
    assert len(list(source.read())) == 2
    assert source.report() == []


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_columns_are_mapped_in_every_kind_of_file_and_a_named_one_is_required(tmp_path: Path, kind: str):
    rows = [{"id": str(number), "q": "Hi", "a": "Hello.", "prompt": "not this"} for number in range(3)]
    path = tmp_path / f"a.{kind}"
    if kind in ("csv", "tsv"):
        lines = [[*rows[0]], *([*row.values()] for row in rows)]
        path.write_text("".join(("," if kind == "csv" else "\t").join(line) + "\n" for line in lines))
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    else:
        write(path, rows)
    named = SourceSettings(path=str(path), columns={"prompt": "q", "completion": "a"})
    whole = list(open_source(named).read(kind="conversations"))
    assert [[*talk] for talk, _ in whole] == [TALK] * 3
    for index, (_, position) in enumerate(whole):
        assert list(open_source(named).read(position, "conversations")) == whole[index + 1 :]
    for wrong in ({"columns": {"prompt": "q", "completion": "answr", "system": "qq"}}, {"messages_column": "qq"}):
        with pytest.raises(
            UserError, match=r"no column '(answr|qq)', which (columns.completion|messages_column) names; "
        ):
            list(open_source(SourceSettings(path=str(path), **wrong)).read(kind="conversations"))
    with pytest.raises(UserError, match=r"no column 'ids', which text_column names; did you mean 'id'\?"):
        list(open_source(SourceSettings(path=str(path), text_column="ids")).read())


def test_a_named_column_that_one_row_lacks_is_a_fault_of_that_row(tmp_path: Path):
    rows = [{"body": "one"}, {"text": "two"}, {"body": "three"}]
    source = opened(tmp_path / "a.jsonl", rows, text_column="body", on_bad_row="skip")
    assert [document.text for document, _ in source.read()] == ["one", "three"]
    assert source.skipped == {"no such column": 1}


def test_settings_that_name_what_is_not_there_are_one_line(tmp_path: Path):
    def refusal(reads: str, **changes: Any) -> str:
        with pytest.raises(UserError) as refused:
            list(opened(tmp_path / "a.jsonl", [{"body": "x", "title": "y"}], **changes).read(kind=reads))
        return str(refused.value)

    assert "have no column 'promt'; did you mean 'prompt'?" in refusal("pairs", columns={"promt": "body"})
    assert "conversations have no column 'text'" in refusal("conversations", text_column="body")
    assert "row_format 'instructions': did you mean 'instruction'" in refusal(
        "conversations", row_format="instructions"
    )
    line = refusal("conversations")
    assert "there are: 'body', 'title'; data.columns names them, such as {prompt: body, completion: title}" in line
    assert "data.columns names them, such as {text: body}" in refusal("text")
    with pytest.raises(UserError, match="these are pairs of answers: objective: dpo"):
        list(opened(tmp_path / "a.jsonl", [{"chosen": "a", "rejected": "b"}]).read(kind="conversations"))


def test_a_format_can_be_named_where_the_columns_would_mean_another(tmp_path: Path):
    row = {"messages": TALK, "instruction": "Add.", "output": "3"}
    for kind in ("parquet", "jsonl"):
        named = opened(tmp_path / f"a.{kind}", [row], row_format="instruction")
        assert next(named.read(kind="conversations"))[0][1]["content"] == "3"
        with pytest.raises(UserError, match="no column 'conversations'; there are"):
            next(opened(tmp_path / f"a.{kind}", [row], row_format="conversations").read(kind="conversations"))


@pytest.mark.parametrize(
    ("row", "expected", "reason"),
    [
        ({"messages": [TALK[1]]}, "assistant where it is the user's turn", "roles out of order"),
        ({"messages": [TALK[0], say(" ")]}, "the assistant's text is empty", "an empty turn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1: role 'robot'", "not as expected"),
        ({"instruction": "Add.", "input": "", "output": ""}, "the assistant's text is empty", "an empty turn"),
        ({"conversations": [{"who": "user", "content": "Hi"}]}, "message 1: role nothing", "not as expected"),
        ({"conversations": [{"from": "human", "value": None}]}, "expected text", "not as expected"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, r"message 1: role \['human'\]", "not as expected"),
        (
            {"instruction": 3, "output": "a"},
            "expected text in column 'instruction', found a whole number",
            "not as expected",
        ),
        ({"messages": [SYSTEM, *TALK], "system": "Be rude."}, "two system prompts", "not as expected"),
        ({"messages": TALK, "tools": [{"nom": 1}]}, "expected tools with a name", "not as expected"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_place_or_counted(
    tmp_path: Path, row: dict[str, Any], expected: str, reason: str
):
    rows = [{"messages": TALK}, row]
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*" + expected):
        list(opened(tmp_path / "a.jsonl", rows).read(kind="conversations"))
    source = opened(tmp_path / "a.jsonl", rows, on_bad_row="skip")
    assert [[*conversation] for conversation, _ in source.read(kind="conversations")] == [TALK]
    assert source.skipped == {reason: 1}


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every field of a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield (*before, key)
        yield from places(below, (*before, key))


def changed(value: Any, place: tuple[Any, ...], wrong: Any) -> Any:
    if not place:
        return wrong
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(value[place[0]], place[1:], wrong)
    return copy


DEEP: Any = []
for _ in range(3000):
    DEEP = [DEEP]
EXTREME = {"deep": DEEP, "huge": 10**5000}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "name"]), inner),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data())
def test_a_field_of_any_type_is_a_fault_of_its_row_and_of_nothing_else(data: st.DataObject):
    reads, schema = ALL[data.draw(st.sampled_from([*ALL]))]
    place = data.draw(st.sampled_from([*places(schema.row)]))
    extreme = data.draw(st.sampled_from(["", "", "", "deep", "huge"]))
    row = changed(schema.row, place, EXTREME[extreme] if extreme else data.draw(ANYTHING))
    value = formats_of(reads).convert("a.jsonl:1", row)
    if isinstance(value, BadRow):
        assert value.message.startswith("a.jsonl:1: ")
        assert "\n" not in value.message
        assert not re.search("Error|Traceback", value.message)
    elif reads == "conversations":
        json.dumps([*value])


HH = "\n\nHuman: Who?\n\nAssistant: The fox.\n\nHuman: Why?\n\nAssistant: "


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([{"messages": TALK, "train": False}] * 2 + [{"messages": TALK}], "conversations"),
        ([{"messages": []}, {"messages": TALK}], "conversations"),
        ([{"id": 1}, {"messages": TALK}], "conversations"),
        ([{"messages": TALK, "label": "greeting"}], "conversations"),
        ([{"messages": TALK, "label": True, "train": False}], "judgements"),
        ([{"instruction": "a", "output": "b", "train": False}, {"instruction": "a", "output": "b"}], "conversations"),
        ([{"question": "Who?", "context": "c", "answers": {"text": ["a"], "answer_start": [1]}}], "text"),
        ([{"prompt": "Who?", "answers": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]}], "pairs"),
        ([{"chosen": HH + "a", "rejected": HH + "b"}], "pairs"),
    ],
)
def test_the_kind_of_rows_is_told_by_their_columns(tmp_path: Path, rows: list[dict], kind: str):
    assert opened(tmp_path / "a.jsonl", rows).reads() == kind


def test_the_keys_of_a_mapping_tell_the_kind_where_the_file_has_none_of_them(tmp_path: Path):
    assert opened(tmp_path / "a.jsonl", [{"x": "a"}], columns={"prompt": "q", "completion": "a"}).reads() != "text"


def test_a_dialogue_in_one_text_is_taken_apart(tmp_path: Path):
    source = opened(tmp_path / "a.jsonl", [{"chosen": HH + "A.", "rejected": HH + "B."}])
    ((pair, _),) = source.read(kind="pairs")
    assert pair.shared == 3
    assert [one["content"] for one in pair.chosen] == ["Who?", "The fox.", "Why?", "A."]
    assert pair.rejected[-1] == {"role": "assistant", "content": "B."}


def test_messages_under_an_unknown_name_are_suggested_as_messages(tmp_path: Path):
    source = opened(tmp_path / "a.jsonl", [{"id": 1, "msgs": TALK}])
    with pytest.raises(UserError, match=r"\{messages: msgs\}"):
        next(source.read(kind="conversations"))
