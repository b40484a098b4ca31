"""`slm data prepare` and `slm data inspect`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmkit.data import stories
from slmkit.data.shards.reader import TokenShards
from slmkit.tokenizer import SLMTokenizer
from tests.cli.helpers import refused, slm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = [story.text for story in stories.tell_many(0, 40)]
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join([*texts, "tiny", texts[7]]))
    chats = [stories.conversation(0, index) for index in range(5)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = SLMTokenizer(400)
    tokenizer.train(texts)
    tokenizer.save_pretrained(folder / "tok")
    return folder


def test_text_is_prepared_cleaned_shuffled_and_looked_into(folder: Path):
    done = slm(
        "data", "prepare", "stories.txt", "--tokenizer", "tok", "-o", "shards", "--shuffle", "3", "--workers", "2",
        "--clean", "exact_duplicates=true", "--clean", "min_characters=10", "--shard-characters", "5000", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "40 of 42 documents kept; dropped: 1 too short, 1 exact duplicate" in done.stdout
    header = TokenShards.open(folder / "shards").header
    assert (header.documents, header.shuffle_seed) == (40, 3)
    assert len(header.shards) > 2
    shown = slm("data", "inspect", "shards", "--tokenizer", "tok", "--length", "64", "--documents", "1", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert "documents        40, shuffled by seed 3" in shown.stdout
    assert "0 documents are copies" in shown.stdout
    assert "of the documents are longer than 64 tokens" in shown.stdout
    assert "--- document 1," in shown.stdout
    assert "--- document 2," not in shown.stdout


def test_copies_are_counted(folder: Path):
    slm("data", "prepare", "stories.txt", "--tokenizer", "tok", "-o", "plain", cwd=folder)
    assert "1 document is a copy of one before" in slm("data", "inspect", "plain", cwd=folder).stdout


def test_conversations_are_shown_with_what_is_learned(folder: Path, monkeypatch: pytest.MonkeyPatch):
    done = slm("data", "prepare", "chats.jsonl", "--chat", "--tokenizer", "tok", "-o", "chats", cwd=folder)
    assert done.returncode == 0, done.stderr
    said = next(message["content"] for message in stories.conversation(0, 0) if message["role"] == "assistant")
    for path in ("chats", "chats.jsonl"):
        shown = slm("data", "inspect", path, "--tokenizer", "tok", "--documents", "1", cwd=folder).stdout
        assert "In ⟦brackets⟧: read, not learned" in shown
        assert "⟧" + said.splitlines()[0][:40] in shown, "without colours the brackets tell"
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = slm("data", "inspect", "chats", "--tokenizer", "tok", "--documents", "1", cwd=folder).stdout
    assert "\x1b[32m" + said.splitlines()[0][:40] in shown


def test_mistakes_are_one_line(folder: Path):
    arguments = ["data", "prepare", "stories.txt", "--tokenizer", "tok", "-o", "x"]
    assert "did you mean 'near_duplicates'" in refused(*arguments, "--clean", "near_duplicate=0.8", cwd=folder)
    assert "no script 'Latein'" in refused(*arguments, "--clean", "scripts=[Latein]", cwd=folder)
    assert "text_column" in refused(*arguments, "--source", "text_colum=a", cwd=folder)
    assert not (folder / "x").exists()


def test_a_tokenizer_is_trained_on_as_much_of_every_source(tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text('{"text": "ababababab"}\n' * 40 + '{"text": "zyzyzyzyzyzy"}\n' * 40)
    (tmp_path / "few.jsonl").write_text('{"text": "cdcdcdcdcd"}\n' * 5)
    command = ("tokenizer", "train", "many.jsonl", "few.jsonl", "--documents-per-source", "5", "-o", "tok")
    done = slm(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = set(json.loads((tmp_path / "tok" / "tokenizer.json").read_text())["model"]["vocab"])
    assert {"abab", "cdcd"} <= tokens
    assert not {"zy", "yz"} & tokens  # beyond the fifth document of its source
    assert "two sources are called 'few.jsonl'" in refused("tokenizer", "train", "few.jsonl", "few.jsonl", cwd=tmp_path)
