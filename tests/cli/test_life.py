"""A user's own text and own conversations, from files to a model that answers, by commands alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.cli.helpers import SLM, TINY, python, refused, slm

STORY = "Once there was a fox who had a kite. The kite flew over the hill and the fox ran after it, laughing. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, conversations, and two runs on them."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "book.txt").write_text((STORY * 8 + "\n") * 12)
    with gzip.open(folder / "chats.jsonl.gz", "wt") as file:
        for number in range(60):
            file.write(
                json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": f"Count to {number % 5}"},
                            {"role": "assistant", "content": " ".join(map(str, range(number % 5 + 1)))},
                        ]
                    }
                )
                + "\n"
            )
    done = slm("train", "own-text", "data.source=book.txt", "output_dir=runs/book", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    chat = slm(
        "train", "own-chat", "model.path=runs/book", "data.source=chats.jsonl.gz", "output_dir=runs/chat",
        "train.num_train_epochs=null", "train.max_steps=6", "train.tokens_per_step=256", "train.device=cpu", cwd=folder,
    )  # fmt: skip
    assert chat.returncode == 0, chat.stderr
    assert "next: slm chat runs/chat  (and ask it: Count to " in chat.stdout
    return folder


def test_a_run_has_everything_the_design_promises(folder: Path) -> None:
    run = folder / "runs" / "book"
    names = {path.name for path in run.iterdir()}
    assert {
        "recipe.yaml", "environment.json", "metrics.jsonl", "loss.png", "samples.md", "checkpoints", "latest", "best",
    } <= names  # fmt: skip
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = {path.name for path in (run / "latest").iterdir()}
    assert {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training_state", "MANIFEST.json",
    } == checkpoint  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert "> Once there was a fox" in (run / "samples.md").read_text()  # how the text itself begins


def test_the_recipe_of_a_run_repeats_it_bit_for_bit(folder: Path) -> None:
    done = slm("train", "runs/book/recipe.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "run: runs/book-2" in done.stdout
    assert "next: slm generate runs/book-2 'Once there was a fox'" in done.stdout
    first, second = (folder / "runs" / name / "latest" / "model.safetensors" for name in ("book", "book-2"))
    assert first.read_bytes() == second.read_bytes()


def test_generating_goes_on_from_the_prompt_and_a_seed_repeats_it(folder: Path) -> None:
    arguments = ("generate", "runs/book", "Once there", "--max-new-tokens", "12", "--seed", "3")
    first, second = slm(*arguments, cwd=folder), slm(*arguments, cwd=folder)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Once there")
    assert len(first.stdout) > len("Once there\n")
    assert first.stdout == second.stdout


def test_a_chat_understands_its_commands(folder: Path) -> None:
    lines = "Count to 3\n/save talk.json\n/reset\n/nonsense\n/load talk.json\n/load none.json\n/quit\nnever read\n"
    done = slm("chat", "runs/chat", "--seed", "1", cwd=folder, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "(saved to talk.json)" in done.stdout
    assert "(forgotten)" in done.stdout
    assert "unknown command /nonsense" in done.stdout
    assert "(going on with talk.json: 2 messages)" in done.stdout
    assert "none.json: no such file" in done.stdout
    assert done.stdout.count("you> ") == 7
    messages = json.loads((folder / "talk.json").read_text())["messages"]
    assert messages[0] == {"role": "user", "content": "Count to 3"}


def test_a_chat_says_why_an_answer_is_cut(folder: Path) -> None:
    done = slm("chat", "runs/chat", "--seed", "1", "--max-new-tokens", "1", cwd=folder, stdin="Count to 3\n")
    assert "(cut at 1 tokens" in done.stdout


def test_a_chat_ends_with_its_input(folder: Path) -> None:
    assert slm("chat", "runs/chat", cwd=folder, stdin="").returncode == 0


def test_a_finished_run_resumes_to_nothing_and_a_longer_one_goes_on(folder: Path) -> None:
    before = (folder / "runs" / "book" / "metrics.jsonl").read_bytes()
    done = slm("resume", "runs/book", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run: runs/book\nnext: slm generate runs/book 'Once there was a fox'\n"
    assert (folder / "runs" / "book" / "metrics.jsonl").read_bytes() == before


def test_print_config_shows_every_value_and_trains_nothing(folder: Path) -> None:
    done = slm("train", "own-text", "data.source=book.txt", "train.learning_rate=3e-4", "--print-config", cwd=folder)
    assert done.returncode == 0
    assert "learning_rate: 0.0003" in done.stdout
    assert "max_grad_norm: 1.0" in done.stdout
    assert not (folder / "runs" / "own-text").exists()


def test_a_dry_run_leaves_nothing_behind(folder: Path) -> None:
    done = slm("train", "own-text", "data.source=book.txt", "output_dir=runs/dry", *TINY, "--dry-run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("\ndry run: nothing was written; without --dry-run it trains 12 steps\n")
    assert "xray.md" not in done.stderr
    assert not (folder / "runs" / "dry").exists()


def test_a_tokenizer_is_trained_and_looked_at_by_command(folder: Path) -> None:
    done = slm("tokenizer", "train", "book.txt", "--vocab-size", "300", "-o", "tok", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "300 tokens in tok" in done.stdout
    shown = slm("tokenizer", "encode", "tok", "the fox", cwd=folder)
    assert "' fox'" in shown.stdout
    prepared = slm("data", "prepare", "book.txt", "--tokenizer", "tok", "-o", "shards", cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    inspected = slm("data", "inspect", "shards", "--tokenizer", "tok", cwd=folder)
    assert "documents        1" in inspected.stdout
    assert "Once there was a fox" in inspected.stdout


def test_runs_are_listed_and_drawn(folder: Path) -> None:
    listed = slm("runs", cwd=folder)
    assert listed.returncode == 0, listed.stderr
    head, *rows = listed.stdout.splitlines()
    assert head.split()[:3] == ["run", "objective", "size"]
    assert max(map(len, listed.stdout.splitlines())) <= 80
    book = next(row for row in rows if row.startswith("runs/book "))
    assert book.split()[1] == "pretrain"
    assert book.endswith("finished")
    drawn = slm("plot", "runs/book", "runs/chat", "--over", "time", "-o", "both.png", cwd=folder)
    assert drawn.returncode == 0, drawn.stderr
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "no figures here" in refused("plot", "runs", cwd=folder)
    assert "'token' is not one of 'tokens', 'time', 'steps'" in refused(
        "plot", "runs/book", "--over", "token", cwd=folder
    )
    assert "nowhere: no such folder" in refused("runs", "nowhere", cwd=folder)


def test_a_run_is_planned_before_and_compared_after(folder: Path) -> None:
    planned = slm("plan", "own-text", "data.source=book.txt", *TINY, "--no-probe", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    shown = dict(line.split(maxsplit=1) for line in planned.stdout.split("\n\n")[0].splitlines())
    assert shown["steps"].startswith("12 of 512")
    assert shown["speed"].endswith("--probe measures it")
    content = json.loads((folder / "runs" / "book" / "plan.json").read_text())
    assert content["real"].keys() == content["predicted"].keys()
    assert content["steps"] == 12
    proposed = slm("plan", "--hours", "3", "--device", "cpu", "--no-probe", "-o", "mine.yaml", "data.source=book.txt",
                   cwd=folder)  # fmt: skip
    assert proposed.returncode == 0, proposed.stderr
    assert proposed.stdout.endswith("; next: slm train mine.yaml\n")
    printed = slm("train", "mine.yaml", "--print-config", cwd=folder)
    assert "micro_batch_tokens" in printed.stdout
    assert "source: book.txt" in printed.stdout
    assert "name a recipe to plan, or what to propose one for: --hours 1" in refused("plan", cwd=folder)
    assert "give either a recipe or these options" in refused("plan", "own-text", "--hours", "2", cwd=folder)


def test_the_quickstart_says_that_it_measures_before_it_does(tmp_path: Path) -> None:
    code = (
        "import sys; from slmkit.workflows import quickstart as q; "
        "q._seconds_of_a_step = lambda world: sys.exit('measured')"
    )
    done = python(f"{code}; {SLM}", "quickstart", "-o", tmp_path / "q")
    first, second = done.stderr.splitlines()
    assert first.startswith("measuring this machine's speed")
    assert second == "measured"
