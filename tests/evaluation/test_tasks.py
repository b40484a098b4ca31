"""Tasks by name: lm-eval's own prompts and metrics on local files, without a network."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import datasets
import lm_eval.evaluator
import numpy as np
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from slmkit.config import UserError
from slmkit.evaluation.results import TaskResult
from slmkit.evaluation.tasks import core_tasks, load_tasks, names_of_lm_eval, run_tasks, task_table
from tests.evaluation.task_helpers import KnownLM, Row, write
from tests.real_data import real_data

FOLDER = Path(lm_eval.evaluator.__file__).parent / "tasks"
QUESTIONS = [f"What is {number}?" for number in range(6)]
CHOICES = [["one", "two more", "three", "a fourth one"], ["x", "yy", "zzz", "w"]] * 3
LETTERS = ["A", "B", "C", "D"]


def science(number: int) -> Row:
    """Of the hub's ARC."""
    choices = {"text": CHOICES[number], "label": LETTERS}
    return {"question": QUESTIONS[number], "choices": choices, "answerKey": LETTERS[number % 4]}


def hellaswag(number: int) -> Row:
    return {"activity_label": f"Run {number}", "ctx_a": f"A man runs [step] {number}.", "ctx_b": "he",
            "endings": CHOICES[number], "label": str(number % 4)}  # fmt: skip


def results(names: list[str], data: Path, lm: KnownLM | None = None, **options: Any) -> dict[str, TaskResult]:
    run = {name: options.pop(name) for name in ("limit", "seed", "self_test", "progress") if name in options}
    return {one.task: one for one in run_tasks(lm or KnownLM(), load_tasks(names, data=data, **options), **run)}


def asked(names: list[str], data: Path, **options: Any) -> list[tuple[Any, ...]]:
    lm = KnownLM()
    results(names, data, lm, self_test=False, **options)
    return lm.requests


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


FORMS: dict[str, list[list[Row]]] = {  # the same documents in the hub's, the publisher's and DCLM's form
    "arc_easy": [
        [science(number) for number in range(4)],
        [
            {"id": str(number), "answerKey": LETTERS[number % 4],
             "question": {"stem": QUESTIONS[number],
                          "choices": [{"text": text, "label": label} for text, label in zip(CHOICES[number], LETTERS)]}}
            for number in range(4)
        ],
        [{"query": f"Question: {QUESTIONS[n]}", "choices": CHOICES[n], "gold": n % 4} for n in range(4)],
    ],
    "hellaswag": [
        [hellaswag(number) for number in range(4)],
        [{"query": f"Run {n}: A man runs {n}. He", "choices": CHOICES[n], "gold": n % 4} for n in range(4)],
    ],
    "openbookqa": [
        [{"question_stem": QUESTIONS[n], "choices": science(n)["choices"], "answerKey": science(n)["answerKey"]}
         for n in range(4)],
        [{"query": QUESTIONS[n], "choices": CHOICES[n], "gold": n % 4} for n in range(4)],
    ],
    "piqa": [
        [{"goal": QUESTIONS[n], "sol1": CHOICES[n][0], "sol2": CHOICES[n][1], "label": n % 2} for n in range(4)],
        [{"query": f"Question: {QUESTIONS[n]}", "choices": CHOICES[n][:2], "gold": n % 2} for n in range(4)],
    ],
    "winogrande": [
        [{"sentence": "Sam met Sue, so _ was glad.", "option1": "Sam", "option2": "Sue", "answer": "2"}] * 2,
        [{"context_options": [f"Sam met Sue, so {one}" for one in ("Sam", "Sue")], "continuation": "was glad.",
          "gold": 1}] * 2,
    ],
    "lambada": [
        [{"text": "the cat sat on a mat"}] * 2,
        [{"context": "the cat sat on a", "continuation": "mat"}] * 2,
    ],
    "gsm8k": [
        [{"question": "1+1?", "answer": "It is 2.\n#### 2"}] * 2,
        [{"context": "1+1?", "chain_of_thought": "It is 2.", "answer": "2"}] * 2,
    ],
}  # fmt: skip


@pytest.mark.parametrize("task", FORMS)
def test_every_form_of_a_file_gives_the_same_requests_and_figures(task: str, tmp_path: Path) -> None:
    found = []
    for number, rows in enumerate(FORMS[task]):
        write(tmp_path / f"form{number}" / f"{task}.jsonl", rows)
        lm = KnownLM()
        (result,) = results([task], tmp_path / f"form{number}", lm, shots=0).values()
        found.append((lm.requests, [item.values for item in result.items]))
    assert found[0][0]
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("task", ["hellaswag", "arc_easy"])
def test_requests_and_figures_are_those_of_lm_eval_itself_on_the_hub_s_columns(
    task: str, shots: int, tmp_path: Path
) -> None:
    """Shots from a train file, drawn with the same seed."""
    rows = [{"hellaswag": hellaswag, "arc_easy": science}[task](number) for number in range(6)]
    write(tmp_path / f"{task}_val_test.jsonl", rows[:3])
    write(tmp_path / f"{task}_train.jsonl", rows[3:])
    config = load_yaml(FOLDER / {"hellaswag": "hellaswag", "arc_easy": "arc"}[task] / f"{task}.yaml")
    splits = {split: datasets.Dataset.from_list(rows[:3]) for split in ("validation", "test")}
    splits["train"] = datasets.Dataset.from_list(rows[3:])
    own = ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits, "tag": None, "num_fewshot": shots})
    own.set_fewshot_seed(1234)
    theirs, ours = KnownLM(), KnownLM()
    wanted = lm_eval.evaluator.evaluate(theirs, {"tasks": {task: own}}, bootstrap_iters=1)["results"][task]
    result = results([task], tmp_path, ours, shots=shots)[task]
    assert ours.requests == theirs.requests
    for metric in ("acc", "acc_norm"):
        score = result.score(metric)
        assert score.value == pytest.approx(wanted[f"{metric},none"])
        assert score.standard_error == pytest.approx(wanted[f"{metric}_stderr,none"])
    assert result.recipe["shots from"] == ("the train file" if shots else None)


# -- every name --------------------------------------------------------------------------------------------------------

CODE = {"task_id": "HumanEval/0", "prompt": "def f(x):\n    'Return x.'\n", "entry_point": "f",
        "canonical_solution": "    return x\n", "test": "def check(f):\n    assert f(1) == 1\n"}  # fmt: skip
PROBLEM = {"text": "Return x.", "code": "def f(x):\n    return x", "task_id": 11, "test_setup_code": "",
           "test_list": ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"]}  # fmt: skip
FILES: dict[str, dict[str, list[Row] | str]] = {
    "hellaswag": {"hellaswag.jsonl": FORMS["hellaswag"][0]},
    "arc": {"ARC-Easy-Test.jsonl": FORMS["arc_easy"][1], "ARC-Challenge-Test.jsonl": FORMS["arc_easy"][1][:2]},
    "piqa": {"piqa.jsonl": FORMS["piqa"][0]},
    "winogrande": {"winogrande_1.1/dev.jsonl": FORMS["winogrande"][0]},
    "openbookqa": {"openbook_qa.jsonl": FORMS["openbookqa"][1]},
    "lambada": {"lambada_test.jsonl": FORMS["lambada"][0]},
    "gsm8k": {"gsm8k/test.jsonl": FORMS["gsm8k"][0], "gsm8k/train.jsonl": FORMS["gsm8k"][0] * 4},
    "humaneval": {"HumanEval.jsonl.gz": [CODE]},
    "mbpp": {"mbpp.jsonl": [PROBLEM]},
    "flores": {f"flores200/devtest/{name}.devtest": f"one {name}\ntwo {name}\n" for name in
               ("eng_Latn", "spa_Latn", "por_Latn")},
    "wikitext": {"wikitext/wiki.test.raw": " = One = \n Text .\n = Two = \n More text .\n"},
    "pile": {"pile/test.jsonl.zst": [{"text": f"{name} text", "meta": {"pile_set_name": name}} for name in
                                     ("ArXiv", "Github", "ArXiv")]},
    "math": {f"MATH/test/{name}/{number}.json": [{"problem": f"{name} {number}?", "solution": "$\\boxed{2}$"}]
             for name in ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                          "prealgebra", "precalculus") for number in (1, 2)},
}  # fmt: skip
METRIC = {"math": "exact_match", "pile": "bits_per_byte", "flores": "chrf of sentences", "gsm8k": "number",
          "humaneval": "pass@1", "mbpp": "pass@1", "wikitext": "word_perplexity"}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_name_runs_on_local_files_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for variable in ("HF_ALLOW_CODE_EVAL", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    before = dict(os.environ)
    for file, rows in FILES[name].items():
        write(tmp_path / file, rows)
    found = results([name], tmp_path)
    last = [*found.values()][-1]
    assert 0 <= last.score(METRIC.get(name, "acc")).value < 1e9
    assert all(one.items for one in found.values())
    data = [one.recipe["data"] for one in found.values() if "mean" not in one.recipe]
    assert all({"name", "sha256", "rows"} <= one.keys() for one in data)
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")
    assert not datasets.config.HF_HUB_OFFLINE


def test_blimp_is_the_mean_of_its_tasks_and_its_error_that_of_fixed_tasks(tmp_path: Path) -> None:
    for path in sorted((FOLDER / "blimp").glob("*.yaml")):
        if path.name[0] != "_":
            rows = [
                {"sentence_good": f"{path.stem} {n}", "sentence_bad": "bad" * (n + 1)}
                for n in range(2 + len(path.stem) % 3)
            ]
            write(tmp_path / f"blimp/{path.stem}.jsonl", rows)
    tasks = load_tasks(["blimp"], data=tmp_path)
    assert len(tasks) == 67
    found = {one.task: one for one in run_tasks(KnownLM(), tasks)}
    parts = [found[name] for name in tasks]
    assert found["blimp"].recipe["mean"] == "equal"
    score = found["blimp"].score("acc")
    assert score.value == pytest.approx(np.mean([part.score("acc").value for part in parts]))
    errors = [part.score("acc").standard_error for part in parts]
    assert score.standard_error == pytest.approx(np.sqrt(np.square(errors).sum()) / 67)


def test_in_mmlu_and_its_parts_all_questions_weigh_the_same(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="no file of its test split in .*; nor of 56 more of its 57 tasks: mmlu_anatomy, "
    ):
        load_tasks(["mmlu"], data=tmp_path)
    for number, path in enumerate(sorted((FOLDER / "mmlu/default").glob("mmlu_*.yaml"))):
        subject = load_yaml(path)["dataset_name"]
        lines = [f"{subject} {n}?,p,q,r,s,{'ABCD'[n % 4]}\n" for n in range(2 + number % 3)]
        write(tmp_path / f"mmlu/test/{subject}_test.csv", "".join(lines))
    tasks = load_tasks(["mmlu"], data=tmp_path)
    found = {one.task: one for one in run_tasks(KnownLM(), tasks)}
    assert len(tasks) == 57
    assert {*found} - {*tasks} == {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"}
    answers = [item.values["acc"][0] for name in tasks for item in found[name].items]
    assert found["mmlu"].score("acc").value == pytest.approx(np.mean(answers))
    assert found["mmlu"].score("acc").n == len(answers)


def test_a_group_by_size_weighs_documents(tmp_path: Path) -> None:
    for file, rows in FILES["math"].items():
        write(tmp_path / file, rows)
    for number in range(3, 9):
        write(tmp_path / f"MATH/test/algebra/{number}.json", [{"problem": f"{number}?", "solution": "$\\boxed{2}$"}])
    right = KnownLM(answer=lambda prompt: "$2$" if "algebra" not in prompt else "$3$")
    found = results(["math"], tmp_path, right, self_test=False)
    parts = [one for name, one in found.items() if name != "hendrycks_math"]
    score, each = found["hendrycks_math"].score("exact_match"), [part.score("exact_match") for part in parts]
    assert found["hendrycks_math"].recipe["mean"] == "documents"
    assert score.value == pytest.approx(14 / 20)  # 8 of algebra (6 right), 2 each of the six others, 2 of them wrong
    assert score.standard_error == pytest.approx(np.linalg.norm([one.n / 20 * one.standard_error for one in each]))


def test_the_pile_s_figure_is_bits_over_bytes_of_all_documents(tmp_path: Path) -> None:
    for file, rows in FILES["pile"].items():
        write(tmp_path / file, rows)
    found = results(["pile"], tmp_path)
    assert [*found] == ["pile_arxiv", "pile_github", "pile"]
    assert found["pile"].recipe["note"] == "2 of 22 tasks"
    pairs = [item.values["word_perplexity"] for name in ("pile_arxiv", "pile_github") for item in found[name].items]
    assert found["pile"].score("word_perplexity").value == pytest.approx(
        np.exp(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
    )


def test_wrong_names_and_missing_files_are_one_line(tmp_path: Path) -> None:
    for names, data, message in (
        (["hellaswagg"], None, r"^no task 'hellaswagg'; did you mean 'hellaswag'\?$"),
        (["piqa"], tmp_path, r"^piqa: no file of its validation split in .*; looked for piqa "),
        (["pile"], tmp_path, r"^pile_\S+: no file of its"),
        (["core"], None, r"^core_\S+: name the folder of the evaluation bundle's files: --task-data FOLDER$"),
        (["core"], tmp_path, r"^core_\S+: no file of its"),
        (["minerva_math_algebra"], tmp_path, r"^minerva_math_algebra: .*math_verify"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_tasks(names, data=data)
        assert "\n" not in str(error.value)


def test_names_are_known_that_only_an_included_file_gives() -> None:
    """Tags of a file without an ending; a task has the one folder that defines it, tags and groups none."""
    known = names_of_lm_eval()
    assert known["acp_bench_hard"] == known["mafand_tasks"] == known["mmlu"] == ()
    assert (known["boolq"], known["mmlu_anatomy"]) == (("super_glue",), ("mmlu",))


def test_any_other_name_of_lm_eval_takes_a_file_with_its_columns(tmp_path: Path) -> None:
    rows = [{"question": "Is it", "passage": "It is.", "idx": n, "label": n % 2} for n in range(3)]
    write(tmp_path / "boolq.jsonl", rows)
    assert results(["boolq"], tmp_path)["boolq"].score("acc").n == 3
    assert asked(["boolq"], tmp_path)[0] == ("It is.\nQuestion: Is it?\nAnswer:", " no")


# -- the hub -----------------------------------------------------------------------------------------------------------


def test_a_data_set_with_a_script_is_read_from_the_hub_s_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(**options: Any) -> Any:
        calls.append(options)
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found lambada.py")
        return {split: datasets.Dataset.from_list([{"text": "a cat sat"}]) for split in ("validation", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load)
    tasks = load_tasks(["lambada_standard"])
    assert calls[1] == {
        "path": "cimec/lambada",
        "name": None,
        "revision": "refs/convert/parquet",
        "data_dir": "default",
    }
    lm = KnownLM()
    run_tasks(lm, tasks)
    assert lm.requests == [("a cat", " sat")]


def test_what_the_hub_does_not_give_is_one_line_that_names_task_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as error:
        load_tasks(["piqa"])
    reason = "baber/piqa of the hub cannot be loaded (Couldn't reach the Hub)"
    assert str(error.value) == f"piqa: {reason}; name a folder with its files: --task-data FOLDER"


# -- accuracies --------------------------------------------------------------------------------------------------------


def accuracies(choices: list[str], sums: list[float], gold: int, folder: Path) -> dict[str, float]:
    scores = dict(zip(choices, sums))
    write(folder / "openbookqa.jsonl", [{"query": "Which?", "choices": choices, "gold": gold}])
    lm = KnownLM(lambda context, continuation: scores[continuation[1:]])
    (item,) = results(["openbookqa"], folder, lm)["openbookqa"].items
    return {metric: value for metric, (value, _) in item.values.items()}


@pytest.mark.parametrize(("gold", "right"), [(0, "acc"), (1, "acc_norm"), (2, "acc_bytes")])
def test_the_three_accuracies_can_choose_three_answers(gold: int, right: str, tmp_path: Path) -> None:
    """A sum of nats, divided by nothing, by characters (8 and 4), and by UTF-8 bytes (8 and 12)."""
    found = accuracies(["a", "a big cat"[:8], "猫が好き"], [-2, -4, -3], gold, tmp_path)
    assert found == {metric: float(metric == right) for metric in ("acc", "acc_norm", "acc_bytes")}


@pytest.mark.parametrize("gold", [0, 1])
def test_of_equal_sums_the_first_counts(gold: int, tmp_path: Path) -> None:
    found = accuracies(["cat", "dog"], [-2, -2], gold, tmp_path)
    assert found == dict.fromkeys(("acc", "acc_norm", "acc_bytes"), float(gold == 0))


# -- shots -------------------------------------------------------------------------------------------------------------


def sums(count: int, length: int = 60) -> list[Row]:
    return [
        {"question": f"{n}+{n}?".ljust(length, "."), "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(count)
    ]


def test_shots_are_dropped_whole_until_prompt_and_answer_fit(tmp_path: Path) -> None:
    """A shot has 99 characters, the question 77, an answer 100 tokens: of 8 shots, those that fit are kept."""
    write(tmp_path / "gsm8k_test.jsonl", sums(1))
    write(tmp_path / "gsm8k_train.jsonl", sums(20)[10:])
    whole, cut = KnownLM(), KnownLM()
    cut.context, cut.max_new_tokens = 400, 100
    results(["gsm8k"], tmp_path, whole, shots=8, self_test=False)
    result = results(["gsm8k"], tmp_path, cut, shots=8, self_test=False)["gsm8k"]
    (long, _), (short, _) = whole.requests[0], cut.requests[0]
    assert len(short) <= 300 < len(short) + len("\n\n".join(long.split("\n\n")[2:3]))
    assert long.split("\n\n")[:2] == short.split("\n\n")[:2]
    assert long.split("\n\n")[-1] == short.split("\n\n")[-1]
    assert (result.items[0].text["shots"], result.recipe["shots"], result.recipe["dropped shots"]) == (2, 8, 6)


def test_a_question_without_room_is_an_error_and_not_a_wrong_answer(tmp_path: Path) -> None:
    rows = sums(4)
    rows[1] = {**rows[1], "question": "very long " * 40}
    write(tmp_path / "gsm8k.jsonl", rows)
    lm = KnownLM(answer=lambda prompt: f"#### {2 * int(prompt.split('Question: ')[-1][0])}")
    lm.context, lm.max_new_tokens = 256, 100
    result = results(["gsm8k"], tmp_path, lm, shots=0, limit=3)["gsm8k"]
    assert [item.id.split("-")[0] for item in result.items] == ["0", "2"]
    assert result.score("number").value == result.score("exact_match,strict-match").value == 1
    assert result.errors == (
        "document 1: no room for its prompt without shots and 100 new tokens in 256 positions",
    )  # fmt: skip
    write(tmp_path / "gsm8k.jsonl", [rows[1]])
    none = results(["gsm8k"], tmp_path, lm, shots=0)["gsm8k"]
    assert (len(none.items), len(none.errors)) == (0, 1)


@pytest.mark.parametrize("most", [256, 300])
def test_answers_as_long_as_the_context_are_refused_before_the_run(most: int, tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", sums(3))
    lm = KnownLM()
    lm.context, lm.max_new_tokens = 256, most
    with pytest.raises(UserError, match=r"gsm8k: answers of up to .* tokens .* 256 positions: give --max-new-tokens"):
        results(["gsm8k"], tmp_path, lm, shots=0)
    assert not lm.requests


def test_a_choice_without_room_is_cut_on_the_left_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "hellaswag.jsonl", FORMS["hellaswag"][0])
    lm = KnownLM()
    lm.context = 30
    result = results(["hellaswag"], tmp_path, lm, shots=0)["hellaswag"]
    assert result.recipe["cut on the left"] == sum(
        max(len(a + b) for a, b in lm.requests[4 * n : 4 * n + 4]) > 31 for n in range(4)
    )
    assert 0 < result.recipe["cut on the left"] < 4 == len(result.items)


def test_without_a_train_file_shots_are_rows_that_are_not_evaluated(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", sums(8))
    lm = KnownLM()
    result = results(["gsm8k"], tmp_path, lm, shots=2, limit=3, self_test=False)["gsm8k"]
    assert result.recipe["shots from"] == "rows that are not evaluated"
    for number, (prompt, _) in enumerate(lm.requests):
        *shots, question = prompt.split("\n\n")
        assert question.startswith(f"Question: {number}+")
        assert {int(shot[10]) for shot in shots} <= {3, 4, 5, 6, 7}
    with pytest.raises(UserError, match=r"gsm8k: 2 shots need 3 examples, and there are 0 .*train file.*--shots 0"):
        results(["gsm8k"], tmp_path, shots=2)
    with pytest.raises(UserError, match="2 shots need 3 examples, and there are 2"):
        results(["gsm8k"], tmp_path, shots=2, limit=6)
    write(tmp_path / "gsm8k.jsonl", sums(1) * 8)
    with pytest.raises(UserError, match=r"2 shots need 3 examples, .* 5 \(.*, 5 of them the same as a document"):
        results(["gsm8k"], tmp_path, shots=2, limit=3)
    write(tmp_path / "gsm8k.jsonl", [*sums(1) * 6, *sums(4)[1:]])
    assert results(["gsm8k"], tmp_path, shots=2, limit=3, self_test=False)["gsm8k"].items[0].text["shots"] == 2


@pytest.mark.parametrize(
    ("task", "broken", "why"),
    [
        ("winogrande", {"sentence": "no gap"}, "substring not found"),
        ("winogrande", {"answer": "3"}, "'3'"),
        ("hellaswag", {"endings": []}, "is not among 0 choices"),
        ("hellaswag", {"label": "7"}, "its right answer 7 is not among 4 choices"),
        ("hellaswag", {"label": "-1"}, "its right answer '-1' is not among 4 choices"),
    ],
)
def test_a_row_that_lm_eval_cannot_ask_or_count_is_named_before_the_run(
    task: str, broken: Row, why: str, tmp_path: Path
) -> None:
    first = FORMS[task][0][0]
    write(tmp_path / f"{task}.jsonl", [first, {**first, **broken}])
    lm = KnownLM()
    with pytest.raises(UserError, match=rf"^{task}: document 1 of {task}\.jsonl is not as expected: .*{why}"):
        results([task], tmp_path, lm, shots=0)
    assert not lm.requests


def test_tasks_that_are_asked_without_shots_stay_so(tmp_path: Path) -> None:
    write(tmp_path / "HumanEval.jsonl", [CODE])
    tasks = load_tasks(["humaneval"], data=tmp_path, shots=3)
    assert tasks["humaneval"].config.num_fewshot == 0


def test_the_seed_chooses_the_shots_and_the_limit_the_first_documents(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k_test.jsonl", sums(4))
    write(tmp_path / "gsm8k_train.jsonl", sums(30))
    one, same, other = (asked(["gsm8k"], tmp_path, shots=3, limit=2, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert [prompt.split("Question: ")[-1][0] for prompt, _ in one] == ["0", "1"]


# -- chat --------------------------------------------------------------------------------------------------------------


def test_a_chat_model_is_asked_in_its_template_with_the_tasks_for_it(tmp_path: Path) -> None:
    write(tmp_path / "HumanEval.jsonl", [CODE])
    write(tmp_path / "mbpp.jsonl", [PROBLEM])
    found = results(["humaneval", "mbpp"], tmp_path, (lm := KnownLM()), chat=True)
    assert [*found] == ["humaneval_instruct", "mbpp_instruct"]
    assert {one.recipe["template"] for one in found.values()} == {"chat"}
    assert all(prompt.startswith("<user>") and "<assistant>" in prompt for prompt, _ in lm.requests)
    assert lm.requests[1][0].count("<user>") == 4  # the shots are turns of their own
    found = results(["humaneval", "mbpp"], tmp_path, (lm := KnownLM()))
    assert [*found] == ["humaneval", "mbpp"]
    assert {one.recipe["template"] for one in found.values()} == {"none"}
    assert not any("<user>" in prompt for prompt, _ in lm.requests)


def test_special_tokens_in_an_answer_do_not_reach_the_metric(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", sums(2))
    lm = KnownLM(answer=lambda prompt: f"<s>#### {2 * int(prompt.split('Question: ')[-1][0])}<|end|>#### 7")
    lm.tokenizer = type("Tokenizer", (), {"all_special_tokens": ["<s>", "<|end|>"]})()
    result = results(["gsm8k"], tmp_path, lm, shots=0)["gsm8k"]
    assert result.score("exact_match,flexible-extract").value == 1
    assert "<" not in result.items[0].text["given"]


# -- CORE --------------------------------------------------------------------------------------------------------------


def test_core_has_22_tasks() -> None:
    tasks = core_tasks(task_table())
    assert len({task["task"] for task in tasks}) == 22
    assert sum(task["num_fewshot"] > 0 for task in tasks) == 15
    assert {task["output_type"] for task in tasks} == {"multiple_choice", "loglikelihood"}


def test_core_s_prompts_are_those_of_the_bundle(tmp_path: Path) -> None:
    """One shot, of two rows: the other one."""
    write(tmp_path / "arc_easy.jsonl", [{"query": f"Q: {n}?", "choices": ["yes", "no"], "gold": n} for n in (0, 1)])
    options = [["A x", "A y"], ["B x", "B y"]]
    schemas = [{"context_options": both, "continuation": f"is {n}.", "gold": n} for n, both in enumerate(options)]
    write(tmp_path / "winograd_wsc.jsonl", schemas)
    write(tmp_path / "squad.jsonl", [{"context": f"C{n}. \n", "continuation": f"word {n}"} for n in (0, 1)])
    write(tmp_path / "copa.jsonl", [{"query": f"{n}", "choices": ["a", "b"], "gold": 1} for n in (0, 1)])
    found = asked(["core"], tmp_path, shots=1, limit=1)
    assert found == [
        ("Q: 1?\nAnswer: no\n\nQ: 0?\nAnswer:", " yes"), ("Q: 1?\nAnswer: no\n\nQ: 0?\nAnswer:", " no"),
        ("1 b\n\n0", " a"), ("1 b\n\n0", " b"),
        ("B y is 1.\n\nA x", " is 0."), ("B y is 1.\n\nA y", " is 0."),
        ("C1. word 1\n\nC0.", " word 0"),
    ]  # fmt: skip


def test_core_is_the_mean_of_centred_accuracies_and_says_of_how_many_tasks(tmp_path: Path) -> None:
    """Right 3 of 4 with 2 choices: (0.75 − 0.5) / 0.5; LAMBADA 1 of 4: 0.25."""
    rows = [{"query": f"{n}", "choices": ["short", "a long answer"], "gold": int(n == 3)} for n in range(4)]
    write(tmp_path / "copa.jsonl", rows)
    write(tmp_path / "lambada_openai.jsonl", [{"context": f"{n} cat", "continuation": "sat"} for n in range(4)])

    def score(context: str, continuation: str) -> float:
        if continuation == " sat":
            return -1 if context == "0 cat" else -5  # greedy above −2
        return -1.0 * len(continuation) if continuation == " short" else -1.5 * len(continuation)

    found = results(["core"], tmp_path, KnownLM(score))
    assert found["core_copa"].score("acc_tokens").value == 0.75
    assert found["core_copa"].score("centred").value == pytest.approx(0.5)
    assert found["core_lambada_openai"].score("centred").value == pytest.approx(0.25)
    core = found["core"].score("centred")
    assert core.value == pytest.approx(0.375)
    errors = [found[name].score("centred").standard_error or 0 for name in ("core_copa", "core_lambada_openai")]
    assert core.standard_error == pytest.approx(np.hypot(*errors) / 2)
    assert found["core"].recipe["note"] == "2 of 22 tasks: not comparable with published CORE figures"


def test_core_is_plain_text_for_a_chat_model_too(tmp_path: Path) -> None:
    """Beside a task that is asked in the template."""
    write(tmp_path / "copa.jsonl", [{"query": "Why", "choices": ["a", "b"], "gold": 1}] * 2)
    write(tmp_path / "hellaswag.jsonl", FORMS["hellaswag"][0])
    found = results(["core", "hellaswag"], tmp_path, (lm := KnownLM()), chat=True, limit=1, shots=0)
    assert [one for one in lm.requests if "Why" in one[0]] == [("Why", " a"), ("Why", " b")]
    assert all("<user>" in context for context, _ in lm.requests[-4:])
    assert (found["core_copa"].recipe["template"], found["hellaswag"].recipe["template"]) == ("none", "chat")


def test_core_reads_what_is_there_of_the_published_files() -> None:
    found = load_tasks(["core"], data=real_data("evals"))
    assert len(found) == 8
    assert found.groups["core"].note.startswith("8 of 22 tasks")


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_progress_is_told_and_results_survive_json(tmp_path: Path) -> None:
    write(tmp_path / "hellaswag.jsonl", FORMS["hellaswag"][0])
    lm, told = KnownLM(), list[tuple[int, int]]()
    lm.progress = lambda done, of: None
    result = results(["hellaswag"], tmp_path, lm, progress=lambda done, of: told.append((done, of)))["hellaswag"]
    lm.progress(1, 2)
    assert told == [(1, 2)]
    import json

    assert TaskResult.from_json(json.loads(json.dumps(result.to_json()))).score("acc") == result.score("acc")
    assert len({item.id for item in result.items}) == 4
