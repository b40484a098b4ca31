"""Data of the page's tabs Runs and Data, on small real runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from slmkit.config import UserError
from slmkit.data.packing import IGNORED
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import Document
from slmkit.device import find_device
from slmkit.files.find import find_model_directory
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.logging.metrics_log import mark_running
from slmkit.training.recipe.recipe import Recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows import page_data
from slmkit.workflows.open_run import open_run
from slmkit.workflows.page_data import PageData
from slmkit.workflows.train import resume_run, train_recipe
from tests.test_life import Silent
from tests.workflows.page_runs import make_runs

Functions = dict[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("page"))


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> Path:
    """A copy of the runs, to be changed."""
    shutil.copytree(folder, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def of(runs: Path, data: Path | None = None, **tokenizers: SLMTokenizer) -> Functions:
    """The functions; what they return must be JSON, without NaN."""

    def strict(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(**arguments: Any) -> Any:
            answer = call(**arguments)
            json.dumps(answer, allow_nan=False, ensure_ascii=False).encode()
            return answer

        return checked

    return {name: strict(call) for name, call in PageData(runs, data, tokenizers).functions().items()}


def text_of(tokens: list[dict[str, Any]]) -> str:
    return "".join(token["text"] for token in tokens)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_the_list_says_how_far_each_run_is(folder: Path) -> None:
    found = of(folder)["runs"]()
    assert {run["name"] for run in found} == {"stories", "chat", "answers/dpo", "answers/kto"}
    assert [run["changed"] for run in found] == sorted((run["changed"] for run in found), reverse=True)
    stories = next(run for run in found if run["name"] == "stories")
    assert stories["state"] == "finished"
    assert (stories["objective"], stories["step"], stories["steps"]) == ("pretrain", 6, 6)
    assert stories["validation_loss"] == min(
        line["validation_loss"] for line in RunDirectory(folder / "stories").metrics.read() if "validation_loss" in line
    )
    with mark_running(folder / "chat"):
        assert {run["name"]: run["state"] for run in of(folder)["runs"]()}["chat"] == "running"
    assert {run["name"]: run["state"] for run in of(folder)["runs"]()}["chat"] == "finished"


def test_a_run_with_its_curves_samples_and_recipe(folder: Path) -> None:
    run = of(folder)["run"](name="stories")
    assert run["reports"] == RunDirectory(folder / "stories").metrics.read()
    assert run["position"] == (folder / "stories" / "metrics.jsonl").stat().st_size
    assert [one["step"] for one in run["samples"]] == [2, 4, 6]
    prompt = run["recipe"]["train.sample_prompts"][0]
    assert all(one["texts"][0].startswith(prompt) for one in run["samples"])
    assert run["recipe"]["model.hidden_size"] == 32
    assert run["xray"] == (folder / "stories" / "xray.md").read_text()
    assert 0 < run["perfect_loss"] < 6.4
    assert [one["step"] for one in run["checkpoints"]][-1] == 6
    assert run["checkpoints"][-1]["latest"]
    assert run["checkpoints"][-1]["bytes"] > 10_000
    assert run["environment"]["packages"]["torch"]
    assert "recipe" not in run["environment"]


def test_samples_keep_their_lines(runs: Path) -> None:
    (runs / "chat" / "samples.md").write_text(
        "## Step 1,000\n\n> Ask\n> \n> one.\n> > two\n\n> Other\n\n## Step 2,000\n\n> Half wri"
    )
    found = of(runs)["run"](name="chat")["samples"]
    assert found[0] == {"step": 1000, "texts": ["Ask\n\none.\n> two", "Other"]}
    assert found[1:] in ([], [{"step": 2000, "texts": [""]}])


def test_new_lines_follow_a_position(runs: Path) -> None:
    """Lines are given once each, as soon as they are whole; broken ones are left out, and NaN is null."""
    metrics, run = runs / "chat" / "metrics.jsonl", of(runs)["run"]
    first = run(name="chat")
    with metrics.open("a") as file:
        file.write('{"step": 5, "loss": NaN, "grad_norm": Infinity, "shares": {"a": NaN}}\n[1]\n{"step": 6, "lo')
        file.flush()
        second = run(name="chat", since=first["position"], mark=first["mark"])
        assert second["since"] == first["position"]
        assert second["reports"] == [{"step": 5, "loss": None, "grad_norm": None, "shares": {"a": None}}]
        file.write('ss": 2}\n')
    third = run(name="chat", since=second["position"], mark=second["mark"])
    assert third["reports"] == [{"step": 6, "loss": 2}]
    fourth = run(name="chat", since=third["position"], mark=third["mark"])
    assert (fourth["reports"], fourth["position"], fourth["more"]) == ([], metrics.stat().st_size, False)


def test_a_resumed_run_is_read_anew(runs: Path) -> None:
    """`slm resume` drops lines; that the file has grown beyond the position meanwhile must not hide it."""
    run = of(runs)["run"]
    before = run(name="stories")
    shutil.rmtree(runs / "stories" / "checkpoints" / "step-000006")
    resume_run(runs / "stories", Silent())
    after = run(name="stories", since=before["position"], mark=before["mark"])
    assert after["since"] == 0
    assert [line["step"] for line in after["reports"]] == [1, 2, 3, 4, 5, 6]
    shorter = run(name="stories", since=after["position"] + 50, mark=after["mark"])
    assert shorter["since"] == 0
    assert len(shorter["reports"]) == 6


def test_many_lines_come_in_parts(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_data, "METRICS", 600)
    run, lines = of(runs)["run"], []
    answer = run(name="stories")
    assert answer["more"]
    for _ in range(20):
        lines += answer["reports"]
        if not answer["more"]:
            break
        answer = run(name="stories", since=answer["position"], mark=answer["mark"])
    assert lines == RunDirectory(runs / "stories").metrics.read()


def test_runs_come_and_go(runs: Path) -> None:
    functions = of(runs)
    names = {run["name"] for run in functions["runs"]()}
    shutil.rmtree(runs / "chat")
    assert {run["name"] for run in functions["runs"]()} == names - {"chat"}
    with pytest.raises(UserError, match="no run 'chat'"):
        functions["run"](name="chat")
    (runs / "new" / "checkpoints").mkdir(parents=True)
    (runs / "new" / "recipe.yaml").write_text("objective: pretrain\n")  # its data is being prepared
    new = next(run for run in functions["runs"]() if run["name"] == "new")
    assert (new["step"], new["state"]) == (0, "stopped")
    assert functions["run"](name="new")["reports"] == []
    (runs / "new" / "recipe.yaml").write_text("objective: [\n")
    damaged = next(run for run in functions["runs"]() if run["name"] == "new")
    assert damaged["state"] == "damaged"
    assert "not valid YAML" in damaged["problem"]
    assert functions["run"](name="new")["state"] == "damaged"
    assert of(runs / "nowhere")["runs"]() == []


@pytest.mark.parametrize(
    "name", ["..", "../runs/chat", "/etc", "chat/../stories", "chat/", "./chat", "", "chat\0", "CHAT"]
)
def test_a_name_is_never_a_path(runs: Path, name: str) -> None:
    functions = of(runs)
    with pytest.raises(UserError, match="no run"):
        functions["run"](name=name)
    for function in ("rows", "documents"):
        with pytest.raises(UserError, match="no data set"):
            functions[function](data_set=f"{name}/train")
    with pytest.raises(UserError, match="no tokenizer"):
        functions["tokenize"](model=name, text="x")


@pytest.mark.parametrize(
    "file", ["metrics.jsonl", "samples.md", "xray.md", "recipe.yaml", "data/tokenizer/tokenizer.json"]
)
def test_a_run_whose_files_lead_out_is_not_shown(runs: Path, tmp_path: Path, file: str) -> None:
    outside = tmp_path / "outside"
    shutil.move(runs / "chat" / file, outside)
    (runs / "chat" / file).symlink_to(outside)
    functions = of(runs)
    assert "chat" not in {run["name"] for run in functions["runs"]()}
    assert not any(one["name"].startswith("chat/") for one in functions["data_sets"]()["sets"])
    with pytest.raises(UserError, match="no run 'chat'"):
        functions["run"](name="chat")


def test_a_linked_run_is_not_shown(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(folder / "chat")
    assert of(tmp_path / "runs")["runs"]() == []


def test_arguments_have_types(folder: Path) -> None:
    functions = of(folder)
    for arguments in (
        {"name": 3},
        {"name": "chat", "since": -1},
        {"name": "chat", "since": 2**60},
        {"name": "chat", "since": 2**53 - 1},  # farther than a file system seeks
        {"nam": "chat"},
        {},
    ):
        with pytest.raises(ValidationError):
            functions["run"](**arguments)


# -- data -------------------------------------------------------------------------------------------------------------


def parts_of(batch: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels, int64 [length] each, of all rows of a batch; of both answers of a pair."""
    ids, labels = (part.flatten(0, -2).numpy() for part in (batch.ids, batch.labels))
    return list(zip(ids, labels))


@pytest.mark.parametrize("name", ["stories", "chat", "answers/dpo", "answers/kto"])
def test_rows_are_what_the_model_was_fed(folder: Path, name: str) -> None:
    """Token by token, and in the order of the training itself."""
    prepared = open_run(RunDirectory(folder / name), find_device("cpu", "float32"))
    batches, rows = prepared.parts.batches, []
    step = 0
    while len(rows) < 4:
        rows += parts_of(batches.batch(step))
        step += 1
    shown = of(folder)["rows"](data_set=f"{name}/train", count=4)
    assert shown["length"] == len(rows[0][0])
    assert shown["total"] == batches.rows_in_epoch
    assert shown["is_shuffled"]
    for row, (ids, labels) in zip(shown["rows"], rows):
        tokens = [token["id"] for token in row["tokens"]]
        length = len(ids) - row["padding"]
        assert tokens[:length] == ids[:length].tolist()
        assert (ids[length:] == ids[-1]).all() or not row["padding"]
        learned = {place + 1: int(label) for place, label in enumerate(labels) if label != IGNORED}
        assert {place: tokens[place] for place, is_learned in enumerate(row["learned"]) if is_learned} == learned
        assert len(row["learned"]) == len(tokens)
    kinds = {"answers/dpo": {"chosen", "rejected"}, "answers/kto": {"good", "bad"}}.get(name, {""})
    assert {row["kind"] for row in of(folder)["rows"](data_set=f"{name}/train", count=8)["rows"]} <= kinds


def test_rows_of_a_mixture_have_the_order_of_their_source(folder: Path, tmp_path: Path) -> None:
    """Among the rows that are fed, those of each source follow each other as they are shown."""
    sources = []
    for name in ("Ann", "Ben"):
        text = "\n<|endoftext|>\n".join(f"{name} has {number} kites and a drum." for number in range(120))
        (tmp_path / f"{name}.txt").write_text(text)
        sources.append({"path": str(tmp_path / f"{name}.txt"), "name": name, "weight": 1 + len(sources)})
    settings = {"sequence_length": 32, "max_steps": 1, "tokens_per_step": 256, "device": "cpu", "sample_prompts": []}
    sections = {"model": {"path": str(folder / "stories")}, "data": {"sources": sources}, "train": settings}
    run = train_recipe(
        Recipe.model_validate(sections | {"output_dir": str(tmp_path / "runs" / "mixed")}), Silent(), force=True
    )
    batches = open_run(run, find_device("cpu", "float32")).parts.batches
    fed = [tuple(ids.tolist()) for step in range(4) for ids, _ in parts_of(batches.batch(step))]
    rows, found = of(tmp_path / "runs")["rows"], []
    for number in ("00", "01"):
        shown = rows(data_set=f"mixed/train/{number}", count=len(fed))["rows"]
        texts = [tuple(token["id"] for token in row["tokens"])[:32] for row in shown]
        own = [row for row in fed if row in texts]
        assert own == texts[: len(own)]
        assert len(own) > 5
        found += own
    assert sorted(found) == sorted(fed)


def test_rows_of_questions_are_answered_by_the_model_itself(runs: Path) -> None:
    recipe = runs / "chat" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("objective: sft", "objective: grpo"))
    with pytest.raises(UserError, match="look at the documents"):
        of(runs)["rows"](data_set="chat/train")


def test_learned_are_the_assistants_answers_and_documents_have_borders(folder: Path) -> None:
    row = of(folder)["rows"](data_set="chat/train", count=1)["rows"][0]
    text, learned = text_of(row["tokens"]), ""
    for token, is_learned in zip(row["tokens"], row["learned"]):
        learned += token["text"] if is_learned else "\0" * bool(learned) * (not learned.endswith("\0"))
    assert text.startswith("<|im_start|>user\n")
    answers = [
        part.partition("<|im_start|>assistant\n")[2] for part in text.split("<|im_end|>") if "assistant\n" in part
    ]
    assert [answer for answer in learned.split("\0") if answer] == [f"{answer}<|im_end|>" for answer in answers]
    assert [row["tokens"][place]["text"] for place in row["begins"]] == ["<|im_start|>"] * len(row["begins"])
    ends = [place for place, token in enumerate(row["tokens"]) if token["text"] == "<|endoftext|>"]
    assert row["begins"] == [0, *(place + 1 for place in ends[:-1])]


def test_rows_of_validation_and_the_end_of_rows(folder: Path) -> None:
    rows = of(folder)["rows"]
    for name in ("stories", "chat", "answers/dpo", "answers/kto"):
        shown = rows(data_set=f"{name}/validation", count=100)
        assert not shown["is_shuffled"]
        assert len({row["number"] for row in shown["rows"]}) == shown["total"]
        assert rows(data_set=f"{name}/validation", first=shown["total"])["rows"] == []
        assert rows(data_set=f"{name}/validation", first=2**50)["rows"] == []


def test_documents_are_those_of_the_shards(folder: Path) -> None:
    documents, shards = of(folder)["documents"], TokenShards.open(folder / "stories" / "data" / "train")
    shown = documents(data_set="stories/train", first=3, count=2, tokens=10)
    ends = shards.document_ends.tolist()
    assert shown["total"] == len(ends)
    for number, one in enumerate(shown["documents"], start=3):
        whole = shards.tokens_in(ends[number - 1], ends[number]).tolist()
        assert (one["number"], one["length"]) == (number, len(whole))
        assert [token["id"] for token in one["tokens"]] == whole[:10]
    pages, start = [], 0
    while tokens := documents(data_set="stories/train", count=1, start=start, tokens=7)["documents"][0]["tokens"]:
        pages += [token["id"] for token in tokens]
        start += 7
    assert pages == shards.tokens_in(0, ends[0]).tolist()
    assert documents(data_set="stories/train", first=len(ends))["documents"] == []
    labels = [one["kind"] for one in documents(data_set="answers/kto/train", count=100)["documents"]]
    assert labels == [
        "good" if label else "bad" for label in TokenShards.open(folder / "answers/kto/data/train").labels
    ]
    masks = documents(data_set="chat/train", count=1, tokens=2000)["documents"][0]["learned"]
    assert masks == TokenShards.open(folder / "chat/data/train").trained_in(0, len(masks)).tolist()


def test_shards_below_a_folder(folder: Path, tmp_path: Path) -> None:
    """They are read with the tokenizer that made them, of a model or a run."""
    own = SLMTokenizer.from_pretrained(folder / "stories")
    prepare_text([Document("Ann has a kite."), Document("Ben.")], own, tmp_path / "shards" / "kites")
    prepare_text([Document("Ann has a kite.")], SLMTokenizer(260), tmp_path / "shards" / "bytes")
    functions = of(folder, tmp_path / "shards")
    names = [one["name"] for one in functions["data_sets"]()["sets"]]
    assert names[-2:] == ["shards: bytes", "shards: kites"]
    assert len(names) == 10
    shown = functions["documents"](data_set="shards: kites")
    assert [text_of(one["tokens"]) for one in shown["documents"]] == [
        "Ann has a kite.<|endoftext|>",
        "Ben.<|endoftext|>",
    ]
    with pytest.raises(UserError, match="has the tokenizer of these shards"):
        functions["documents"](data_set="shards: bytes")
    shown = of(folder, tmp_path / "shards", plain=SLMTokenizer(260))["documents"](data_set="shards: bytes")
    assert text_of(shown["documents"][0]["tokens"]).startswith("Ann")


def test_shards_that_lead_out_are_refused(runs: Path, tmp_path: Path) -> None:
    """A link that the recipe names is followed; another, a file that is a link, and a name with `..` are not."""
    secret, train = tmp_path / "secret", runs / "stories" / "data" / "train"
    shutil.copytree(train, secret)
    shutil.rmtree(train)
    train.symlink_to(secret)
    assert "stories/train" not in {one["name"] for one in of(runs)["data_sets"]()["sets"]}
    with pytest.raises(UserError, match="no data set 'stories/train'"):
        of(runs)["documents"](data_set="stories/train")
    recipe = runs / "stories" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("source: stories", f"source: {secret}"))
    assert of(runs)["documents"](data_set="stories/train", count=1)["documents"]

    inside = runs / "chat" / "data" / "train"
    tokens = inside / "00000.tokens"
    shutil.move(tokens, tmp_path / "moved")
    tokens.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="leads out of the directory"):
        of(runs)["documents"](data_set="chat/train")
    header = json.loads((inside / "header.json").read_text())
    header["shards"][0]["name"] = "../../../../moved/00000"
    (inside / "header.json").write_text(json.dumps(header))
    with pytest.raises(UserError):
        of(runs)["documents"](data_set="chat/train")


def test_damaged_shards_are_named_and_hide_no_others(runs: Path) -> None:
    (runs / "chat" / "data" / "train" / "header.json").write_text("{")
    (runs / "stories" / "data" / "train" / "00000.tokens").write_bytes(b"12")
    functions = of(runs)
    found = {one["name"]: one.get("problem") for one in functions["data_sets"]()["sets"]}
    assert "not a readable header.json" in found["chat/train"]
    assert found["answers/dpo/train"] is None
    with pytest.raises(UserError, match="prepare the data again"):
        functions["rows"](data_set="stories/train")


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "The cat sat.", "😀 👨‍👩‍👧 שלום, עולם é\u0301", "<|im_end|>x\n\t", "a" * 5000, "\x00\ufffd"],
    ids=range(6),
)
def test_tokens_of_a_text(folder: Path, text: str) -> None:
    tokenizer = SLMTokenizer.from_pretrained(find_model_directory(folder / "chat"))
    functions = of(folder, chat=tokenizer)
    answer = functions["tokenize"](model="chat", text=text)
    ids = tokenizer.encode(text)
    assert [token["id"] for token in answer["tokens"]] == ids
    assert bytes.fromhex("".join(token["bytes"] for token in answer["tokens"])) == text.encode()
    assert text_of(answer["tokens"]) == text
    assert sum(token["span"] for token in answer["tokens"]) == answer["count"] == len(ids)
    assert (answer["characters"], answer["bytes"]) == (len(text), len(text.encode()))
    assert not any(token["special"] for token in answer["tokens"])


def test_tokens_that_make_a_character_together(folder: Path) -> None:
    tokenizer = SLMTokenizer(260)
    answer = of(folder, plain=tokenizer)["tokenize"](model="plain", text="a😀b")
    assert [(token["text"], token["span"], token["bytes"]) for token in answer["tokens"]] == [
        ("a", 1, "61"), ("😀", 4, "f0"), ("", 0, "9f"), ("", 0, "98"), ("", 0, "80"), ("b", 1, "62"),
    ]  # fmt: skip


def test_special_tokens_are_read_only_where_asked(folder: Path) -> None:
    tokenize = of(folder, plain=SLMTokenizer(260))["tokenize"]
    assert tokenize(model="plain", text="<|im_end|>")["count"] == 10
    answer = tokenize(model="plain", text="é<|im_end|>", special=True)
    assert [(token["text"], token["special"]) for token in answer["tokens"]] == [
        ("é", False), ("", False), ("<|im_end|>", True),
    ]  # fmt: skip


def test_a_lone_surrogate_and_a_text_too_long(folder: Path) -> None:
    tokenize = of(folder, plain=SLMTokenizer(260))["tokenize"]
    answer = tokenize(model="plain", text="a\ud800b")
    assert answer["count"] == 5
    assert text_of(answer["tokens"]).startswith("a\ufffd")
    with pytest.raises(UserError, match="200,001 characters"):
        tokenize(model="plain", text="a" * 200_001)
    assert len(tokenize(model="plain", text="a" * 200_000)["tokens"]) == page_data.TOKENS


def test_tokenizers_of_models_and_runs(folder: Path) -> None:
    assert of(folder, plain=SLMTokenizer(260))["data_sets"]()["tokenizers"] == ["plain", "answers/dpo (run)"]
    same = SLMTokenizer.from_pretrained(folder / "stories")
    assert of(folder, model=same)["data_sets"]()["tokenizers"] == ["model"]
