"""Pairs of answers: rows of public data sets, shards, and what of them is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from slmkit.config import UserError
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.rows.answers import PairRows
from slmkit.data.rows.datasets import ItemFormat
from slmkit.data.sources import open_source
from slmkit.data.sources.formats import pair_of
from slmkit.data.sources.settings import SourceSettings
from slmkit.tokenizer import SLMTokenizer

TOKENIZER = SLMTokenizer(260)
ASKED = [{"role": "user", "content": "Hi"}]
SYSTEM = [{"role": "system", "content": "Be kind."}]


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


BEFORE = [*ASKED, *say("Hello."), {"role": "user", "content": "And?"}]
# Rows with the columns of each data set; the messages before the answers `Good.` and `Bad.`
ROWS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "texts": ({"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."}, ASKED),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": "Hi", "chosen": [*ASKED, *say("Good.")], "rejected": [*ASKED, *say("Bad.")], "score_chosen": 8.5},
        ASKED,
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        {"source": "x", "chosen": [*BEFORE, *say("Good.")], "rejected": [*BEFORE, *say("Bad.")]},
        BEFORE,
    ),
    "trl, explicit prompt": ({"prompt": BEFORE, "chosen": say("Good."), "rejected": say("Bad.")}, BEFORE),
    "Intel/orca_dpo_pairs": (
        {"system": "Be kind.", "question": "Hi", "chosen": "Good.", "rejected": "Bad."},
        [*SYSTEM, *ASKED],
    ),
}
BAD = {
    "chosen and rejected are the same": {"prompt": "Hi", "chosen": "a", "rejected": "a"},
    "do not answer the same question": {
        "chosen": [{"role": "user", "content": "A?"}, *say("a")],
        "rejected": [{"role": "user", "content": "B?"}, *say("b")],
    },
    "rejected does not end with a message of the assistant": {"chosen": [*ASKED, *say("a")], "rejected": ASKED},
    "rejected: message 2: the assistant's text is empty": {"prompt": "Hi", "chosen": "a", "rejected": " "},
    "chosen: message 1: role 'robot'": {"chosen": [{"role": "robot", "content": "a"}], "rejected": [*ASKED, *say("b")]},
    "expected text in column 'prompt', found a whole number": {"prompt": 3, "chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_columns_tell_what_a_pair_is(tmp_path: Path, name: str, kind: str) -> None:
    row, before = ROWS[name]
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    ((pair, _),) = open_source(SourceSettings(path=str(path))).read(kind="pairs")
    assert [*pair.chosen] == [*before, *say("Good.")]
    assert [*pair.rejected] == [*before, *say("Bad.")]
    assert pair.shared == len(before)


@pytest.mark.parametrize("message", BAD)
def test_a_row_that_is_no_pair_is_one_line_with_its_number_and_counted(tmp_path: Path, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, BAD[message], good)))
    with pytest.raises(UserError, match=r"pairs.jsonl:2: ") as refused:
        list(open_source(SourceSettings(path=str(path))).read(kind="pairs"))
    assert message in str(refused.value)
    lenient = open_source(SourceSettings(path=str(path), on_bad_row="skip"))
    assert len(list(lenient.read(kind="pairs"))) == 2
    (line,) = lenient.report()
    assert "1 skipped" in line
    assert "pairs.jsonl:2" in line


def test_rows_without_the_columns_name_them(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"messages": ASKED}) + "\n")
    with pytest.raises(
        UserError,
        match="no column 'prompt' and 'chosen' and 'rejected', nor others.* these are conversations: objective: sft",
    ):
        list(open_source(SourceSettings(path=str(path))).read(kind="pairs"))


def rows_of(folder: Path, length: int, *answers: tuple[str, str]) -> PairRows:
    pairs = [pair_of([*BEFORE, *say(good)], [*BEFORE, *say(bad)]) for good, bad in answers]
    return PairRows(prepare_chat(pairs, TOKENIZER, folder / "shards"), length)


def test_a_row_is_both_answers_and_only_they_are_learned(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 160, ("Good.", "Not so good."), ("Yes", "No"))
    assert rows.rows_in_epoch == 2
    ids, labels = rows.row(0)
    assert ids.shape == labels.shape == (2, 160)
    for side, answer in enumerate(("Good.", "Not so good.")):
        learned = labels[side][labels[side] != -100]
        assert TOKENIZER.decode(learned.tolist()) == f"{answer}<|im_end|>"  # and not the earlier `Hello.`
        whole = TOKENIZER.encode_chat([*BEFORE, *say(answer)])
        assert ids[side][: len(whole.ids)].tolist() == whole.ids
        assert (labels[side][:-1][labels[side][:-1] != -100] == ids[side][1:][labels[side][:-1] != -100]).all()


def test_answers_that_do_not_fit_are_cut_or_left_out_and_said_so(tmp_path: Path) -> None:
    long = "very " * 20
    beginning = len(TOKENIZER.encode_chat(BEFORE, add_generation_prompt=True).ids)
    rows = rows_of(tmp_path, beginning + 20, ("Good.", "Bad."), (long, "No"), ("Yes", long))
    assert (rows.rows_in_epoch, *rows.left_out.values()) == (3, 0, 0, 2)
    assert "2 pairs have an answer that is cut" in rows.report()[0]
    with pytest.raises(UserError, match="no pair to learn from: 3 pairs left out: an answer begins after"):
        PairRows(rows.shards, beginning)


def test_pairs_whose_tokens_are_the_same_are_left_out_and_counted(tmp_path: Path) -> None:
    """What is looked at is what the model is given: the end of a row may take away what told two answers apart."""
    beginning = len(TOKENIZER.encode_chat(BEFORE, add_generation_prompt=True).ids)
    same = ("the same words, then this", "the same words, then that")
    rows = rows_of(tmp_path, beginning + 10, same, ("Good.", "Bad."), same)
    assert (rows.rows_in_epoch, *rows.left_out.values()) == (1, 0, 2, 0)
    assert rows.report()[0] == f"2 pairs left out: their answers have the same tokens within {beginning + 10}"
    assert TOKENIZER.decode(rows.row(0)[0][0].tolist()).count("Good.")
    whole = PairRows(rows.shards, 160)
    assert (whole.rows_in_epoch, *whole.left_out.values()) == (3, 0, 0, 0)


def test_pairs_that_a_template_makes_equal_are_left_out(tmp_path: Path) -> None:
    """The rows differ in white space, which many templates trim."""
    trimming = SLMTokenizer(260)
    trimming.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content | trim }}{% endgeneration %}{{ eos_token }}"
        "{% endfor %}"
    )
    pairs = [pair_of([*ASKED, *say("Good.")], [*ASKED, *say("Good. ")])] * 2
    with pytest.raises(UserError, match="no pair to learn from: 2 pairs left out: their answers have the same tokens"):
        PairRows(prepare_chat(pairs, trimming, tmp_path / "shards"), 160)


def test_shards_of_something_else_are_refused(tmp_path: Path) -> None:
    talks = [[*ASKED, *say("a")]] * 3
    with pytest.raises(UserError, match="token shards without pairs"):
        PairRows(prepare_chat(talks, TOKENIZER, tmp_path / "chat"), 64)


def test_the_longest_come_first(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 160, ("a", "b"), ("a" * 30, "b"), ("a", "b" * 20))
    assert rows.longest_first() == [1, 2, 0]


TALK = [*ASKED, *say("Good.")]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Good."}]
JUDGED: dict[str, dict[str, Any]] = {
    "trl": {"prompt": "Hi", "completion": "Good.", "label": False},
    "trl, conversational": {"prompt": ASKED, "completion": say("Good."), "label": False},
    "messages": {"messages": TALK, "label": False},
    "LLaMA-Factory": {"conversations": SHAREGPT, "kto_tag": False},
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Good.", "kto_tag": False},
}


@pytest.mark.parametrize("name", JUDGED)
def test_an_answer_with_its_label_is_a_judgement(tmp_path: Path, name: str) -> None:
    good = {key: True if value is False else value for key, value in JUDGED[name].items()}
    path = tmp_path / "judged.jsonl"
    path.write_text(json.dumps(JUDGED[name]) + "\n" + json.dumps(good) + "\n")
    judged = [one for one, _ in open_source(SourceSettings(path=str(path))).read(kind="judgements")]
    assert [([*one.messages], one.label, one.place) for one in judged] == [
        (TALK, False, f"{path}:1"),
        (TALK, True, f"{path}:2"),
    ]
    path.write_text(json.dumps({key: "sour" if value is False else value for key, value in JUDGED[name].items()}))
    with pytest.raises(UserError, match=r"judged.jsonl:1: expected true or false .* in column .*, found 'sour'"):
        list(open_source(SourceSettings(path=str(path))).read(kind="judgements"))


@pytest.mark.parametrize("good", [1, "1", "true", "True", "good", "desirable", "chosen", "thumbs_up", 1.0, "👍"])
@pytest.mark.parametrize("bad", [0, "0", "false", "bad", "Undesirable", "rejected", "thumbs down", "👎"])
def test_labels_are_read_in_every_spelling_and_never_learned_as_conversations(
    tmp_path: Path, good: Any, bad: Any
) -> None:
    path = tmp_path / "a.jsonl"
    for columns in ({"prompt": "Hi", "completion": "Hello."}, {"messages": TALK}):
        path.write_text("".join(json.dumps({**columns, "label": label}) + "\n" for label in (good, bad)))
        assert [one.label for one, _ in open_source(SourceSettings(path=str(path))).read(kind="judgements")] == [
            True,
            False,
        ]
        source = open_source(SourceSettings(path=str(path), on_bad_row="skip"))
        with pytest.raises(UserError, match="labels the answer good or bad: objective: kto"):
            list(source.read(kind="conversations"))
    path.write_text(json.dumps({"messages": TALK, "label": "greeting", "rating": 1}))
    assert len(list(open_source(SourceSettings(path=str(path))).read(kind="conversations"))) == 1
    path.write_text(json.dumps({"messages": TALK, "label": good, "kto_tag": bad}))
    with pytest.raises(UserError, match="'label' and 'kto_tag' contradict each other"):
        list(open_source(SourceSettings(path=str(path))).read(kind="judgements"))


def test_answers_of_weight_0_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    dull = [TALK[0], {**TALK[1], "weight": 0}]
    path.write_text("".join(json.dumps({"messages": one, "label": True}) + "\n" for one in (dull, TALK)))
    source = open_source(SourceSettings(path=str(path)))
    assert [[*one.messages] for one, _ in source.read(kind="judgements")] == [TALK]
    assert source.skipped == {"not to be learned": 1}
    other = [TALK[0], {**TALK[1], "content": "No.", "weight": 0}]
    pairs = [{"chosen": dull, "rejected": other}, {"chosen": TALK, "rejected": [TALK[0], {**other[1], "weight": 1}]}]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = open_source(SourceSettings(path=str(path)))
    assert len(list(source.read(kind="pairs"))) == 1
    assert source.skipped == {"not to be learned": 1}


def test_built_in_answers_are_judged_by_whoever_made_them() -> None:
    source = open_source(SourceSettings(path="sums", documents=4), seed=1)
    labels = {one.label: one.messages for one, _ in source.read(kind="judgements")}
    assert labels.keys() == {True, False}
    assert labels[True][-1]["content"] != labels[False][-1]["content"]


@pytest.mark.parametrize("form", ["score_{}", "{}_score", "{}_rating", "{}-rating"])
def test_pairs_the_wrong_way_round_by_their_scores_are_refused(tmp_path: Path, form: str) -> None:
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b", form.format("chosen"): 1.0}
    rows = [{**pair, form.format("rejected"): score} for score in (9, 0.5)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceSettings(path=str(path), on_bad_row="skip"))
    assert len(list(source.read(kind="pairs"))) == 1
    assert source.skipped == {"pairs the wrong way round by their scores": 1}


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(UserError, match="a.csv:1: two columns are called 'text'"):
        list(open_source(SourceSettings(path=str(tmp_path / "a.csv"))).read())


def test_an_item_with_a_mask_that_is_not_read_is_refused() -> None:
    form, ids = ItemFormat(8, 0, 300), [1, 2, 3]
    form.row({"input_ids": ids, "position_ids": ids, "text": "abc"}, 0)
    with pytest.raises(UserError, match="item 0 of the data set: 'loss_mask' has one value per token"):
        form.row({"input_ids": ids, "loss_mask": [0, 0, 1]}, 0)
    form.row({"input_ids": ids, "weight": 1, "idx": 7, "length": 3}, 0)
    for name, value in (("weight", 0.1), ("weight", torch.tensor(0.1)), ("sample_weight", 0.5), ("masked", True)):
        with pytest.raises(UserError, match=f"item 0 of the data set: '{name}' is not read"):
            form.row({"input_ids": ids, name: value}, 0)
