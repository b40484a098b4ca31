"""`slm bench data` on very little: every measure is there, of the work that it says. No test looks at the clock."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import data_peers as benchmark_peers
from benchmarks.data import TEMPLATES, measure, write_sparse_shards
from slmkit.workflows.bench import corpus, talks_of
from tests.cli.helpers import slm


def test_both_encoders_of_the_benchmark_do_the_same_work():
    texts, tokenizer = corpus(0.05)
    plain = benchmark_peers.plain_tokenizer(tokenizer)
    assert sum(map(len, texts)) >= 50_000
    for text, ids in zip(texts, tokenizer.encode_batch(texts, threads=1)):
        assert plain.encode(text, add_special_tokens=False).ids == ids.tolist()


def test_the_conversations_of_the_benchmark_hold_all_of_the_text():
    assert [len(talk) for talk in talks_of([str(number) for number in range(20)])] == [6, 6, 6]
    said = [message["content"] for talk in talks_of([str(number) for number in range(20)]) for message in talk]
    assert said == [str(number) for number in range(18)]


def test_sparse_shards_are_read_like_any_and_take_no_room(tmp_path: Path):
    shards = write_sparse_shards(tmp_path / "large", 3_000_000_000)
    assert len(shards) >= 3_000_000_000
    assert not shards.tokens_in(len(shards) - 2**28 - 5, len(shards) - 2**28 + 5).any()
    assert sum(path.stat().st_blocks for path in (tmp_path / "large").iterdir()) * 512 < 1 << 20


def test_the_command_says_every_measure():
    done = slm("bench", "data", "--megabytes", "0.2", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "encoding, one thread",
        "preparation, all cores",
        "conversations, all cores",
        "loading",
    ]
    figures = [re.split(r"\s{2,}", line.strip()) for line in lines if line.startswith(" ")]
    assert all(len(figure) == 2 and "{" not in figure[1] for figure in figures), figures


def test_the_benchmark_measures_the_same_work_beside_others():
    results = dict(measure(0.2, 2, rounds=1))
    assert [name for name, result in results.items() if "ratio" in result] == [
        "encoding, one thread",
        "a megabyte of one character",
        "preparation, all cores",
        *(f"conversations, {name}" for name in TEMPLATES),
    ]
    assert results["loading from 2 GB"]["tokens in the shards"] >= 1_000_000_000
    assert results["first batch of a process"]["seconds"] > 0


def test_a_peer_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLMKIT_LITDATA_PYTHON", raising=False)
    for name in ("_datasets", "_conversations"):
        monkeypatch.setattr(benchmark_peers, name, lambda *_: {"skipped": "not here"})
    results = dict(benchmark_peers.measure_peers(0.6))
    assert results["litdata"] == {"skipped": "SLMKIT_LITDATA_PYTHON names no interpreter that has litdata"}
    assert results["slmkit"]["loading M tokens/s"] > 0
