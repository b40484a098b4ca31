"""The shards of a Ray cluster are those of this machine's threads, byte for byte."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.data import stories
from slmkit.data.prepare.ray import prepare_text_on_ray
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.settings import CleaningSettings
from slmkit.data.sources import open_together
from slmkit.data.sources.settings import SourceSettings
from slmkit.tokenizer import SLMTokenizer

CLEANING = CleaningSettings(exact_duplicates=True, min_characters=20)


@pytest.fixture
def ray() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="pip install slmkit[cluster]")
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    ray.init(num_cpus=2, object_store_memory=100 << 20, **quiet)
    yield
    ray.shutdown()


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_shards_of_a_cluster_are_those_of_this_machine(tmp_path: Path, ray: None):
    texts = [story.text for story in stories.tell_many(0, 200)]
    tokenizer = SLMTokenizer(400)
    tokenizer.train(texts)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [*texts[:120], "short", texts[3], texts[4], *texts[120:]]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows[:90]))
    (tmp_path / "text" / "b.txt").write_text("\n<|endoftext|>\n".join(rows[90:]))
    (tmp_path / "long.txt").write_text("A line of one long text.\n" * 8000)
    sources = [SourceSettings(path=str(tmp_path / name)) for name in ("text", "long.txt")]
    told: list[tuple[int, int, int]] = []
    for seed in (None, 4):
        options = {"shuffle_seed": seed, "cleaning": CLEANING, "shard_characters": 20_000}
        source = open_together(sources)
        documents = (document for document, _ in source.read())
        local = prepare_text(documents, tokenizer, tmp_path / f"local {seed}", sources=source.describe(), **options)
        assert len(local.header.shards) > 4
        there = tmp_path / f"ray {seed}"
        remote = prepare_text_on_ray(
            sources, tmp_path / "tokenizer", there, progress=lambda *done: told.append(done), **options
        )
        assert files(remote.directory) == files(local.directory)
        assert told[-1][:2] == (local.header.documents, len(local))
    assert remote.header.cleaning is not None
    assert remote.header.cleaning["dropped"] == {"exact duplicate": 2, "too short": 1}


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path):
    pytest.importorskip("ray", reason="pip install slmkit[cluster]")
    SLMTokenizer(300).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match="no Ray cluster at"):
        prepare_text_on_ray(
            [SourceSettings(path=str(tmp_path / "a.txt"))], tmp_path / "tokenizer", tmp_path / "out", address="auto"
        )
