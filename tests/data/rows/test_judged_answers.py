"""Answers labelled good or bad: shards, and what of them is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slmkit.config import UserError
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.rows.answers import JudgedRows, PairRows
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Judged
from slmkit.data.stream import ChatRows
from slmkit.tokenizer import SLMTokenizer
from tests.cli.helpers import slm
from tests.data.written_shards import written

TOKENIZER = SLMTokenizer(260)


def talk(question: str, answer: str, **more: object) -> list[dict]:
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    return [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer} | more]


ROWS = [(talk(f"What is {n}?", "An answer " * n), n % 3 == 0) for n in range(1, 8)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    judgements = [Judged(messages, label) for messages, label in ROWS]
    return prepare_chat(judgements, TOKENIZER, tmp_path_factory.mktemp("judged") / "shards")


def learned(ids: np.ndarray, labels: np.ndarray) -> str:
    return TOKENIZER.decode(labels[labels != -100].tolist())


def test_a_row_is_a_conversation_whose_last_answer_is_learned_and_its_label(shards: TokenShards) -> None:
    rows = JudgedRows(shards, 256)
    assert rows.rows_in_epoch == len(ROWS)
    for index, (messages, label) in enumerate(ROWS):
        ids, labels = rows.row(index)
        whole = TOKENIZER.encode_chat(messages).ids
        end = len(whole) - whole[::-1].index(TOKENIZER.special_tokens["<|im_end|>"])
        assert ids[:end].tolist() == whole[:end]
        assert (ids[end:] == rows.pad_id).all()
        answer = len(TOKENIZER.encode_chat(messages[:-1], add_generation_prompt=True).ids)
        assert np.flatnonzero(labels != -100).tolist() == list(range(answer - 1, end - 1))
        assert labels[answer - 1 : end - 1].tolist() == whole[answer:end]
        assert bool(rows.extra(index)["desirable"]) is label


def test_each_answer_stands_once_behind_the_prompt_of_another_row(shards: TokenShards) -> None:
    rows = JudgedRows(shards, 256, seed=3)
    assert sorted(rows.others.tolist()) == list(range(len(ROWS)))
    for index in range(len(ROWS)):
        other = int(rows.others[index])
        assert other != index
        extra = rows.extra(index)
        mixed = [*ROWS[index][0][:-1], ROWS[other][0][-1]]
        whole = TOKENIZER.encode_chat(mixed).ids
        count = int((extra["other_ids"] != rows.pad_id).sum())
        assert extra["other_ids"][:count].tolist() == whole[:count]
        assert learned(extra["other_ids"], extra["other_labels"]) == learned(*rows.row(other))
    assert (JudgedRows(shards, 256, seed=3).others == rows.others).all()
    assert (JudgedRows(shards, 256, seed=4).others != rows.others).any()
    assert rows.longest == max(
        int((ids != rows.pad_id).sum())
        for index in range(len(ROWS))
        for ids in (rows.row(index)[0], rows.extra(index)["other_ids"])
    )


def test_answers_that_do_not_fit_are_cut_or_left_out_and_said_so(shards: TokenShards) -> None:
    beginning = len(TOKENIZER.encode_chat(ROWS[0][0][:-1], add_generation_prompt=True).ids)
    rows = JudgedRows(shards, beginning + 25)
    assert (rows.rows_in_epoch, *rows.left_out.values()) == (7, 0, 5)
    assert rows.report() == [f"5 answers are cut at {beginning + 25} tokens"]
    assert all(
        (row != -100).any() for index in range(7) for row in (rows.row(index)[1], rows.extra(index)["other_labels"])
    )
    with pytest.raises(UserError, match="no answer begins within .* in any of 7 conversations"):
        JudgedRows(shards, beginning)


def test_labels_lie_in_the_shards_in_which_their_documents_end(tmp_path: Path) -> None:
    labels = np.array([True, False, False, True, True])
    ends = np.array([4, 9, 11, 17, 20])
    trained = np.ones(20, dtype=bool)
    opened = written(tmp_path / "shards", TOKENIZER, np.arange(20), ends, trained, labels, shard_tokens=6)
    opened.verify()
    assert len(opened.header.shards) == 4
    assert (opened.labels == labels).all()
    assert (opened.document_ends == ends).all()
    (tmp_path / "shards" / "00001.labels").unlink()
    with pytest.raises(UserError, match="00001.labels: is missing"):
        TokenShards.open(tmp_path / "shards")


def test_judged_answers_are_not_taken_for_something_else(shards: TokenShards, tmp_path: Path) -> None:
    """Bad answers must not be learned as though they were good."""
    with pytest.raises(UserError, match="found answers labelled good or bad, for objective kto"):
        ChatRows(shards, 256)
    with pytest.raises(UserError, match="token shards without pairs"):
        PairRows(shards, 256)
    plain = written(tmp_path / "plain", TOKENIZER, np.arange(20), np.array([20]))
    with pytest.raises(UserError, match="hold no answers labelled good or bad"):
        JudgedRows(plain, 256)


def test_the_command_shows_how_many_are_good_also_with_a_length(shards: TokenShards) -> None:
    shown = slm("data", "inspect", shards.directory, "--length", "64")
    assert shown.returncode == 0, shown.stderr
    assert "labels           2 good, 5 bad" in shown.stdout
