"""Public files of conversations, pairs and judged answers, as downloaded: each is shown and prepared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slmkit.cli.data import app
from slmkit.data.prepare.preview import samples_of_source
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources.settings import SourceSettings
from slmkit.tokenizer import SLMTokenizer
from tests.data.public_rows import CHATS
from tests.real_data import real_data

# What is shown of the first row, how the file is prepared, and how many documents that makes.
FILES = {
    "alpaca-100.json": ("conversation 1", "--chat", 100),
    "dolly-12.json": ("conversation 1", "--chat", 12),
    "dolly-hhrlhf-500.jsonl.gz": ("conversation 1", "--chat", 500),
    "llamafactory-alpaca-en-500.jsonl.gz": ("conversation 1", "--chat", 500),
    "glaive-toolcall-en-300.jsonl.gz": ("conversation 1", "--chat", 300),
    "dpo-en-300.jsonl.gz": ("chosen 1", "--pairs", 600),
    "stack-exchange-paired-25.json": ("chosen 1", "--pairs", 50),
    "kto-en-300.jsonl.gz": ("good 1", "--judged", 300),
}


def slm(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", FILES)
def test_each_is_shown_and_prepared_whole(tmp_path: Path, name: str):
    path, (title, option, documents) = str(real_data(f"sft/{name}")), FILES[name]
    shown = slm("inspect", path, "--documents", "1")
    assert f"--- {title}" in shown
    assert ("--- rejected 1" in shown) == (option == "--pairs")
    assert "<|im_start|>assistant\n⟧" in shown or " tokens … " in shown
    SLMTokenizer(260).save_pretrained(tmp_path / "tokenizer")
    slm("prepare", path, option, "--tokenizer", str(tmp_path / "tokenizer"), "-o", str(tmp_path / "shards"))
    header = TokenShards.open(tmp_path / "shards").header
    assert (header.documents, header.masked, header.judged) == (documents, True, option == "--judged")


def test_calls_are_learned_and_what_the_tool_answers_is_not(tmp_path: Path):
    schema = CHATS["ShareGPT with system and tools"]
    (tmp_path / "a.jsonl").write_text(json.dumps(schema.row) + "\n")
    tokenizer = SLMTokenizer(260)
    _, (sample,) = samples_of_source(SourceSettings(path=str(tmp_path / "a.jsonl")), tokenizer, 1)
    learned = tokenizer.decode([token for token, trained in zip(sample.ids, sample.trained) if trained])
    read = tokenizer.decode([token for token, trained in zip(sample.ids, sample.trained) if not trained])
    assert '"name": "find", "arguments": {"what": "rain"}' in learned
    assert "It rains." in learned
    assert '{"rain": true}' not in learned
    for part in ('{"rain": true}', "Be kind.", "Rain?", '"description": "Finds."'):
        assert part in read
