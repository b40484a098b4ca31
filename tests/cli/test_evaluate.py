"""`slm eval`: loss, perplexity and bits per byte of any model on any file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slmkit import SLMTokenizer
from slmkit.adapt.load import load_model
from slmkit.cli.evaluate import figure
from slmkit.data.shards.reader import TokenShards
from slmkit.evaluation.perplexity import token_losses
from slmkit.evaluation.results import Item, TaskResult
from tests.cli.helpers import TINY, refused, slm

METRICS = ("loss", "perplexity", "bits_per_byte")
STORY = "Once there was a fox who had a kite. The kite flew over the hill and the fox ran after it, laughing. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run and the text that it learned; the cache of results is below it."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "book.txt").write_text((STORY * 8 + "\n") * 12)
    done = slm("train", "own-text", "data.source=book.txt", "output_dir=runs/book", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


def figures(stdout: str) -> dict[tuple[str, str, str], tuple[float, float | None, int]]:
    """(model, task, metric) → figure, standard error, items."""
    found = {}
    for line in stdout.split("\n\n")[0].splitlines()[1:]:
        model, task, metric, value, *error, n = line.split()
        found[model, task, metric] = (
            float(value.replace(",", "")),
            float(error[1]) if error[:1] == ["±"] else None,
            int(n),
        )
    return found


def test_the_validation_text_as_a_file_has_the_validation_s_loss(folder: Path) -> None:
    """Through another way: the text that was held out, written to a file, tokenized and read again."""
    run = folder / "runs" / "book"
    shards, tokenizer = TokenShards.open(run / "data" / "validation"), SLMTokenizer.from_pretrained(run / "best")
    text = tokenizer.decode(shards.tokens_in(0, len(shards) - 1).tolist())
    (folder / "held-out.txt").write_text(text)
    options = ("--text", "held-out.txt", "--device", "cpu", "--stride", "64")  # disjoint, as in validation
    done = slm("eval", "runs/book", "runs/book/best", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    best = min(
        (
            line
            for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if "validation_loss" in line
        ),
        key=lambda line: line["validation_loss"],
    )
    found = figures(done.stdout)
    loss, perplexity, bits = (found["runs/book", "held-out.txt", one][0] for one in METRICS)
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id])
    (nats,) = token_losses(load_model(run / "best")[0], [ids], 64, 64)
    assert nats[1:].mean().item() == pytest.approx(best["validation_loss"], abs=2e-3)  # it predicts the end as well
    assert loss == pytest.approx(nats[1:-1].mean().item(), abs=2e-4)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    tokens = len(tokenizer.encode(text))
    assert bits == pytest.approx(loss * tokens / math.log(2) / len(text.encode()), abs=1e-3)
    for metric in METRICS:
        assert found["runs/book/best", "held-out.txt", metric] == found["runs/book", "held-out.txt", metric]


def test_today_s_spelling_of_the_options_still_works(folder: Path) -> None:
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": STORY * n}) + "\n" for n in (1, 2, 3)))
    old = slm("eval", "runs/book", "-d", "other.jsonl", "--length", "32", "--device", "cpu", cwd=folder)
    new = slm("eval", "runs/book", "--text", "other.jsonl", "--window", "32", "--no-cache", cwd=folder)
    assert old.returncode == 0, old.stderr
    assert old.stdout == new.stdout
    value, error, n = figures(old.stdout)["runs/book", "other.jsonl", "bits_per_byte"]
    assert value > 0
    assert error is not None
    assert n == 3


def test_the_recipe_is_printed_below_the_figures_and_the_items_are_in_the_file(folder: Path) -> None:
    options = ("--text", "book.txt", "--limit", "1", "--stride", "16", "--output", "out.json", "--device", "cpu")
    done = slm("eval", "runs/book", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    recipe = " ".join(done.stdout.split("\n\n")[1].split())
    for words in ("window 64; stride 16; context 49 to 64 tokens", "before a document <|endoftext|>", "limit 1",
                  "documents each apart", "precision float32", "data name book.txt sha256 "):  # fmt: skip
        assert words in recipe
    (stored,) = json.loads((folder / "out.json").read_text())["results"]
    assert stored.pop("model") == "runs/book"
    result = TaskResult.from_json(stored)
    assert result.recipe["data"]["sha256"][:12] in recipe
    for metric in METRICS:
        printed, _, n = figures(done.stdout)["runs/book", "book.txt", metric]
        assert result.score(metric).value == pytest.approx(printed, abs=0.01)
        assert n == len(result.items)


def test_conversations_are_judged_by_their_answers(folder: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"The fox {n}."}]}
        for n in range(3)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = slm("eval", "runs/book", "-d", "chats.jsonl", "--chat", "--device", "cpu", "-o", "chats.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (stored,) = json.loads((folder / "chats.json").read_text())["results"]
    result = TaskResult.from_json(stored)
    assert [item.text["text"] for item in result.items] == ["The fox 0.", "The fox 1.", "The fox 2."]
    # Bytes of the answers: what is asked is not predicted, and not counted.
    assert [item.values["bits_per_byte"][1] for item in result.items] == [len("The fox 0.")] * 3
    found = figures(done.stdout)["runs/book", "chats.jsonl", "loss"]
    assert found[0] == pytest.approx(result.score("loss").value, abs=1e-4)
    assert found[2] == 3
    pair = {"prompt": "Who?", "chosen": "The fox.", "rejected": "The hen."}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    assert "pairs are not evaluated" in refused("eval", "runs/book", "-d", "pairs.jsonl", "--chat", cwd=folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "none.txt"), "none.txt"),
        (("--data", "book.txt", "--length", "9999"), "at most 64 tokens"),
        ((), "give --text FILE, --tasks NAMES, or both"),
        (("--tasks", " , "), "nothing to evaluate on"),
        (("--tasks", "stories", "--stride", "8"), "--stride is for --text"),
        (("--tasks", "stories", "--chat"), "--chat is for --text"),
        (("--text", "book.txt", "--shots", "0"), "--shots is for --tasks"),
        (("--text", "book.txt", "--samples", "2"), "--samples is for --tasks"),
        (("--text", "book.txt", "--chat", "--joined"), "each read apart"),
        (("--tasks", "stories", "--template", "yes"), "'yes' is not one of 'auto', 'chat', 'none'"),
        (("--tasks", "stories", "--task-data", "nowhere"), "'nowhere' does not exist"),
        (("--text", "book.txt", "--output", "nowhere/out.json"), "a folder that exists"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(folder: Path, options: tuple[str, ...], words: str) -> None:
    assert words in refused("eval", "runs/book", *options, cwd=folder)


def test_a_model_that_is_not_there_is_named_before_anything_is_evaluated(folder: Path) -> None:
    assert "nowhere" in refused("eval", "runs/book", "nowhere", "--data", "book.txt", cwd=folder)


def test_the_story_world_is_a_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")  # where compiled kernels are
    done = slm("eval", "runs/book", "--tasks", "stories", "--limit", "2", "--no-cache", "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = figures(done.stdout)
    assert all(task.startswith("stories") for _, task, _ in found)
    assert {n for _, _, n in found.values()} & {2}
    assert "limit 2" in " ".join(done.stdout.split())


def test_without_the_hub_wikitext_can_be_given_as_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused("eval", "runs/book", "--text", "wikitext-2", "--device", "cpu", cwd=folder)
    assert "offline" in line
    assert "--text FOLDER/wikitext-2" in line


def test_a_large_figure_and_its_standard_error_are_written_alike() -> None:
    items = tuple(Item(str(i), {"perplexity": (nats, 1.0)}, {}) for i, nats in enumerate((9.0, 11.0, 12.0)))
    shown = figure(TaskResult("text", {}, {"perplexity": "exp"}, items), "perplexity")
    assert re.fullmatch(r"\d\d,\d{3}\.\d\d ± \d\d,\d{3}\.\d\d", shown)


def test_the_models_in_the_examples_of_the_page_are_runs_and_not_the_folder_of_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    commands = re.findall(r"^slm .*$", page, re.M)
    models = [word for line in commands for word in line.split() if word.startswith("runs/quickstart")]
    assert models
    assert set(models) <= {"runs/quickstart/primer", "runs/quickstart/stories", "runs/quickstart/chat"}
