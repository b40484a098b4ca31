"""Rows and batches: every token once an epoch, the same at every step however it was reached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.shards.reader import TokenShards
from slmkit.data.stream import ChatRows, DocumentRows, PretrainRows, Stream
from tests.data.byte_tokenizer import ByteTokenizer, chat
from tests.data.written_shards import written

TOKENIZER = ByteTokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def counting_shards(directory: Path, tokens: int) -> TokenShards:
    """Shards in which a token is its own position."""
    return written(directory, ByteTokenizer(size=tokens), np.arange(tokens), np.array([tokens]), shard_tokens=37)


@pytest.fixture
def rows(tmp_path: Path) -> PretrainRows:
    return PretrainRows(counting_shards(tmp_path / "counting", 103), 5)  # 20 rows


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels) and one.weight == other.weight


def test_pretraining_rows_are_windows_whose_labels_are_one_further(rows: PretrainRows):
    assert rows.rows_in_epoch == 20
    for index in range(20):
        ids, labels = rows.row(index)
        assert ids.tolist() == list(range(5 * index, 5 * index + 5))
        assert labels.tolist() == [token + 1 for token in ids]
        assert ids.dtype == labels.dtype == np.int64


def test_many_rows_at_once_are_the_same_rows(rows: PretrainRows):
    indices = [7, 0, 19, 7, 3]
    ids, labels = rows.rows(indices)
    assert ids.flags.c_contiguous
    assert ids.dtype == labels.dtype == np.int64
    for place, index in enumerate(indices):
        assert np.array_equal(np.stack(rows.row(index)), np.stack([ids[place], labels[place]]))


def test_every_window_comes_once_in_each_epoch_and_in_another_order(rows: PretrainRows):
    stream = Stream(rows, rows_per_step=3, seed=1)
    firsts = torch.cat([stream.batch(step).ids[:, 0] for step in range(20)]).tolist()  # three epochs
    epochs = [firsts[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(0, 100, 5)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(0, 100, 5))


def test_a_batch_is_a_function_of_seed_and_step_alone(rows: PretrainRows):
    straight = Stream(rows, 6, seed=1)
    batches = [straight.batch(step) for step in range(12)]
    resumed = Stream(rows, 6, seed=1)
    assert all(same(resumed.batch(step), batches[step]) for step in (7, 8, 11, 2))
    assert not same(Stream(rows, 6, seed=2).batch(0), batches[0])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_the_shares_of_all_ranks_are_the_batch(rows: PretrainRows, world: int):
    stream = Stream(rows, rows_per_step=7, seed=1)
    for step in (0, 2, 9):
        whole = stream.batch(step)
        shares = [stream.batch(step, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([share.ids for share in shares]), whole.ids)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        assert sum(share.weight for share in shares) == whole.weight == 35
        assert max(len(share.ids) for share in shares) - min(len(share.ids) for share in shares) <= 1


def test_micro_batches_are_the_batch_in_order(tmp_path: Path):
    shards = prepare_chat([chat("?", "!" * (1 + i % 5)) for i in range(40)], TOKENIZER, tmp_path)
    batch = Stream(ChatRows(shards, 16), 7).batch(0)
    parts = batch.split(3)
    assert [len(part.ids) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert sum(part.weight for part in parts) == batch.weight == int((batch.labels != IGNORED).sum())
    assert same(batch.split(7)[0], batch)
    assert same(batch.to("cpu"), batch)


def test_a_step_that_cannot_be_shared_is_refused(rows: PretrainRows):
    with pytest.raises(UserError, match="2 rows a step cannot be shared by 3 processes"):
        Stream(rows, 2).batch(0, rank=0, world=3)


def test_too_little_text_says_how_much_there_is_and_what_one_sequence_needs(tmp_path: Path):
    shards = counting_shards(tmp_path, 103)
    assert PretrainRows(shards, 102).rows_in_epoch == 1
    with pytest.raises(UserError, match="103 tokens are too few for one sequence, which needs 104"):
        PretrainRows(shards, 103)


def unpadded(ids: np.ndarray, labels: np.ndarray) -> tuple[list[int], list[int]]:
    kept = ids != PAD
    assert (labels[~kept] == IGNORED).all()
    return ids[kept].tolist(), labels[kept].tolist()


def test_chat_rows_hold_whole_conversations_and_learn_what_the_mask_says(tmp_path: Path):
    shards = prepare_chat([chat("Hi", "Ho"), chat("?", "!")], TOKENIZER, tmp_path)
    rows = ChatRows(shards, 14)
    assert (rows.rows_in_epoch, rows.truncated, rows.untrained) == (1, 0, 0)
    ids, labels = rows.row(0)
    assert ids.tolist() == [258, 72, 105, 259, 72, 111, EOS, 258, 63, 259, 33, EOS, PAD, PAD]
    nothing = IGNORED
    assert labels.tolist() == [nothing] * 3 + [72, 111] + [nothing] * 4 + [33] + [nothing] * 4


def test_every_learned_token_of_a_chat_is_learned_once(tmp_path: Path):
    chats = [chat("?" * (i % 7), "".join(map(chr, range(65, 65 + i % 11)))) for i in range(100)]
    shards = prepare_chat(chats, TOKENIZER, tmp_path)
    rows = ChatRows(shards, 32)
    learned = [label for i in range(rows.rows_in_epoch) for label in rows.row(i)[1].tolist() if label != IGNORED]
    expected = [ord(letter) for one in chats for letter in one[1]["content"]]
    assert sorted(learned) == sorted(expected)
    assert rows.untrained == sum(not one[1]["content"] for one in chats)


def test_the_first_token_of_a_conversation_is_never_a_label(tmp_path: Path):
    ids = np.array([1, 2, EOS, 3, 4, EOS, 5, EOS])
    rows = ChatRows(written(tmp_path, TOKENIZER, ids, np.array([3, 6, 8]), ids != EOS), 6)
    assert rows.row(0)[1].tolist() == [2, IGNORED, IGNORED, 4, IGNORED, IGNORED]
    assert (rows.rows_in_epoch, rows.untrained) == (1, 1)  # the third has nothing else to learn


def test_conversations_that_do_not_fit_are_cut_and_counted(tmp_path: Path):
    chats = [chat("?", "abcdefgh"), chat("long question", "!"), chat("?", ""), chat("?", "ok")]
    rows = ChatRows(prepare_chat(chats, TOKENIZER, tmp_path), 8)
    assert (rows.truncated, rows.untrained) == (2, 2)
    seen = sorted(unpadded(*rows.row(i)) for i in range(rows.rows_in_epoch))
    nothing = IGNORED
    assert seen == [
        ([258, 63, 259, *b"abcde"], [nothing] * 2 + [*b"abcde", nothing]),
        ([258, 63, 259, *b"ok", EOS], [nothing] * 2 + [*b"ok", nothing, nothing]),
    ]


def test_chats_with_nothing_to_learn_are_refused(tmp_path: Path):
    shards = prepare_chat([chat("long question", "!")], TOKENIZER, tmp_path / "chat")
    with pytest.raises(UserError, match="nothing to learn within 8 tokens in any of 1 conversations"):
        ChatRows(shards, 8)
    with pytest.raises(UserError, match="expected shards of conversations, found plain text"):
        ChatRows(prepare_text(["text"], TOKENIZER, tmp_path / "text"), 8)


def test_every_token_of_every_document_is_validated_once_and_after_its_own_context(tmp_path: Path):
    texts = [chr(97 + i % 26) * (1 + 5 * i % 33) + chr(48 + i % 10) for i in range(60)]
    shards = prepare_text(texts, TOKENIZER, tmp_path)
    rows = DocumentRows(shards, 16)
    labels_seen: list[int] = []
    for i in range(rows.rows_in_epoch):
        ids, labels = rows.row(i)
        learned = labels[labels != IGNORED]
        assert ids.shape == labels.shape == (16,)
        assert (labels[: len(learned)] != IGNORED).all()
        assert np.array_equal(ids[1 : len(learned)], learned[:-1])  # each label is the next one's context
        assert (ids[len(learned) :] == PAD).all()
        labels_seen += learned.tolist()
    assert sorted(labels_seen) == sorted(shards.tokens_in(0, len(shards)).tolist())


def test_short_documents_are_validated_whole_behind_an_end_of_text(tmp_path: Path):
    rows = DocumentRows(prepare_text(["abc", "de", "fgh"], TOKENIZER, tmp_path), 7)
    assert [unpadded(*rows.row(i)) for i in range(rows.rows_in_epoch)] == [
        ([EOS, *b"abc"], [*b"abc", EOS]),
        ([EOS, *b"fgh", EOS, *b"de"], [*b"fgh", EOS, *b"de", EOS]),
    ]


def test_a_document_longer_than_a_row_goes_on_with_the_token_before_the_cut(tmp_path: Path):
    rows = DocumentRows(prepare_text(["abcdefg"], TOKENIZER, tmp_path), 3)
    assert [unpadded(*rows.row(i)) for i in range(rows.rows_in_epoch)] == [
        ([EOS, *b"ab"], [*b"abc"]),
        ([*b"cde"], [*b"def"]),
        ([*b"fg"], [*b"g", EOS]),
    ]


def test_padding_needs_no_token_of_its_own(tmp_path: Path):
    class WithoutPadding(ByteTokenizer):
        pad_token_id = None

    shards = prepare_text(["\0a"], WithoutPadding(), tmp_path)
    ids, labels = DocumentRows(shards, 6).row(0)
    assert ids.tolist() == [EOS, 0, 97, 0, 0, 0]
    assert labels.tolist() == [0, 97, EOS] + [IGNORED] * 3


TEXTS = ["abc", "defgh", "i", "jklmnopq" * 3]


def borders(row: np.ndarray) -> list[int]:
    return [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]


def test_documents_of_a_pretraining_row_end_with_their_end_of_text(tmp_path: Path):
    rows = PretrainRows(prepare_text(TEXTS, TOKENIZER, tmp_path), 7)
    for index in range(rows.rows_in_epoch):
        ids, _ = rows.row(index)
        *inner, _ = borders(rows.documents(index))[1:]
        assert inner == [i + 1 for i in np.flatnonzero(ids == EOS).tolist() if i + 1 < 7]


def test_documents_of_packed_rows_are_the_ones_packed(tmp_path: Path):
    rows = DocumentRows(prepare_text(TEXTS, TOKENIZER, tmp_path), 16)
    for index in range(rows.rows_in_epoch):
        ids, labels = rows.row(index)
        numbers = rows.documents(index)
        inner = [start for start in borders(numbers)[1:-1] if labels[start] != IGNORED]
        assert inner == [i + 1 for i in np.flatnonzero(ids == EOS).tolist() if i and labels[i + 1] != IGNORED]


def test_only_a_stream_that_is_asked_to_separates_documents(rows: PretrainRows):
    assert Stream(rows, 4).batch(0).documents is None
    batch = Stream(rows, 4, separate=True).batch(0)
    assert batch.documents is not None
    assert batch.documents.shape == batch.ids.shape
    assert [part.documents.shape for part in batch.split(3)] == [(3, 5), (1, 5)]  # type: ignore[union-attr]
