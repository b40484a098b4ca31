"""What of a folder is read: one rule for every folder, and what is passed over is said."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from slmkit.config import UserError
from slmkit.data.sources import open_source
from slmkit.data.sources.files import KINDS, WRITTEN
from slmkit.data.sources.folders import choose, split_of
from slmkit.data.sources.settings import SourceSettings
from tests.data.read_files import read_documents


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = name.endswith((".jsonl", ".json"))
        (folder / name).write_text(f'{{"text": "{name}"}}\n' if rows else f"{name}\n")
    return folder


def texts(folder: Path, **changes: str) -> list[str]:
    source = open_source(SourceSettings(path=str(folder), **changes))
    return [document.text.strip() for document, _ in source.read()]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"), ("train-00000-of-00004.parquet", "train"), ("training_set.csv", "train"),
        ("test.jsonl.gz", "test"), ("x_test.jsonl", "test"), ("test/a.txt", "test"),
        ("data/test-0-of-1.parquet", "test"),
        ("valid.txt", "validation"), ("my.data/val.jsonl", "validation"), ("dev/1.txt", "validation"),
        ("eval_1.jsonl", "validation"), ("held_out/a.txt", "validation"), ("books-heldout.txt", "validation"),
        ("train/test.txt", "test"), ("contest.txt", None), ("the_test_of_time.txt", None), ("evaluated.txt", None),
        *((f"{name}.txt", "test") for name in (
            "wiki.test", "test1", "testset", "my_test_set", "my-test-data.v2", "data.test", "TestSplit", "wikiTest",
            "a test 3",
        )),
        ("eval2.jsonl.zst", "validation"), ("wiki.valid.tokens.txt", None), ("devset.csv", "validation"),
        ("wiki.train.txt", "train"), ("v1.test/a.jsonl", "test"),
        *((f"{name}.txt", None) for name in ("latest", "contest1", "trainer", "values", "attestset", "testament")),
    ],
)  # fmt: skip
def test_names_of_splits_are_splits(name: str, split: str | None):
    assert split_of(name) == split


@pytest.mark.parametrize("split", ["train", "test", "validation", "valid", "dev"])
def test_of_a_folder_with_splits_the_one_that_is_asked_for_is_read(tmp_path: Path, split: str):
    make(tmp_path, "train.jsonl", "more.jsonl", "x_test.jsonl", "validation/a.jsonl", "notes.md")
    expected = {"train": ["more.jsonl", "train.jsonl"], "test": ["x_test.jsonl"]}.get(split, ["validation/a.jsonl"])
    assert texts(tmp_path, split=split) == expected
    assert [one.text for one in read_documents(tmp_path)] == ["more.jsonl", "train.jsonl"]


def test_a_name_inside_of_a_longer_one_counts_beside_files_named_train(tmp_path: Path):
    make(tmp_path, "a_test_of_time.txt", "b.txt")
    source = open_source(SourceSettings(path=str(tmp_path)))
    assert sorted(one.text.strip() for one, _ in source.read()) == ["a_test_of_time.txt", "b.txt"]
    assert source.report() == [f"{tmp_path}: reads 2 .txt, as train also a_test_of_time.txt"]
    make(tmp_path, "xnli_train_en.txt", "xnli_test_en.txt", "wiki.valid.tokens.txt")
    assert sorted(texts(tmp_path)) == ["b.txt", "xnli_train_en.txt"]
    assert texts(tmp_path, split="validation") == ["wiki.valid.tokens.txt"]


def test_what_was_taken_and_passed_over_is_said(tmp_path: Path):
    names = (
        "train.jsonl",
        "b.jsonl",
        "c.txt",
        "test.jsonl",
        "README.md",
        "a.py",
        "x.pdf",
        ".cache/d.txt",
        "config.json",
    )
    source = open_source(SourceSettings(path=str(make(tmp_path, *names))))
    (line,) = source.report()
    assert line.startswith(f"{tmp_path}: reads 2 .jsonl, 1 .txt; passes over ")
    for part in (
        "1 of split test",
        "1 .md beside the others",
        "1 .py beside the others",
        "1 .pdf",
        "1 hidden or of tools",
    ):
        assert part in line
    assert "1 of tools' own bookkeeping" in line


@pytest.mark.parametrize("hidden", [".git", ".venv", ".ipynb_checkpoints", "__pycache__", "node_modules", "a/.hidden"])
def test_hidden_folders_and_those_of_tools_are_passed_over(tmp_path: Path, hidden: str):
    assert texts(make(tmp_path, f"{hidden}/a.txt", "b.txt", ".c.txt")) == ["b.txt"]


@pytest.mark.parametrize(
    "made", ["pyvenv.cfg", "environment.json", "MANIFEST.json", "header.json", "model.safetensors", "tokenizer.json"]
)
def test_what_was_made_here_is_no_text(tmp_path: Path, made: str):
    make(tmp_path, "book.txt", f"runs/one/{made}", "runs/one/samples.md", "runs/one/metrics.jsonl", "runs/one/x/y.txt")
    assert texts(tmp_path) == ["book.txt"]


def test_a_folder_without_the_split_says_which_there_are(tmp_path: Path):
    make(tmp_path, "test.jsonl", "valid.jsonl")
    with pytest.raises(UserError, match=r"no file of split 'train'; known: test, validation"):
        texts(tmp_path)
    with pytest.raises(UserError, match=r"no file of split 'tests'; did you mean 'test'\?"):
        texts(tmp_path, split="tests")
    with pytest.raises(UserError, match=r"no text .* file in this folder \(there are: 1 \.pdf\)"):
        texts(make(tmp_path / "other", "a.pdf"))


def test_a_split_with_a_name_of_its_own_is_found(tmp_path: Path):
    make(tmp_path, "data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl")
    assert texts(tmp_path, split="train_sft") == ["data/train_sft-00000-of-00001.jsonl"]


def test_notes_and_source_code_are_a_document_a_file_also_in_folders_called_test(tmp_path: Path):
    names = [f"test/a{kind}" for kind in WRITTEN]
    assert sorted(texts(make(tmp_path, *names, "package.json", "data.json"))) == sorted(names)


def test_a_folder_of_json_with_notes_is_its_json(tmp_path: Path):
    assert texts(make(tmp_path, "a.json", "README.md")) == ["a.json"]


def test_conversations_pass_over_files_without_rows(tmp_path: Path):
    make(tmp_path, "notes.txt")
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi", "completion": "Hello."}\n')
    source = open_source(SourceSettings(path=str(tmp_path)))
    assert len(list(source.read(kind="conversations"))) == 1
    assert source.skipped == {".txt files, which hold no rows": 1}
    with pytest.raises(UserError, match=r"notes\.txt: expected \.jsonl"):
        list(open_source(SourceSettings(path=str(tmp_path / "notes.txt"))).read(kind="conversations"))


@pytest.mark.parametrize("with_splits", [True, False])
def test_a_folder_of_save_to_disk_is_read(tmp_path: Path, with_splits: bool):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": f"{number}", "id": number} for number in range(5)])
    saved = datasets.DatasetDict({"train": rows, "test": rows.select([0])}) if with_splits else rows
    saved.save_to_disk(tmp_path / "saved", **({} if with_splits else {"num_shards": 2}))
    assert texts(tmp_path / "saved") == ["0", "1", "2", "3", "4"]
    if with_splits:
        assert texts(tmp_path / "saved", split="test") == ["0"]


def test_the_rule_is_the_same_behind_a_url():
    names = ["train.jsonl", "test.jsonl", ".git/config.txt", "node_modules/a.txt", "README.md"]
    assert choose("s3://bucket", names, KINDS, "train").names == ["train.jsonl"]


def test_an_arrow_file_of_the_other_layout_is_read_too(tmp_path: Path):
    table = pa.table({"text": ["one", "two", "three"]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=2)
    assert texts(tmp_path) == ["one", "two", "three"]
