"""pass@k against enumeration, and lm-eval's code tasks on the real files: right answers pass, wrong ones do not."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from slmkit.evaluation.code import sandbox
from slmkit.evaluation.code import tasks as code_tasks
from slmkit.evaluation.code.tasks import pass_at_k, with_sandbox
from tests.long import IS_LONG
from tests.real_data import real_data

isolated = pytest.mark.skipif(
    not any(sandbox.works(kind) for kind in ("bubblewrap", "namespaces")),
    reason="neither bubblewrap nor Linux namespaces work on this machine",
)


def test_pass_at_k_is_the_share_of_draws_with_a_passing_sample() -> None:
    for n in range(1, 11):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = [*itertools.combinations([True] * c + [False] * (n - c), k)]
            assert pass_at_k(n, c, k) == Fraction(sum(map(any, draws)), len(draws))


def test_pass_at_k_is_one_minus_the_chance_of_failing_draw_after_draw() -> None:
    for n in range(1, 21):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            fails = Fraction(1)
            for drawn in range(k):  # without putting back
                fails *= Fraction(max(n - c - drawn, 0), n - drawn)
            assert pass_at_k(n, c, k) == 1 - fails


def test_fewer_samples_than_k_have_no_pass_at_k() -> None:
    assert pass_at_k(5, 5, 10) is None
    assert pass_at_k(1, 1, 1) == 1
    assert pass_at_k(200, 1, 1) == Fraction(1, 200)


def rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(real_data(f"evals/{name}.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def task(name: str, **changes: Any) -> dict[str, Any]:
    """lm-eval's own configuration in our sandbox."""
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(lm_eval_tasks.__file__).parent / name.split("_")[0] / f"{name}.yaml"
    return with_sandbox({**load_yaml(path, resolve_func=False), **changes})


def scored(config: dict[str, Any], answers: list[list[str]], docs: list[dict[str, Any]]) -> list[dict[str, float]]:
    verdicts = config["filter_list"][0]["filter"][0]["filter_fn"](answers, docs)
    return [config["process_results"](doc, [found]) for doc, found in zip(docs, verdicts, strict=True)]


def solution(doc: dict[str, Any]) -> str:
    return doc.get("canonical_solution") or doc["code"]


FORMS = {
    "humaneval": "{}<|endoftext|>def more(: garbage",
    "humaneval_instruct": "{}```\nThis works.<|im_end|>",
    "humaneval_plus": "{}",
    "mbpp": "{}",
    "mbpp_instruct": "{}\n```\nThis works.<|eot_id|>",
    "mbpp_plus": "{}</s>",
    "mbpp_plus_instruct": "{}\n```",
}
# Those whose tests need helpers of the prompt, things of the program's, names of builtins and modules, or types.
HARD = {"HumanEval/32", "HumanEval/38", "HumanEval/50", "HumanEval/33", 126, 367, 533, 596, 601, 927}


@isolated
@pytest.mark.parametrize("name", FORMS)
def test_right_answers_pass_in_each_form_and_wrong_ones_do_not(name: str) -> None:
    every = rows("HumanEval" if name.startswith("humaneval") else "mbpp")
    hard = HARD if IS_LONG or name in ("humaneval", "mbpp") else set()
    docs = [doc for doc in every if doc["task_id"] in hard or doc in every[10:12]]
    config = task(name)
    right = scored(config, [[FORMS[name].format(solution(doc))] for doc in docs], docs)
    assert right == [{"pass@1": 1.0}] * len(docs)
    wrong = scored(config, [[FORMS[name].format("    return None\n")] for doc in docs[:2]], docs[:2])
    assert wrong == [{"pass@1": 0.0}] * 2


@isolated
def test_samples_give_pass_at_k_up_to_their_number_and_greedy_answers_pass_at_1() -> None:
    docs = rows("HumanEval")[:2]
    right, wrong = solution(docs[0]), "    return None\n"
    answers = [[right] * 3 + [wrong] * 7, [wrong] * 10]
    sampled = task("humaneval", repeats=10, generation_kwargs={"do_sample": True, "temperature": 0.8})
    assert scored(sampled, answers, docs) == [{"pass@1": 0.3, "pass@10": 1.0}, {"pass@1": 0.0, "pass@10": 0.0}]
    assert [metric["metric"] for metric in sampled["metric_list"]] == ["pass@1", "pass@10"]
    greedy = task("humaneval", repeats=10)
    assert [metric["metric"] for metric in greedy["metric_list"]] == ["pass@1"]
    assert scored(greedy, answers, docs)[0] == {"pass@1": 0.3}
    own = task("humaneval_64")
    assert [metric["metric"] for metric in own["metric_list"]] == [f"pass@{k}" for k in (1, 2, 8, 10, 16, 32, 64)]


@isolated
def test_prompts_and_stop_strings_stay_and_the_hub_is_not_asked() -> None:
    config = task("mbpp")
    assert config["generation_kwargs"]["until"] == ["[DONE]"]
    assert config["doc_to_text"].startswith("You are an expert Python programmer")
    assert config["fewshot_config"]["samples"]()[0]["task_id"] == 2
    assert config["unsafe_code"] is False
    assert "code_eval" not in str(sys.modules.get("evaluate"))


def test_helpers_of_a_prompt_are_the_tests_own() -> None:
    pytest.importorskip("lm_eval")
    prompt = 'import math\ndef helper(x):\n    return x\ndef asked(x):\n    """Say x."""\n'
    doc = {"prompt": prompt, "entry_point": "asked", "test": "def check(f):\n    assert f(1) == helper(1)"}
    assert code_tasks.tests_for(doc, "{{test}}\ncheck({{entry_point}})").splitlines() == [
        "", "import math", "def helper(x):", "    return x", "def check(f):", "    assert f(1) == helper(1)",
        "check(asked)",
    ]  # fmt: skip


@isolated
def test_a_program_cannot_replace_the_helpers_of_its_prompt() -> None:
    [doc] = [doc for doc in rows("HumanEval") if doc["task_id"] == "HumanEval/32"]
    cheat = "    return 0\ndef poly(xs, x):\n    return 0\n"  # tests of find_zero: poly(xs, find_zero(xs)) is 0
    assert scored(task("humaneval"), [[cheat]], [doc]) == [{"pass@1": 0.0}]
