"""Files of tasks are found by name and split, read in the form they have, and what they lack is said in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from slmkit.config import UserError
from slmkit.evaluation.task_files import MissingFileError, find_files, local_rows
from slmkit.evaluation.tasks import task_table
from tests.evaluation.task_helpers import Row, write
from tests.real_data import real_data

HELLASWAG = {
    "activity_label": "Run",
    "ctx_a": "A man runs.",
    "ctx_b": "he",
    "endings": ["a", "b", "c", "d"],
    "label": 1,
}


def rows_of(folder: Path, task: str, split: str = "validation", **config: Any) -> list[dict[str, Any]]:
    pattern = next(one for one in task_table()["data"] if re.fullmatch(one.replace("*", ".*"), task))
    known = {"task": task, "doc_to_text": "", "doc_to_target": "", **config}
    found = local_rows(folder, task_table()["data"][pattern], split, known)
    assert found.data["rows"] == len(found.rows)
    return found.rows


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


@pytest.mark.parametrize("name", ["hellaswag.jsonl", "hellaswag_val.jsonl.gz", "hellaswag/validation.jsonl.zst",
                                  "HellaSwag/data/validation-00000-of-00001.parquet"])  # fmt: skip
def test_a_task_has_the_same_rows_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, [HELLASWAG, {**HELLASWAG, "label": 2}])
    assert rows_of(tmp_path, "hellaswag") == [HELLASWAG, {**HELLASWAG, "label": 2}]


def test_the_file_of_the_task_and_split_is_taken_and_no_other(tmp_path: Path) -> None:
    for name in ("wh_vs_that_no_gap.jsonl", "wh_vs_that_no_gap_long_distance.jsonl", "gsm8k/test.jsonl",
                 "gsm8k/test_socratic.jsonl", "gsm8k/train.jsonl", "hellaswag-val-1000.jsonl", "hellaswag_train.jsonl",
                 "hellaswag_val_indomain.jsonl", "notes.md"):  # fmt: skip
        write(tmp_path / name, [{"a": 1}])
    assert names(find_files(tmp_path, ["wh_vs_that_no_gap"], "train")) == ["wh_vs_that_no_gap.jsonl"]
    assert names(find_files(tmp_path, ["gsm8k"], "test")) == ["test.jsonl"]
    assert names(find_files(tmp_path, ["gsm8k"], "train", only_named=True)) == ["train.jsonl"]
    assert names(find_files(tmp_path, ["hellaswag"], "validation")) == ["hellaswag-val-1000.jsonl"]
    assert find_files(tmp_path, ["piqa"], "validation") == []
    assert find_files(tmp_path, ["wh_vs_that_no_gap"], "validation", only_named=True) == []


def test_numbered_parts_of_a_file_belong_together(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"hellaswag/validation-0000{number}-of-00003.parquet", [{**HELLASWAG, "label": number}])
    assert [row["label"] for row in rows_of(tmp_path, "hellaswag")] == [0, 1, 2]


def test_the_folder_of_a_test_that_bears_a_task_s_name_is_not_its_data(tmp_path: Path) -> None:
    """The name of the folder counts only if it is the task's name."""
    folder = tmp_path / "test_hellaswag0"
    write(folder / "other.jsonl", [{"a": 1}])
    assert find_files(folder, ["hellaswag"], "validation") == []
    write(tmp_path / "hellaswag" / "validation.jsonl", [HELLASWAG])
    assert len(find_files(tmp_path / "hellaswag", ["hellaswag"], "validation")) == 1


def test_labels_beside_the_rows_are_theirs(tmp_path: Path) -> None:
    rows: list[Row] = [{"goal": "g", "sol1": "a", "sol2": "b"}] * 2
    write(tmp_path / "piqa/valid.jsonl", rows)
    write(tmp_path / "piqa/valid-labels.lst", "1\n0\n")
    assert [row["label"] for row in rows_of(tmp_path, "piqa")] == [1, 0]
    write(tmp_path / "piqa/valid-labels.lst", "1\n")
    with pytest.raises(UserError, match=r"valid-labels.lst: 1 labels, but valid.jsonl has more rows"):
        rows_of(tmp_path, "piqa")


def test_a_row_without_the_fields_is_named_with_its_number_and_the_fields(tmp_path: Path) -> None:
    file = write(tmp_path / "piqa.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}, {"goal": "g", "x": 1}])
    with pytest.raises(UserError) as error:
        rows_of(tmp_path, "piqa")
    expected = (
        "piqa needs the fields goal, sol1, sol2, label or query, choices, gold; this row has no sol1, sol2, label"
    )
    assert str(error.value) == f"{file}:2: {expected} (it has goal, x)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"goal": "g", "sol1"', r"piqa.jsonl:1: expected a JSON object"),
        ('{"query": "q", "choices": ["only one"], "gold": 0}', r"piqa.jsonl:1: not as piqa expects it"),
        ('{"query": "q", "choices": 5, "gold": 0}', r"piqa.jsonl:1: not as piqa expects it"),
    ],
)
def test_a_damaged_row_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "piqa.jsonl", content + "\n")
    with pytest.raises(UserError, match=message) as error:
        rows_of(tmp_path, "piqa")
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named_with_the_file_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError, match=r"piqa: no file of its validation split in .*looked for piqa in the names"
    ):
        rows_of(tmp_path, "piqa")
    with pytest.raises(UserError, match=r"--task-data .*nowhere: no such folder"):
        rows_of(tmp_path / "nowhere", "piqa")


def test_mmlu_s_published_csv_has_no_header(tmp_path: Path) -> None:
    write(tmp_path / "data/test/anatomy_test.csv", '"What, ""this""?",p,q,r,s,C\nWhy?,1,2,3,4,A\n')
    write(tmp_path / "data/dev/anatomy_dev.csv", "Dev?,p,q,r,s,B\n")
    found = rows_of(tmp_path, "mmlu_anatomy", "test", dataset_name="anatomy")
    assert found[0] == {"question": 'What, "this"?', "choices": ["p", "q", "r", "s"], "answer": 2}
    assert found[1]["answer"] == 0
    assert rows_of(tmp_path, "mmlu_anatomy", "dev", dataset_name="anatomy")[0]["answer"] == 1
    write(tmp_path / "data/test/anatomy_test.csv", "What, this?,p,q,r,s,C\n")
    with pytest.raises(UserError, match=r"anatomy_test.csv: row 1: expected 6 fields, found 7"):
        rows_of(tmp_path, "mmlu_anatomy", "test", dataset_name="anatomy")


def test_a_part_of_the_pile_has_its_own_documents_of_any_file(tmp_path: Path) -> None:
    sets = ["ArXiv", "Github", "DM Mathematics", "ArXiv", "Wikipedia (en)"]
    write(tmp_path / "some.jsonl.zst", [{"text": name, "meta": {"pile_set_name": name}} for name in sets])
    write(tmp_path / "other.jsonl", [{"text": "no meta"}])
    for part, count in {"arxiv": 2, "dm-mathematics": 1, "wikipedia": 1}.items():
        assert len(rows_of(tmp_path, f"pile_{part}", "train", dataset_name=f"pile_{part}")) == count
    with pytest.raises(MissingFileError, match="no row of it in"):
        rows_of(tmp_path, "pile_enron", "train", dataset_name="pile_enron")


def test_the_pile_s_test_file_is_taken_before_its_validation_and_training_files(tmp_path: Path) -> None:
    for name in ("train/00", "val", "test"):
        write(tmp_path / f"pile/{name}.jsonl.zst", [{"text": name, "meta": {"pile_set_name": "ArXiv"}}])
    assert rows_of(tmp_path, "pile_arxiv", "train", dataset_name="pile_arxiv") == [{"text": "test"}]


def test_wikitext_is_cut_before_titles_of_articles(tmp_path: Path) -> None:
    text = " \n = One = \n \n Text = of one . \n \n = = Part = = \n More . \n = Two = \n Text . \n"
    write(tmp_path / "wikitext-2/wiki.test.raw", text)
    pages = [row["page"] for row in rows_of(tmp_path, "wikitext", "test")]
    assert pages == [" = One = \n \n Text = of one . \n \n = = Part = = \n More . ", " = Two = \n Text . \n"]


def test_lambada_is_one_passage_a_line(tmp_path: Path) -> None:
    write(tmp_path / "lambada_test_plain_text.txt", "a cat sat\n\nthe dog ran\n")
    assert rows_of(tmp_path, "lambada_openai", "test") == [{"text": "a cat sat"}, {"text": "the dog ran"}]


def test_mbpp_s_test_split_are_the_problems_11_to_510(tmp_path: Path) -> None:
    problem = {"text": "t", "code": "c", "test_list": ["assert 1"] * 3, "test_setup_code": ""}
    write(tmp_path / "mbpp.jsonl", [{**problem, "task_id": number} for number in (10, 11, 510, 511)])
    assert [row["task_id"] for row in rows_of(tmp_path, "mbpp", "test")] == [11, 510]
    write(tmp_path / "mbpp.jsonl", [problem])
    assert len(rows_of(tmp_path, "mbpp", "test")) == 1


def test_flores_files_are_read_side_by_side(tmp_path: Path) -> None:
    write(tmp_path / "flores200/devtest/eng_Latn.devtest", "one\ntwo\n")
    write(tmp_path / "flores200/devtest/spa_Latn.devtest", "uno\ndos\n")
    languages = {"doc_to_text": "{{sentence_eng_Latn}}", "doc_to_target": "{{sentence_spa_Latn}}"}
    found = rows_of(tmp_path, "spanish_bench_flores_en-es", "devtest", **languages)
    assert found[1] == {"sentence_eng_Latn": "two", "sentence_spa_Latn": "dos"}
    write(tmp_path / "flores200/devtest/spa_Latn.devtest", "uno\n")
    with pytest.raises(UserError, match="different numbers of lines"):
        rows_of(tmp_path, "spanish_bench_flores_en-es", "devtest", **languages)


def test_the_published_files_have_their_numbers_of_rows() -> None:
    folder = real_data("evals")
    validation = {"hellaswag": 1000, "piqa": 1838, "winogrande": 1267}
    test = {"arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "mbpp": 500, "gsm8k": 1319, "humaneval": 164}
    for split, tasks in (("validation", validation), ("test", test)):
        assert {task: len(rows_of(folder, task, split)) for task in tasks} == tasks
