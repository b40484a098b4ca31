"""The short rows of a public file of rated answers: LoRA by KTO, merged, talked to; every step as a user types it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from slmkit.model.files.directory import load_decoder, save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.logging.metrics_log import MetricsLog
from tests.cli.helpers import slm
from tests.real_data import real_data
from tests.training.helpers import TOKENIZER, config


def test_rated_answers_become_an_adapter_that_is_merged_and_talked_to(tmp_path: Path) -> None:
    shape = config(max_position_embeddings=512)
    save_decoder(build_decoder(shape, 3), shape, tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    with gzip.open(real_data("sft/kto-en-300.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [line for line in file if len(line) < 500]
    (tmp_path / "ratings.jsonl").write_text("".join(rows), encoding="utf-8")
    trained = slm(
        "train", "own-ratings", "model.path=base", "data.source=ratings.jsonl",
        "output_dir=rated", "lora.r=4", "train.sequence_length=512", "train.tokens_per_step=4096", "train.max_steps=3",
        "train.num_train_epochs=null", "train.eval_steps=3", "train.logging_steps=1", "train.learning_rate=1e-3",
        "train.sample_tokens=3", "train.device=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "good: " in (tmp_path / "rated" / "xray.md").read_text() or "bad: " in trained.stdout + trained.stderr
    lines = MetricsLog(tmp_path / "rated" / "metrics.jsonl").read()
    assert len(lines) == 3
    assert lines[0]["loss"] == pytest.approx(0.5, abs=0.01)  # every reward is 0 before the first step
    assert {"divergence", "desirable", "validation/desirable", "validation/divergence"} <= lines[-1].keys()
    header = json.loads((tmp_path / "rated" / "data" / "train" / "header.json").read_text())
    assert header["judged"]
    assert 0.8 * len(rows) < header["documents"] < len(rows)
    inspected = slm("data", "inspect", "rated/data/train", cwd=tmp_path).stdout
    assert re.search(r"^labels +\d+ good, \d+ bad$", inspected, re.MULTILINE), inspected
    merged = slm("merge", "base", "--adapter", "rated", "-o", "whole", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    weights = [dict(load_decoder(tmp_path / name)[0].named_parameters()) for name in ("base", "whole")]
    assert any((weights[1][name] != tensor).any() for name, tensor in weights[0].items())
    said = slm("chat", "whole", "--max-new-tokens", "4", cwd=tmp_path, stdin="Hi\n")
    assert said.returncode == 0, said.stderr
