"""A result is taken from the cache if the same model, data and recipe gave it, and only then."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from slmkit.adapt.quantize import round_to, to_quantize
from slmkit.adapt.quantized_files import save_quantized
from slmkit.data.sources.settings import SourceSettings
from slmkit.evaluation.results import TaskResult
from slmkit.model import kernels
from slmkit.model.files.directory import load_decoder
from slmkit.workflows.evaluation import evaluate as workflow
from slmkit.workflows.evaluation.cache import model_content
from tests.adapt.helpers import adapted, save_adapter
from tests.workflows.evaluation.small_model import write_model

QUESTION = {"ctx": "The fox", "endings": ["ran.", "sang.", "slept.", "swam."], "label": 1, "activity_label": "Foxes"}


class Evaluating:
    """Evaluates, and counts how often weights were loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
        self.text, self.loads, load = text, 0, workflow.load_model

        def counted(*arguments: Any) -> Any:
            self.loads += 1
            return load(*arguments)

        monkeypatch.setattr(workflow, "load_model", counted)

    def __call__(self, model: Path, **options: Any) -> tuple[list[TaskResult], int]:
        """The results, and how often weights were loaded for them."""
        before = self.loads
        options = {"text": [SourceSettings(path=str(self.text))], "device": "cpu", **options}
        return workflow.evaluate(model, **options), self.loads - before


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kernels.library()  # compiled into the user's cache, and not again into this one
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slmkit" / "evaluations"


@pytest.fixture
def run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluating:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": "A fox. " * n}) + "\n" for n in (3, 5)))
    return Evaluating(monkeypatch, tmp_path / "text.jsonl")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def change_one_weight(path: Path) -> None:
    """In place, with the size and the times that the file had."""
    before, tensors = path.stat(), load_file(path)
    tensors[min(tensors)].view(-1)[0] += 0.5
    save_file(tensors, path.with_suffix(".new"), metadata={"format": "pt"})
    content = path.with_suffix(".new").read_bytes()
    path.with_suffix(".new").unlink()
    assert len(content) == before.st_size
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_is_unchanged_loads_no_weights_even_elsewhere(run: Evaluating, model: Path, tmp_path: Path) -> None:
    first, loads = run(model)
    assert loads == 1
    assert run(model) == (first, 0)
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("It determines nothing.")
    assert run(tmp_path / "copy") == (first, 0)
    assert run(model, cache=False) == (first, 1)


def test_one_weight_changed_in_place_is_another_model(run: Evaluating, model: Path) -> None:
    before, _ = run(model)
    change_one_weight(model / "model.safetensors")
    after, loads = run(model)
    assert loads == 1
    assert after[0].score("loss").value != before[0].score("loss").value
    assert after == run(model, cache=False)[0]


def _other_tokenizer(model: Path, text: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))


def _other_config(model: Path, text: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


def _other_text_of_the_same_size(model: Path, text: Path) -> None:
    before = text.stat()
    text.write_text(text.read_text().replace("fox", "hen"))
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [_other_tokenizer, _other_config, _other_text_of_the_same_size])
def test_another_tokenizer_config_or_text_under_the_same_name(
    run: Evaluating, model: Path, change: Callable[[Path, Path], None]
) -> None:
    run(model)
    change(model, run.text)
    assert run(model)[1] == 1
    assert run(model)[1] == 0


@pytest.mark.parametrize(
    "options",
    [{"stride": 7}, {"window": 20}, {"joined": True}, {"limit": 1}, {"precision": "bfloat16"}],
    ids=lambda options: next(iter(options)),
)
def test_another_recipe(run: Evaluating, model: Path, options: dict[str, Any]) -> None:
    run(model)
    changed, loads = run(model, **options)
    assert loads == 1
    assert run(model, **options) == (changed, 0)
    assert changed == run(model, **options, cache=False)[0]


def test_an_adapter_is_its_base_and_a_quantized_model_its_codes(run: Evaluating, model: Path, tmp_path: Path) -> None:
    decoder, config = load_decoder(model)
    save_adapter(decoder, config, adapted(decoder, config), "../model", tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, tmp_path / "adapter" / name)
    plain, of_adapter = run(model)[0], run(tmp_path / "adapter")[0]
    assert of_adapter[0].score("loss").value != plain[0].score("loss").value
    assert run(tmp_path / "adapter") == (of_adapter, 0)
    change_one_weight(model / "model.safetensors")
    assert run(tmp_path / "adapter")[1] == 1
    change_one_weight(tmp_path / "adapter" / "adapter_model.safetensors")
    assert run(tmp_path / "adapter")[1] == 1

    decoder, config = load_decoder(model)
    round_to(decoder, to_quantize(decoder, "int8", 32, "bfloat16"), 32)
    save_quantized(decoder, config, tmp_path / "int8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, tmp_path / "int8" / name)
    quantized, loads = run(tmp_path / "int8")
    assert loads == 1
    assert quantized[0].recipe["precision"] == "of the quantized weights"
    assert quantized[0].score("loss").value == pytest.approx(run(model)[0][0].score("loss").value, rel=0.02)
    assert run(tmp_path / "int8") == (quantized, 0)
    content = bytearray((tmp_path / "int8" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "int8" / "model.safetensors").write_bytes(content)
    assert run(tmp_path / "int8")[1] == 1


def test_a_damaged_entry_is_computed_again_and_replaced(run: Evaluating, model: Path, cache: Path) -> None:
    first, _ = run(model)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"[]", whole.replace(b'"results"', b'"nothing"'),
                    whole.replace(b'"metrics": {"loss": "loss"', b'"metrics": {"loss": "joy"'),
                    whole.replace(b'"stride": 128', b'"stride": 129')):  # fmt: skip
        assert damaged != whole
        entry.write_bytes(damaged)
        assert run(model) == (first, 1)
        assert entry.read_bytes() == whole
        assert [path.name for path in cache.iterdir()] == [entry.name]


def test_without_a_place_for_it_there_is_a_result_all_the_same(
    run: Evaluating, model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = run(model)
    shutil.rmtree(cache.parents[1])
    cache.parents[1].write_text("a file where the folder would be")
    assert run(model) == (first, 1)
    assert run(model) == (first, 1)


def test_all_files_of_the_model_are_in_the_key(model: Path) -> None:
    assert {*model_content(model)} == {f"0/{path.name}" for path in model.iterdir()}


def test_a_task_is_kept_by_its_rows_and_its_form(run: Evaluating, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(label: int) -> None:
        rows = [QUESTION | {"label": label, "ind": n, "ctx_a": f"Fox {n}", "ctx_b": "it"} for n in range(4)]
        (folder / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ask(**options: Any) -> tuple[list[TaskResult], int]:
        return run(model, text=[], tasks=["hellaswag"], task_data=folder, **options)

    write(1)
    first, loads = ask(chat_template="none")
    assert (loads, len(first[0].items)) == (1, 4)
    assert ask(chat_template="none") == (first, 0)
    for options in ({"chat_template": "chat"}, {"chat_template": "none", "limit": 2}):
        assert ask(**options)[1] == 1
        assert ask(**options)[1] == 0
    write(2)
    again, loads = ask(chat_template="none")
    assert loads == 1
    assert [item.text["expected"] for item in again[0].items] != [item.text["expected"] for item in first[0].items]
