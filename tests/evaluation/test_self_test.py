"""The self-test: right answers score 1 and wrong ones 0 by the very same path, else the model is not asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmkit.config import UserError
from slmkit.evaluation import self_test
from slmkit.evaluation.self_test import StoredAnswers
from slmkit.evaluation.tasks import load_tasks, run_tasks
from tests.evaluation.task_helpers import KnownLM, write
from tests.real_data import real_data

SUMS = [
    {"question": f"{i} + {i}?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(3, 9)
]
DOUBLE = {
    "task_id": "HumanEval/0", "prompt": 'def double(x):\n    """Twice x."""\n', "entry_point": "double",
    "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_passed", set())


def asked(folder: Path, name: str, rows: list[Any], **options: Any) -> KnownLM:
    """A model that answers 6, after the self-test and the evaluation of a task with these rows."""
    write(folder / f"{name}.jsonl", rows)
    model = KnownLM(answer=lambda prompt: "#### 6")
    (result,) = run_tasks(model, load_tasks([name], data=folder, shots=0, **options))
    assert len(result.items) == len(rows)
    return model


def refusal(folder: Path, name: str, rows: list[Any], **options: Any) -> str:
    """The error, if the model was not asked."""
    write(folder / f"{name}.jsonl", rows)
    model = KnownLM()
    with pytest.raises(UserError) as error:
        run_tasks(model, load_tasks([name], data=folder, shots=0, **options))
    assert not model.requests
    return str(error.value)


def test_a_task_that_can_be_measured_is_run(tmp_path: Path) -> None:
    assert asked(tmp_path, "gsm8k", SUMS).requests
    done = list[tuple[int, int]]()
    assert asked(tmp_path, "humaneval", [DOUBLE], progress=lambda *counts: done.append(counts)).requests
    assert done[2:] == [(1, 1)] * 3  # after the form was found: the right answer, the wrong one, and the model's


def test_an_answer_that_a_filter_does_not_find_refuses_the_task(tmp_path: Path) -> None:
    rows = [*SUMS, {"question": "5?", "answer": "five"}]  # no `#### 5` for strict-match
    assert "gsm8k: not run" in (error := refusal(tmp_path, "gsm8k", rows))
    assert "the right answer stored for document 6-" in error
    assert "scores 0 in exact_match,strict-match" in error


def test_an_answer_that_a_stop_string_cuts_refuses_the_task(tmp_path: Path) -> None:
    """lm-eval's task stops at "Question:"."""
    rows = [SUMS[0], {"question": "Why?", "answer": "Question: why? 6\n#### 6"}]
    assert "the right answer stored for document 1-" in refusal(tmp_path, "gsm8k", rows)


def test_a_solution_that_fails_its_tests_refuses_the_task(tmp_path: Path) -> None:
    broken = DOUBLE | {"task_id": "HumanEval/1", "canonical_solution": "    return 3 * x\n"}
    assert "the right answer stored for document 1-" in refusal(tmp_path, "humaneval", [DOUBLE, broken])


def test_tests_that_every_program_passes_refuse_the_task(tmp_path: Path) -> None:
    weak = DOUBLE | {"test": "def check(candidate):\n    candidate(2)\n"}
    error = refusal(tmp_path, "humaneval", [weak])
    assert "the wrong answer stored for document 0-" in error
    assert "scores 1 in pass@1, not 0" in error


def test_a_test_that_passed_is_not_repeated_for_the_same_task_and_data(tmp_path: Path) -> None:
    def passes() -> int:
        runs: list[str] = []

        def run(lm: Any, tasks: Any) -> Any:
            runs.extend(tasks)
            return run_tasks(lm, tasks, self_test=False)

        self_test.self_test(load_tasks(["gsm8k"], data=tmp_path, shots=0), run, KnownLM())
        return len(runs)

    write(tmp_path / "gsm8k.jsonl", SUMS)
    assert [passes(), passes()] == [2, 0]
    write(tmp_path / "gsm8k.jsonl", SUMS[1:])
    assert passes() == 2


@pytest.mark.parametrize(
    ("name", "limit", "chat"),
    [("gsm8k", 40, False), ("humaneval", 4, False), ("humaneval", 3, True), ("mbpp", 4, False), ("mbpp", 3, True)],
)
def test_stored_answers_to_real_task_files(name: str, limit: int, chat: bool) -> None:
    """All 1,319, 164 and 500 documents: `slm eval oracle wrong --tasks gsm8k,humaneval,mbpp --shots 0`."""
    file = {"gsm8k": "gsm8k-test.jsonl.gz", "humaneval": "HumanEval.jsonl.gz", "mbpp": "mbpp.jsonl.gz"}[name]
    tasks = load_tasks([name], data=real_data(f"evals/{file}").parent, shots=0, chat=chat)
    for right in (True, False):
        (result,) = run_tasks(StoredAnswers(tasks, right=right), tasks, limit=limit, self_test=False)
        tested = [metric for metric in result.metrics if self_test.TESTED.fullmatch(metric)]
        assert tested
        assert {metric: result.score(metric).value for metric in tested} == dict.fromkeys(tested, float(right))
        assert len(result.items) == limit


def test_wrong_answers_have_the_form_of_right_ones(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", SUMS)
    tasks = load_tasks(["gsm8k"], data=tmp_path, shots=0)
    doc = tasks["gsm8k"].eval_docs[0]
    right, wrong = (StoredAnswers(tasks, right=kind).answer("gsm8k", doc) for kind in (True, False))
    assert right == SUMS[0]["answer"]
    assert wrong == right.replace("#### 6", "#### 7")


def test_stored_answers_are_no_model_of_choices(tmp_path: Path) -> None:
    row = {"query": "A: I", "choices": ["am", "is", "are", "be"], "gold": 0}
    write(tmp_path / "hellaswag.jsonl", [json.loads(json.dumps(row))])
    tasks = load_tasks(["hellaswag"], data=tmp_path)
    with pytest.raises(UserError, match="hellaswag: stored answers are for exact-match and code tasks only"):
        run_tasks(StoredAnswers(tasks, right=True), tasks)
