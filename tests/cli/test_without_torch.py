"""A mistake in the arguments is answered before torch is loaded, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys
from slmkit.cli import main
for arguments, code in json.loads(sys.argv[1]):
    sys.argv = ["slm", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == code, (arguments, end.code)
    loaded = [name for name in ("torch", "transformers", "matplotlib") if name in sys.modules]
    assert not loaded, (arguments, loaded)
"""
FINE = [["--help"], [], ["--version"], ["data"], ["tokenizer"], ["recipes"], ["train", "own-text", "--print-config"]]
WRONG = [
    ["trian"],
    ["train", "nosuch"],
    ["train", "own-text", "lr=1"],
    ["train", "own-text", "train.learning_rate=fast"],
    ["train", "own-text", "data=book.txt"],
    ["train", "own-text"],
    ["train", "own-text", "data.source=nosuch.txt"],
    ["train", "own-text", "data.source=[book.txt,nosuch.txt]"],
    ["train", "own-chat", "data.source=book.txt"],
    ["train", "own-chat", "data.source=book.txt", "model.path=runs/nothing"],
    ["train", "own-chat-lora", "data.source=book.txt"],
    ["train", "own-preferences", "data.source=book.txt"],
    ["train", "own-preferences", "data.source=book.txt", "model.path=runs/nothing"],
    ["train", "own-chat", "data.source=book.txt", "model.path=model", "tokenizer.path=runs/nothing"],
    ["train", "own-text", "data.source=book.txt", "data.validation.path=nosuch.txt"],
    ["train", "quickstart-distill", "distillation.teacher=runs/nothing"],
    ["distill-cache", "quickstart-distill", "distillation.teacher=runs/nothing", "distillation.cache=out"],
    ["eval", "nosuch", "--data", "nosuch.txt"],
    ["eval", "model", "--data", "nosuch.txt"],
    ["merge", "model", "--adapter", "model"],
    ["merge", "model", "--adapter", "runs/nothing"],
    ["merge", "ties"],
    ["merge", "ties", "base_model=model", "models.0.model=model", "models.1.model=runs/nothing"],
    ["push", "nosuch", "me/book"],
    ["generate", "nosuch", "x"],
    ["generate", "nosuch", "x", "--temperature", "-1"],
    ["generate", "nosuch", "x", "--max-new-tokens", "0"],
    ["chat", "nosuch"],
    ["serve", "nosuch"],
    ["serve", "model", "model"],
    ["serve", "model", "--host", "0.0.0.0"],
    ["serve", "model", "--host", "nosuch.invalid"],
    ["serve", "model", "--key-file", "nosuch"],
    ["serve", "model", "--cors", "example.org"],
    ["serve", "model", "--engine", "llamacpp", "--ui"],
    ["serve", "model", "--engine", "llamacpp", "--memory", "1"],
    ["serve", "model", "--engine", "vllm", "--no-prefix-cache"],
    ["serve", "model", "--engine", "llamacpp", "--device", "cpu"],
    ["ui", "nosuch"],
    ["inspect", "gpt3"],
    ["inspect", "GPT-2"],
    ["resume", "nosuch"],
    ["replay", "nosuch", "--step", "1"],
    ["plan"],
    ["plan", "nosuch"],
    ["merge", "nosuch"],
    ["merge", "ties", "lamda=1"],
    ["distill-cache", "nosuch"],
    ["tokenizer", "encode", "nosuch", "x"],
    ["tokenizer", "train", "nosuch.txt"],
    ["data", "inspect", "nosuch"],
    ["data", "prepare", "nosuch.txt", "--tokenizer", "nosuch", "-o", "out"],
    ["runs", "nosuch"],
]


def test_arguments_are_checked_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "book.txt").write_text("A book.")
    cases = json.dumps([*((arguments, 0) for arguments in FINE), *((arguments, 2) for arguments in WRONG)])
    done = subprocess.run([sys.executable, "-c", CODE, cases], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "GPT-2: neither a preset nor a directory; did you mean 'gpt2'?" in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(WRONG), done.stderr
    assert all(line.startswith("slm: ") for line in lines)
