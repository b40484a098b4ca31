"""From documents to shards, and what is held out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from slmkit.config import UserError, load_settings
from slmkit.data.prepare import conversations
from slmkit.data.prepare import text_to_shards as prepare
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.prepare.held_out import split_conversations, split_validation
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.settings import DataSettings
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document
from tests.data.byte_tokenizer import ByteTokenizer, chat
from tests.data.read_files import read_documents

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_token_id


def documents_in(shards: TokenShards) -> list[list[int]]:
    starts = [0, *shards.document_ends.tolist()]
    return [shards.tokens_in(start, stop).tolist() for start, stop in pairwise(starts)]


def text_of(documents: Iterator[Document]) -> str:
    return "".join(document.text for document in documents)


def test_every_document_is_followed_by_end_of_text(tmp_path: Path):
    shards = prepare_text(["ab", "é"], TOKENIZER, tmp_path / "shards")
    assert documents_in(shards) == [[97, 98, EOS], [0xC3, 0xA9, EOS]]
    assert (shards.header.documents, shards.header.tokens, shards.header.text_bytes) == (2, 6, 4)
    assert not shards.header.masked


def test_the_pieces_of_a_long_document_have_no_end_of_text_between_them(tmp_path: Path):
    pieces = [Document("ab", ends=False), Document("cd"), Document("e")]
    assert documents_in(prepare_text(pieces, TOKENIZER, tmp_path / "shards")) == [[97, 98, 99, 100, EOS], [101, EOS]]


def test_a_text_cut_off_for_validation_still_ends(tmp_path: Path):
    shards = prepare_text([Document("ab", ends=False)], TOKENIZER, tmp_path / "shards")
    assert documents_in(shards) == [[97, 98, EOS]]


@pytest.mark.parametrize("batch", [1, 70, 1000])
def test_shards_do_not_depend_on_how_much_is_tokenized_at_once(
    tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(conversations, "SHARD_TOKENS", batch)
    shards = prepare_text([f"document {i}" for i in range(50)], TOKENIZER, tmp_path / "shards")
    assert documents_in(shards) == [[*f"document {i}".encode(), EOS] for i in range(50)]
    shards = prepare_chat([chat(f"{i}?", f"{i}!") for i in range(8)], TOKENIZER, tmp_path / "chats")
    assert [len(document) for document in documents_in(shards)] == [7] * 8


def test_conversations_keep_their_mask_and_end_in_a_token_that_is_not_learned(tmp_path: Path):
    shards = prepare_chat([chat("Hi", "Ho"), chat("?", "!")], TOKENIZER, tmp_path / "shards")
    assert documents_in(shards) == [[258, 72, 105, 259, 72, 111, EOS], [258, 63, 259, 33, EOS]]
    assert shards.trained_in(0, 12).astype(int).tolist() == [*[0, 0, 0, 0, 1, 1, 0], *[0, 0, 0, 1, 0]]
    assert shards.header.masked
    assert shards.header.text_bytes == 6


def test_progress_is_told_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1)
    told: list[tuple[int, int, int]] = []
    prepare_text(["ab", "c"], TOKENIZER, tmp_path / "shards", progress=lambda *done: told.append(done))
    assert told == [(1, 3, 2), (2, 5, 3)]


def test_a_mistake_in_the_text_leaves_the_old_shards(tmp_path: Path):
    prepare_text(["old"], TOKENIZER, tmp_path / "shards")
    (tmp_path / "a.txt").write_bytes(b"fine\n<|endoftext|>\nbroken \xff")
    with pytest.raises(UserError, match="offset 26"):
        prepare_text(read_documents(tmp_path / "a.txt"), TOKENIZER, tmp_path / "shards")
    assert documents_in(TokenShards.open(tmp_path / "shards")) == [[*b"old", EOS]]
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "shards"]


def prepare_with_real_tokenizer(directory: str) -> None:
    """In a process of its own, since threads are counted once in each."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    real = Tokenizer(models.BPE())
    real.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [f"the {i}th story of a {i % 7} year old child and a dog" for i in range(2000)]
    real.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=290, show_progress=False))

    class Wrapped(ByteTokenizer):
        def encode_batch(self, texts: list[str], threads: int | None = None) -> list[np.ndarray]:
            return [np.array(encoding.ids) for encoding in real.encode_batch(texts)]

    prepare_text(texts, Wrapped(size=290), directory)


def test_the_number_of_threads_changes_nothing(tmp_path: Path):
    for threads in ("1", "3"):
        module = "tests.data.prepare.test_text_to_shards"
        code = f"import {module} as t; t.prepare_with_real_tokenizer({str(tmp_path / threads)!r})"
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    for name in ("header.json", "00000.tokens", "00000.ends"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_of_many_documents_a_hash_holds_some_out():
    corpus = [Document(f"story {i % 900}") for i in range(1000)]
    train, held_out = map(list, split_validation(lambda: iter(corpus), 0.1))
    assert sorted(train + held_out) == sorted(corpus)
    assert 60 < len(held_out) < 140
    assert not set(train) & set(held_out)  # copies are on one side
    assert [document for document in corpus if document in set(held_out)] == held_out


def test_the_pieces_of_a_document_stay_on_one_side():
    corpus = [Document(part, ends=part == "c") for i in range(300) for part in (f"a{i}", f"b{i}", "c")]
    train, held_out = split_validation(lambda: iter(corpus), 0.1)
    for side in (train, held_out):
        joined = text_of(side)
        numbers = [part[1:] for part in joined.replace("c", "c ").replace("b", " b").split() if part != "c"]
        assert numbers
        for document in joined.split("c")[:-1]:
            first, second = document[1:].split("b")
            assert first == second


def test_half_a_surrogate_pair_is_held_out_or_trained_on_like_any_text():
    corpus = [Document(f"half {i} \ud800") for i in range(300)]
    train, held_out = map(list, split_validation(lambda: iter(corpus), 0.1))
    assert held_out
    assert sorted(train + held_out) == sorted(corpus)


def test_held_out_documents_are_not_there_before_the_others_were_read():
    train, held_out = split_validation(lambda: (Document(f"story {i}") for i in range(300)), 0.1)
    next(train)
    with pytest.raises(RuntimeError, match="read the training documents first"):
        next(held_out)


def test_one_long_text_is_cut_at_a_line_end_and_its_last_part_held_out(tmp_path: Path):
    text = "".join(f"line {number} of a play\n" for number in range(10_000))
    (tmp_path / "a.txt").write_text(text)
    train, held_out = map(text_of, split_validation(lambda: read_documents(tmp_path / "a.txt"), 0.1))
    assert train + held_out == text
    assert train.endswith("\n")
    assert abs(len(held_out) - len(text) / 10) < 30


def test_a_text_of_one_line_is_cut_all_the_same():
    train, held_out = split_validation(lambda: [Document("a b c d e")], 0.3)
    assert (text_of(train), text_of(held_out)) == ("a b c", " d e")


def test_conversations_are_held_out_by_hash_and_copies_stay_together():
    corpus = [chat(f"{i % 180}?", f"{i % 180}!") for i in range(200)]
    train, held_out = split_conversations(corpus, 0.1)
    assert sorted(map(str, train + held_out)) == sorted(map(str, corpus))
    assert 8 < len(held_out) < 36
    assert all(one not in train for one in held_out)
    train, held_out = split_conversations(corpus[:3], 0.01)
    assert (len(train), len(held_out)) == (2, 1)


def test_too_little_to_hold_out_is_said():
    with pytest.raises(UserError, match="too little text"):
        split_validation(lambda: [Document("a")], 0.5)
    with pytest.raises(UserError, match="too few"):
        split_conversations([chat("?", "!")], 0.5)
    for copies in (lambda: split_validation(lambda: [Document("a")] * 300, 0.1),
                   lambda: split_conversations([chat("?", "!")] * 3, 0.5)):  # fmt: skip
        with pytest.raises(UserError, match="are copies of one text, .* add other text, or name .* as data.validation"):
            copies()
    for fraction in (0, 1, -0.1):
        with pytest.raises(UserError, match="validation_fraction"):
            load_settings(DataSettings, {"source": "a.txt", "validation_fraction": fraction})
