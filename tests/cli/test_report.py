"""`slm report`, and `slm eval` with stored answers in place of a model, in real processes."""

from __future__ import annotations

from pathlib import Path

from tests.cli.helpers import slm
from tests.evaluation.task_helpers import write


def test_a_report_is_written_beside_the_run_or_where_it_is_wanted(tmp_path: Path) -> None:
    run = tmp_path / "book"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("objective: pretrain\n")  # all that is there while data is prepared
    for arguments, path in (((), run / "report.html"), (("-o", tmp_path / "page.html"), tmp_path / "page.html")):
        assert slm("report", run, *arguments).stdout.strip() == str(path)
        assert path.read_text("utf-8").startswith("<!doctype html>")


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "recipe.yaml").write_text("objective: pretrain\n")
    for arguments, said in (
        ((tmp_path,), "not a run: it has no recipe.yaml"),
        ((tmp_path / "absent",), "no such directory"),
        ((tmp_path / "book", "-o", tmp_path / "absent" / "page.html"), "expected the name of a file in a folder"),
        (
            (tmp_path / "book", "--results", tmp_path / "book" / "recipe.yaml"),
            "expected a file that `slm eval --output`",
        ),
    ):
        found = slm("report", *arguments)
        assert found.returncode == 2
        assert said in found.stderr
        assert found.stderr.count("\n") == 1


def test_stored_answers_take_the_place_of_a_model(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", [{"question": "3 + 4?", "answer": "3 + 4 = 7\n#### 7"}] * 2)
    options = ("--task-data", tmp_path, "--shots", "0")
    lines = slm("eval", "oracle", "wrong", "--tasks", "gsm8k", *options).stdout.splitlines()
    figures = {tuple(line.split()[::2][:2]): line.split()[3] for line in lines if " number " in line}
    assert figures == {("oracle", "number"): "1.0000", ("wrong", "number"): "0.0000"}
    refused = slm("eval", "oracle", "--tasks", "stories")
    assert refused.returncode == 2
    assert "exact-match and code tasks" in refused.stderr
