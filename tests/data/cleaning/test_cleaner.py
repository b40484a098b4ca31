"""What is left out of a corpus, for which reason, and that nothing else is."""

from __future__ import annotations

import gzip
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from slmkit.config import UserError
from slmkit.data import stories
from slmkit.data.cleaning import cleaner
from slmkit.data.cleaning.cleaner import Cleaner
from slmkit.data.cleaning.duplicates import PLACES, SeenKeys, bands_and_rows, signatures
from slmkit.data.cleaning.words import hash_runs, hash_words, shares
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.settings import CleaningSettings
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document
from tests.data.byte_tokenizer import ByteTokenizer

FIRST, SECOND = ("ba", "ko", "mi", "tu", "re", "sol"), ("ra", "ne", "lo", "tik", "s")
WORDS = [first + second for first in FIRST for second in SECOND]


def random_text(seed: int, words: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def edited(text: str, seed: int, edits: int) -> str:
    """A near-copy: so many words replaced."""
    numbers, words = random.Random(seed), text.split()
    for place in numbers.sample(range(len(words)), edits):
        words[place] = "changed"
    return " ".join(words)


def clean(texts: list[str] | list[Document], workers: int = 2, **asked: object) -> tuple[list[str], Cleaner]:
    documents = [Document(text) if isinstance(text, str) else text for text in texts]
    whole = Cleaner(CleaningSettings(**asked))
    with ThreadPoolExecutor(workers) as pool:
        return [document.text for document in whole.clean(documents, pool, workers)], whole


def jaccard(one: str, other: str) -> float:
    runs = [{tuple(text.split()[i : i + 5]) for i in range(len(text.split()) - 4)} for text in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_nothing_is_done_that_is_not_asked_for():
    kept, cleaned = clean(["a", "a", ""])
    assert kept == ["a", "a", ""]
    assert cleaned.report() is None


def test_of_exact_copies_the_first_stays(monkeypatch: pytest.MonkeyPatch):
    texts = [f"text {i % 700}" for i in range(1000)]
    for batch in (1, 50, 1 << 20):
        monkeypatch.setattr(cleaner, "BATCH_CHARACTERS", batch)
        kept, cleaned = clean(texts, exact_duplicates=True)
        assert kept == texts[:700]
        assert (cleaned.documents, dict(cleaned.dropped)) == (1000, {"exact duplicate": 300})
        assert (cleaned.report() or {})["kept"] == 700


def test_pieces_of_one_document_are_compared_as_one():
    pieces = [Document("ab", ends=False), Document("cd"), Document("abc", ends=False), Document("d"), Document("cd")]
    assert clean(pieces, exact_duplicates=True)[0] == ["ab", "cd", "cd"]


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_near_copies_are_found_and_others_are_not(threshold: float, monkeypatch: pytest.MonkeyPatch):
    """Copies well above the threshold: nearly all found. Texts well below it: none lost."""
    originals = [random_text(seed, 300) for seed in range(300)] + [story.text for story in stories.tell_many(5, 300)]
    copies, others = [], []
    for seed, text in enumerate(originals[:300]):
        changed = edited(text, seed, 1 + seed % 3 if seed % 2 else 20 + seed % 30)
        share = jaccard(text, changed)
        if share > threshold + 0.1:
            copies.append(changed)
        elif share < threshold - 0.25:
            others.append(changed)
    assert len(copies) > 40
    assert len(others) > 40
    results = []
    for batch in (50_000, 1 << 20):
        monkeypatch.setattr(cleaner, "BATCH_CHARACTERS", batch)
        results.append(clean(originals + others + copies, near_duplicates=threshold)[0])
    kept = results[0]
    assert results[0] == results[1]
    recall = 1 - len(set(kept) & set(copies)) / len(copies)
    precision_lost = len(set(originals + others) - set(kept)) / len(originals + others)
    assert recall >= 0.95
    assert precision_lost <= 0.02


def test_a_signature_agrees_as_often_as_runs_are_shared_and_as_datasketch_says():
    datasketch = pytest.importorskip("datasketch", reason="pip install datasketch")
    text = random_text(1, 400)
    changed = edited(text, 2, 12)
    ours = signatures(hash_words([text, changed]), 1024)
    estimate = float((ours[0] == ours[1]).mean())
    theirs = []
    for one in (text, changed):
        minhash = datasketch.MinHash(num_perm=1024)
        words = one.split()
        minhash.update_batch([" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)])
        theirs.append(minhash)
    assert abs(estimate - jaccard(text, changed)) < 0.05
    assert abs(estimate - theirs[0].jaccard(theirs[1])) < 0.07


def test_bands_cross_one_half_at_the_threshold():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands, rows = bands_and_rows(threshold)
        assert bands * rows <= PLACES
        assert abs((1 - 0.5 ** (1 / bands)) ** (1 / rows) - threshold) < 0.06


def test_words_are_hashed_by_what_they_are_and_not_by_where_they_stand():
    texts = ["The cat sat.", "  the CAT, sat", "cat the sat", "", "--", "猫が", "がx猫", "thecat"]
    words = hash_words(texts)
    assert words.counts.tolist() == [3, 3, 3, 0, 0, 2, 3, 1]
    rows = [words.hashes[start:stop].tolist() for start, stop in zip(words.starts, words.stops)]
    assert rows[0] == rows[1]
    assert rows[2] == [rows[0][1], rows[0][0], rows[0][2]]
    assert rows[6][0] == rows[5][1]
    assert len(set(words.hashes.tolist())) == 3 + 2 + 1 + 1
    quoted, plain = hash_words(["“It’s fine…” «no»"]), hash_words(["It s fine no"])
    assert np.array_equal(quoted.hashes, plain.hashes)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_runs_are_those_of_each_text_alone(length: int):
    texts = ["a b c d e f", "b", "", "d e f", "a b c d e f"]
    together = hash_runs(hash_words(texts), length)
    for text, start, stop in zip(texts, together.starts, together.stops):
        alone = hash_runs(hash_words([text]), length).hashes
        words = text.split()
        assert len(alone) == (max(1, len(words) - length + 1) if words else 0)
        assert np.array_equal(together.hashes[start:stop], alone)
        assert len(set(alone.tolist())) == len(alone)
    full = hash_runs(hash_words(texts), length, full=True)
    assert (full.stops - full.starts).tolist() == [max(0, len(text.split()) - length + 1) for text in texts]


def test_seen_keys_are_a_set():
    numbers = np.random.default_rng(0).integers(0, 5000, (300, 20), dtype=np.uint64)
    seen, plain = SeenKeys(), set()
    for keys in numbers:
        assert seen.has(keys).tolist() == [int(key) in plain for key in keys]
        seen.add(keys)
        plain.update(keys.tolist())
    assert len(seen) == len(plain)
    assert len(seen._arrays) < 12


def test_length_limits_count_characters_and_words():
    texts = ["one", "one two three", "a" * 50, "one two three four five six", "…" * 5]
    assert clean(texts, min_characters=4, max_characters=20)[0] == ["one two three", "…" * 5]
    kept, cleaned = clean(texts, min_words=1, max_words=3)
    assert kept == ["one", "one two three", "a" * 50]
    assert dict(cleaned.dropped) == {"too long": 1, "too short": 1}


def test_a_document_that_is_too_long_is_never_held_whole():
    endless = (Document("x" * 1000, ends=i == 9_999) for i in range(10_000))
    held = list(cleaner.whole_documents(endless, max_characters=5000))
    assert len(held) == 1
    assert len(held[0]) == 6


def test_scripts_and_letters_are_shares():
    assert shares("añb 12 ", ("Latin",)) == (3 / 5, 1.0)
    assert shares("ab где", ("Latin",)) == (1.0, 2 / 5)
    assert shares("ab где", ("Latin", "Cyrillic")) == (1.0, 1.0)
    texts = ["plain English text", "русский текст", "mostly English и чуть", "12345 67890 a", "猫が座った"]
    kept, cleaned = clean(texts, scripts=["Latin"], min_script_share=0.9)
    assert kept == ["plain English text", "12345 67890 a"]
    assert dict(cleaned.dropped) == {"another script": 3}
    assert clean(texts, scripts=["Han", "Hiragana"])[0] == ["猫が座った"]
    assert clean(texts, min_letter_share=0.5)[1].dropped == {"few letters": 1}
    with pytest.raises(UserError, match="Unicode has no script 'Latinn'; did you mean 'Latin'"):
        clean(texts, scripts=["Latinn"])


def test_evaluation_text_is_left_out_wherever_it_hides(tmp_path: Path):
    question = "If a train leaves the station at nine and another one follows it at ten, which is there first?"
    rows = [{"id": 3, "question": question, "choices": ["the first of them", "the second"]}]
    with gzip.open(tmp_path / "eval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "eval.txt").write_text("one short line\n<|endoftext|>\n" + " ".join(f"w{i}" for i in range(20)))
    texts = [
        "An ordinary story about a train.",
        f"Quiz! {question.upper().replace(',', ' -')} Think.",
        " ".join(question.split()[:12]),  # twelve words of it are no overlap
        "x " + " ".join(f"w{i}" for i in range(4, 17)) + " y",
        " ".join(f"w{i}" for i in range(4, 16)),
        "one short line",
    ]
    kept, cleaned = clean(texts, evaluation=[str(tmp_path)])
    assert kept == [texts[0], texts[2], texts[4], texts[5]]
    assert dict(cleaned.dropped) == {"evaluation text": 2}
    assert texts[2] not in clean(texts, evaluation=[str(tmp_path)], evaluation_words=12)[0]
    with pytest.raises(UserError, match="no text in it has 99 words"):
        clean(texts, evaluation=[str(tmp_path)], evaluation_words=99)
    with pytest.raises(UserError, match="no such file"):
        clean(texts, evaluation=[str(tmp_path / "missing")])


def test_counts_stand_in_the_header_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cleaner, "BATCH_CHARACTERS", 1000)
    texts = [random_text(seed % 50, 40) for seed in range(60)] + [edited(random_text(0, 40), 1, 1), "short"]
    asked = CleaningSettings(exact_duplicates=True, near_duplicates=0.7, min_characters=10)
    for workers in (1, 3):
        prepare_text(texts, ByteTokenizer(), tmp_path / str(workers), cleaning=asked, workers=workers)
    assert (tmp_path / "1" / "header.json").read_bytes() == (tmp_path / "3" / "header.json").read_bytes()
    header = TokenShards.open(tmp_path / "1").header
    assert header.cleaning == {
        "settings": {"exact_duplicates": True, "near_duplicates": 0.7, "min_characters": 10},
        "documents": 62,
        "kept": 50,
        "dropped": {"exact duplicate": 10, "near duplicate": 1, "too short": 1},
    }
    assert header.documents == 50
    with pytest.raises(UserError, match="no text to prepare .of 62 documents: 0 kept; dropped 62 too short"):
        prepare_text(texts, ByteTokenizer(), tmp_path / "none", cleaning=CleaningSettings(min_characters=9999))


def test_texts_without_a_word_are_nobodys_copies():
    assert clean(["…", "!!!", "a b c d e f"], near_duplicates=0.8)[0] == ["…", "!!!", "a b c d e f"]
