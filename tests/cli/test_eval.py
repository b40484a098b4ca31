"""`slm eval`: loss, perplexity and bits per byte of any model on any file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.cli.helpers import TINY, refused, slm

STORY = "Once there was a fox who had a kite. The kite flew over the hill and the fox ran after it, laughing. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "book.txt").write_text((STORY * 8 + "\n") * 12)
    done = slm("train", "own-text", "data.source=book.txt", "output_dir=runs/book", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def figures(stdout: str) -> list[list[str]]:
    return [line.split() for line in stdout.splitlines()[1:]]


def test_the_validation_text_as_a_file_has_the_validation_s_loss(folder: Path) -> None:
    """Through another way: the text that was held out, written to a file, tokenized and read again."""
    from slmkit import SLMTokenizer
    from slmkit.data.shards.reader import TokenShards

    run = folder / "runs" / "book"
    shards, tokenizer = TokenShards.open(run / "data" / "validation"), SLMTokenizer.from_pretrained(run / "best")
    text = tokenizer.decode(shards.tokens_in(0, len(shards) - 1).tolist())
    (folder / "held-out.txt").write_text(text)
    done = slm("eval", "runs/book", "runs/book/latest", "--data", "held-out.txt", "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    best = min(
        (
            line
            for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if "validation_loss" in line
        ),
        key=lambda line: line["validation_loss"],
    )
    of_run, of_directory = figures(done.stdout)
    loss, perplexity, bits = map(float, of_run[-3:])
    assert loss == pytest.approx(best["validation_loss"], abs=2e-3)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert bits == pytest.approx(best["validation_bits_per_byte"], abs=2e-3)
    assert bits == pytest.approx(loss * len(shards) / math.log(2) / len(text.encode()), abs=1e-3)
    assert of_directory[-6:-3] == of_run[-6:-3]


def test_conversations_are_judged_by_their_answers(folder: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"The fox {n}."}]}
        for n in range(3)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = slm("eval", "runs/book", "-d", "chats.jsonl", "--chat", "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    (found,) = figures(done.stdout)
    assert found[2] == "3"
    tokens, loss, bits = int(found[3]), float(found[5]), float(found[7])
    answers = len("The fox 0." * 3)  # bytes: what is asked is not predicted, and not counted
    assert bits == pytest.approx(loss * tokens / math.log(2) / answers, rel=1e-3)
    pair = {"prompt": "Who?", "chosen": "The fox.", "rejected": "The hen."}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    assert "pairs are not evaluated" in refused("eval", "runs/book", "-d", "pairs.jsonl", "--chat", cwd=folder)


def test_what_cannot_be_evaluated_is_one_line(folder: Path) -> None:
    assert "none.txt" in refused("eval", "runs/book", "--data", "none.txt", cwd=folder)
    assert "nowhere" in refused("eval", "nowhere", "--data", "book.txt", cwd=folder)
    line = refused("eval", "runs/book", "--data", "book.txt", "--length", "9999", cwd=folder)
    assert "at most 64 tokens" in line
