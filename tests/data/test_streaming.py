"""Streams: every token once an epoch, and the same batches however one gets there."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.mixture import Phase
from slmkit.data.packing import IGNORED
from slmkit.data.prepare.conversations import ConversationEncoder
from slmkit.data.prepare.held_out import is_held_out
from slmkit.data.sources import open_source
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.streaming import Blocks, ConversationRows, StreamedBatches, TextRows
from tests.data.byte_tokenizer import ByteTokenizer, chat

TOKENIZER = ByteTokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
LENGTH = 16


def write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def numbered_texts(kind: str, count: int) -> list[str]:
    return [f"{kind} {number}: " + "x" * (number % 7) for number in range(count)]


def blocks(path: Path, shuffle: int = 0, repeat: bool = True, held_out: float = 0.0, documents: int = 5) -> Blocks:
    source = open_source(SourceSettings(path=str(path)))
    return Blocks(
        source.read,
        name="it",
        documents=shuffle or documents,
        is_kept=lambda document: not is_held_out(document.text, held_out),
        shuffle_seed=3 if shuffle else None,
        repeat=repeat,
    )


def text_rows(path: Path, **options) -> TextRows:
    return TextRows(blocks(path, **options), TOKENIZER, LENGTH)


def chat_blocks(path: Path, repeat: bool = True) -> Blocks:
    read = functools.partial(open_source(SourceSettings(path=str(path))).read, kind="conversations")
    return Blocks(
        read, name="it", documents=8, is_kept=lambda _: True, shuffle_seed=3, repeat=repeat,
    )  # fmt: skip


def all_rows(rows) -> list:
    found = []
    while (row := rows.next_row()) is not None:
        found.append(row)
    return found


def texts_in(rows: list) -> list[str]:
    """The documents that rows spell, without the one that may be cut at either end."""
    ids = np.concatenate([row.ids for row in rows])
    return [bytes(part[:-1].tolist()).decode() for part in np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]]


def same(one: Batch, other: Batch) -> bool:
    documents = [one.documents, other.documents]
    return (
        torch.equal(one.ids, other.ids)
        and torch.equal(one.labels, other.labels)
        and (documents == [None, None] or torch.equal(*documents))
    )


def test_documents_stand_end_to_end_and_each_token_is_a_label_once(tmp_path: Path) -> None:
    texts = numbered_texts("a", 40)
    rows = all_rows(text_rows(write(tmp_path / "a.jsonl", *texts), repeat=False))
    expected = np.concatenate([[*text.encode(), EOS] for text in texts])
    assert len(rows) == (len(expected) - 1) // LENGTH
    assert np.array_equal(np.concatenate([row.ids for row in rows]), expected[: len(rows) * LENGTH])
    assert np.array_equal(np.concatenate([row.labels for row in rows]), expected[1 : len(rows) * LENGTH + 1])
    for row in rows:
        assert np.array_equal(np.diff(row.documents), (row.ids == EOS)[:-1].astype(int))


@pytest.mark.parametrize("shuffle", [0, 7])
def test_a_second_epoch_is_all_of_the_text_again_after_a_resume_too(tmp_path: Path, shuffle: int) -> None:
    """Not only what stood behind the place of the resume."""
    texts = numbered_texts("a", 30)
    path = write(tmp_path / "a.jsonl", *texts)
    rows = text_rows(path, shuffle=shuffle)
    tokens = sum(len(text) + 1 for text in texts)
    for _ in range(int(0.7 * tokens) // LENGTH):
        rows.next_row()
    resumed = text_rows(path, shuffle=shuffle)
    resumed.seek(json.loads(json.dumps(rows.position())))
    found = Counter(texts_in([resumed.next_row() for _ in range(2 * tokens // LENGTH)]))
    assert all(found[text] in (1, 2, 3) for text in texts)
    assert sum(found[text] >= 2 for text in texts) > 20  # two whole epochs follow, but for what stands at the ends


def test_a_shuffle_moves_whole_documents_within_a_block_and_differs_by_epoch(tmp_path: Path) -> None:
    texts = numbered_texts("a", 30)
    path = write(tmp_path / "a.jsonl", *texts)
    rows = text_rows(path, shuffle=10)
    order = texts_in([rows.next_row() for _ in range(3 * sum(len(text) + 1 for text in texts) // LENGTH)])
    first, second = order[:30], order[30:60]
    assert first != texts
    assert sorted(first[:10]) == sorted(texts[:10])
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != second


def test_a_document_of_many_pieces_stays_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmkit.data.streaming.BLOCK_CHARACTERS", 200_000)
    long = "".join(f"{number} is a number\n" for number in range(20_000))  # five pieces, more than a block holds
    texts = [*numbered_texts("a", 5), long, *numbered_texts("b", 5)]
    path = write(tmp_path / "a.jsonl", *texts)
    rows = text_rows(path, shuffle=4, repeat=False)
    everything = all_rows(rows)
    assert long in texts_in(everything)
    rows.seek({})
    most = [rows.next_row() for _ in range(9 * len(everything) // 10)]
    resumed = text_rows(path, shuffle=4, repeat=False)
    resumed.seek(rows.position())
    assert resumed.position()["block"]["inside"]
    rest = all_rows(resumed)
    assert len(most) + len(rest) == len(everything)
    assert all(np.array_equal(one.ids, other.ids) for one, other in zip(most + rest, everything))


def test_what_a_hash_holds_out_is_never_trained_on(tmp_path: Path) -> None:
    texts = numbered_texts("a", 200)
    found = texts_in(all_rows(text_rows(write(tmp_path / "a.jsonl", *texts), held_out=0.3, repeat=False)))
    kept = [text for text in texts if not is_held_out(text, 0.3)]
    assert found == kept[: len(found)]
    assert 0.55 < len(kept) / 200 < 0.85
    with pytest.raises(UserError, match="nothing to train on: all of its documents are held out"):
        text_rows(tmp_path / "a.jsonl", held_out=1.0).next_row()


CONVERSATIONS = [chat(f"question {n}" + "?" * (n % 5), "answer " * (1 + n % 4)) for n in range(40)]


def conversations(path: Path, rows: list | None = None) -> Path:
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in rows or CONVERSATIONS))
    return path


def test_conversations_are_packed_whole_and_each_is_there_once(tmp_path: Path) -> None:
    length = 120
    path = conversations(tmp_path / "chat.jsonl")
    rows = all_rows(ConversationRows(chat_blocks(path, repeat=False), ConversationEncoder(TOKENIZER), length, seed=1))
    encoded = [[*TOKENIZER.encode_chat(one).ids, EOS] for one in CONVERSATIONS]
    assert max(map(len, encoded)) <= length
    found = []
    for row in rows:
        for document in np.unique(row.documents):
            ids = row.ids[row.documents == document]
            if (ids != PAD).any():
                found.append(ids.tolist())
    assert sorted(found) == sorted(encoded)
    trained = sum(int((row.labels != IGNORED).sum()) for row in rows)
    assert trained == sum(sum(TOKENIZER.encode_chat(one).trained) for one in CONVERSATIONS)
    assert len(rows) < 30  # side by side
    assert len(rows) * length < 1.4 * sum(map(len, encoded))


def test_conversations_with_nothing_to_learn_are_named_and_not_waited_for(tmp_path: Path) -> None:
    path = conversations(tmp_path / "chat.jsonl", [chat("only a question " * 30, "answer")])
    with pytest.raises(UserError, match="nothing to learn within 20 tokens"):
        ConversationRows(chat_blocks(path), ConversationEncoder(TOKENIZER), 20, seed=1).next_row()


PHASES = [Phase(30, (0.5, 0.5)), Phase(70, (0.25, 0.75)), Phase(None, (0.9, 0.1))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "a.jsonl", *numbered_texts("a", 90))
    write(tmp_path / "b.jsonl", *numbered_texts("bb", 60))
    conversations(tmp_path / "chat.jsonl")
    return tmp_path


def mixture(folder: Path, rule: str = "repeat", shuffle: int = 6) -> StreamedBatches:
    sources = {
        name: text_rows(folder / f"{name}.jsonl", shuffle=shuffle, repeat=rule == "repeat") for name in ("a", "b")
    }
    return StreamedBatches(sources, PHASES, rule, rows_per_step=5, separate=True)


def chats(folder: Path) -> StreamedBatches:
    rows = ConversationRows(chat_blocks(folder / "chat.jsonl"), ConversationEncoder(TOKENIZER), 120, seed=1)
    return StreamedBatches({"chat": rows}, [Phase(None, (1.0,))], "repeat", rows_per_step=5, separate=True)


@pytest.mark.parametrize(
    "make", [mixture, chats, lambda folder: mixture(folder, shuffle=0), lambda folder: mixture(folder, "redistribute")]
)
def test_from_the_position_of_any_step_exactly_the_next_batches_follow(folder: Path, make) -> None:
    straight = make(folder)
    batches, positions = [], [{}]
    for step in range(40):
        if not straight.has(step):
            break
        batches.append(straight.batch(step))
        straight.has(step + 1)  # what is made ahead does not move the position
        positions.append(json.loads(json.dumps(straight.position())))
    assert len(batches) > 15
    for step in (0, 1, 5, 6, 13, 14, 15, len(batches) - 1):
        resumed = make(folder)
        resumed.seek(step, positions[step])
        assert resumed.position() == positions[step]
        for later in range(step, len(batches)):
            assert same(resumed.batch(later), batches[later]), (step, later)
        assert resumed.shares(len(batches)) == straight.shares(len(batches))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_have_the_batch_of_one(folder: Path, world: int) -> None:
    whole, ranks = mixture(folder), [mixture(folder) for _ in range(world)]
    for step in range(20):
        parts = [stream.batch(step, rank, world) for rank, stream in enumerate(ranks)]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.batch(step).ids)
        assert {json.dumps(stream.position()) for stream in ranks} == {json.dumps(whole.position())}


def test_a_batch_is_a_function_of_its_step(folder: Path) -> None:
    stream, other = mixture(folder), mixture(folder)
    batches = [stream.batch(step) for step in range(12)]
    assert same(other.batch(9), batches[9])  # walked to
    assert same(other.batch(9), batches[9])
    assert same(other.batch(3), batches[3])  # from the beginning again
    assert same(other.batch(4), batches[4])


def test_shares_follow_the_phases(folder: Path) -> None:
    stream = mixture(folder)
    for step in range(200):
        stream.batch(step)
    for step, expected in ((6, 0.5), (14, (15 + 10) / 70), (200, (15 + 10 + 0.9 * 930) / 1000)):
        assert stream.shares(step)["a"] == pytest.approx(expected, abs=0.01)
    assert sum(stream.shares(200).values()) == pytest.approx(1, abs=1e-4)


def tokens(path: Path) -> int:
    return sum(len(json.loads(line)["text"]) + 1 for line in path.read_text().splitlines())


def test_stop_ends_where_a_source_runs_out_and_redistribute_where_all_have(folder: Path) -> None:
    available = {name: (tokens(folder / f"{name}.jsonl") - 1) // LENGTH for name in ("a", "b")}
    seen = {}
    for rule in ("stop", "redistribute"):
        stream = mixture(folder, rule)
        step = 0
        while stream.has(step):
            stream.batch(step)
            step += 1
        seen[rule] = step * 5
        with pytest.raises(IndexError, match=f"the data ends before step {step}"):
            stream.batch(step)
    assert sum(available.values()) - 5 < seen["redistribute"] <= sum(available.values())
    assert seen["stop"] < seen["redistribute"]
    assert mixture(folder, "repeat").has(3 * seen["redistribute"])


def test_a_mistake_in_the_data_reaches_whoever_asks_for_the_batch(folder: Path) -> None:
    with (folder / "b.jsonl").open("a") as file:
        file.write("{broken\n")
    stream = mixture(folder)
    with pytest.raises(UserError, match=r"b\.jsonl:61"):
        stream.batch(100)
