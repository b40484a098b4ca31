"""The Python that documents show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from slmkit import SLMForCausalLM
from tests.real_data import real_data

ROOT = Path(__file__).parent.parent


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_page_on_python_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks((ROOT / "docs" / "python.md").read_text(encoding="utf-8")):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["figures"]["loss"] > 0
    assert (tmp_path / "runs" / "short" / "latest").resolve().name == "step-000006"


def test_the_readmes_script_runs_at_a_smaller_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("\n\n".join(f"It was day {n}. The fox had a red kite." for n in range(60)))
    (script,) = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    for large, small in (("2048", "300"), ("=256", "=32"), ("=704", "=64"), ("=128", "=16"), ("=10", "=1")):
        assert large in script
        script = script.replace(large, small)
    exec(script, {})
    assert SLMForCausalLM.from_pretrained("runs/script").config.hidden_size == 32


SMALLER = {
    "vocab_size=128256": "vocab_size=400", "hidden_size=2048": "hidden_size=32", "num_hidden_layers=16":
    "num_hidden_layers=2", "num_attention_heads=32": "num_attention_heads=4", "num_key_value_heads=8":
    "num_key_value_heads=2", "sequence_length=2048": "sequence_length=64",
}  # fmt: skip
IMPORTS = (
    "from typing import List\n"
    "from slmkit import DistillationLoss, SLMConfig, SLMForCausalLM, SLMTokenizer, SLMTrainer, TextDataset\n"
)


def test_the_quick_start_of_the_llama_style_document_runs_but_for_its_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = real_data("../seeds/S2-Llama-3.2-style.md").read_text(encoding="utf-8")
    for large, small in SMALLER.items():
        assert large in text, large
        text = text.replace(large, small)
    lines = [re.sub(r"^from \w+ import .*", "", line) for line in text.splitlines()]
    train, distil, generate, texts, tokenizer, loss = python_blocks("\n".join(lines))
    names: dict = {}
    exec(IMPORTS + train, names)
    names["model"].save_pretrained("path/to/teacher")
    exec(distil + "trainer.train()", names)
    torch.manual_seed(0)
    exec(generate, names)  # with "./checkpoints/best_model"
    assert isinstance(names["generated_text"], str)
    assert names["generated_text"] in capsys.readouterr().out
    exec(texts + "TextDataset(train_texts, tokenizer, max_length=16)", names)
    exec(tokenizer, names)
    exec(loss, names)
