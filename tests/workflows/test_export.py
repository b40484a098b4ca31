"""`slm export` and `slm verify`: real engines, and what must not leave anything behind."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slmkit.adapt.load import start_adapter
from slmkit.adapt.quantize import quantized_modules, rounded_copy
from slmkit.cli.export import export as command
from slmkit.config import UserError
from slmkit.export import gguf, targets
from slmkit.export.compare import Parity
from slmkit.export.html import write_html
from slmkit.export.runtimes import load
from slmkit.export.targets import TARGETS, Request
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.files.directory import load_decoder
from slmkit.model.kernels import Kind
from slmkit.workflows import export as workflow
from slmkit.workflows.export import export, record_of, verify
from tests.cli.helpers import SLM, python
from tests.export.small_model import write_small
from tests.serving.processes import Fork

pytest.importorskip("transformers")
HAS_LLAMA_CPP = importlib.util.find_spec("xllamacpp") is not None
needs_llama_cpp = pytest.mark.skipif(not HAS_LLAMA_CPP, reason="xllamacpp is absent")


@pytest.fixture(autouse=True)
def few_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "STRINGS", 100)
    monkeypatch.setattr(workflow, "CONVERSATIONS", 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "model", initializer_range=0.1)


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- a Hugging Face directory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_hf_in_each_precision_has_exactly_the_rounded_weights(kind: str, model: Path, tmp_path: Path) -> None:
    path, parity = export(str(model), Request("hf", str(tmp_path / "out"), kind))
    assert parity is not None
    assert parity.passed
    original, found = load_file(model / "model.safetensors"), load_file(path / "model.safetensors")
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name].to(getattr(torch, kind))) for name in found)
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == kind
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {"README.md", "parity.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(
        entries(path)
    )
    assert entries(tmp_path) == ["out"]


def test_shards_hold_what_their_index_says(model: Path, tmp_path: Path) -> None:
    limit = 30_000  # bytes: less than the embedding and the matrices of the MLP, more than the others
    path, parity = export(str(model), Request("hf", str(tmp_path / "out"), "float32", shard=limit / 1e9))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    original = load_file(model / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())
    assert index["weight_map"].keys() == original.keys()
    assert "lm_head.weight" not in index["weight_map"]  # tied: once
    shards = {name: load_file(path / name) for name in set(index["weight_map"].values())}
    assert sorted(shards) == sorted(file.name for file in path.glob("*.safetensors"))
    assert not (path / "model.safetensors").exists()
    for name, shard in index["weight_map"].items():
        assert torch.equal(shards[shard][name], original[name])
    assert sum(len(tensors) for tensors in shards.values()) == len(original)
    for tensors in shards.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    assert any(len(t) == 1 and next(iter(t.values())).nbytes > limit for t in shards.values())
    assert any(len(t) > 1 for t in shards.values())
    assert parity is not None
    assert parity.passed


def test_int8_is_read_by_transformers_and_by_slmkit(model: Path, tmp_path: Path) -> None:
    path, parity = export(str(model), Request("hf", str(tmp_path / "out"), "int8"))
    assert parity is not None
    assert parity.checks["log-probabilities"]["mean_kl"] <= parity.bounds.kl
    verdicts = verify(str(model), [str(path)])
    assert [(one.kind, one.is_wrong) for one in verdicts] == [("float32", False), ("int8", False)]
    back, _ = export(str(path), Request("hf", str(tmp_path / "back"), "float32"))
    assert not quantized_modules(load_decoder(back)[0])
    scale = load_file(path / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"].float()
    weight = load_file(back / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    codes = weight.unflatten(1, (-1, 32)) / scale[..., None]
    assert (codes - codes.round()).abs().max() < 1e-3
    assert codes.abs().max() <= 128


def test_an_adapter_is_merged(model: Path, tmp_path: Path) -> None:
    decoder, _, files = start_adapter(model, LoRASettings(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "lora" in name.lower() or parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    files.write(decoder, {n: p for n, p in decoder.named_parameters() if p.requires_grad}, adapter)
    path, parity = export(str(adapter), Request("hf", str(tmp_path / "out"), "float32"))
    assert parity is not None
    assert parity.passed
    before, after = (load_file(each / "model.safetensors") for each in (model, path))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (before[name] - after[name]).abs().max() > 1e-3
    assert entries(tmp_path) == ["adapter", "out"]


# -- what is refused --------------------------------------------------------------------------------------------------


def first_matrix(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 5), value)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("float16", 7e4, r"'model.layers.1.mlp.up_proj.weight' in torch.float16.*7e\+04.*bfloat16"),
        ("float32", float("nan"), "'model.layers.1.mlp.up_proj.weight' has numbers that are not finite"),
        ("bfloat16", float("inf"), "'model.layers.1.mlp.up_proj.weight' has numbers that are not finite"),
    ],
)
def test_weights_that_cannot_be_stored_are_named(
    kind: str, value: float, words: str, copied: Path, tmp_path: Path
) -> None:
    changed(copied, first_matrix(value))
    with pytest.raises(UserError, match=words) as refused:
        export(str(copied), Request("hf", str(tmp_path / "out"), kind))
    assert "\n" not in str(refused.value)
    assert entries(tmp_path) == ["copy"]


@pytest.mark.parametrize(("to", "name"), [("html", "out.html"), ("space", "out"), ("gguf", "out.gguf")])
def test_a_template_that_is_not_valid_jinja_is_refused(to: str, name: str, copied: Path, tmp_path: Path) -> None:
    (copied / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(UserError, match="the chat template is not valid Jinja, line 1"):
        export(str(copied), Request(to, str(tmp_path / name)))
    assert entries(tmp_path) == ["copy"]


@pytest.mark.parametrize("to", ["hf", "space"])
def test_a_tokenizer_with_ids_without_rows_is_refused(to: str, tmp_path: Path) -> None:
    fewer = write_small(tmp_path / "fewer", vocab_size=390)
    with pytest.raises(UserError, match="no rows for the tokenizer's ids 390 to 399"):
        export(str(fewer), Request(to, str(tmp_path / "out")))
    assert entries(tmp_path) == ["fewer"]


def test_a_truncated_source_leaves_nothing(copied: Path, tmp_path: Path) -> None:
    weights = copied / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    for to in ("hf", "gguf"):
        with pytest.raises(UserError, match="damaged or cut short"):
            export(str(copied), Request(to, str(tmp_path / f"out{TARGETS[to].suffix}"), unverified=True))
    assert entries(tmp_path) == ["copy"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("ggfu"), "did you mean 'gguf'"),
        (Request("gguf", kind="Q4_K_X"), "--type Q4_K_X: did you mean 'Q4_K_"),
        (Request("hf", kind="F16"), "--type F16: "),
        (Request("gguf", "out"), "expected a name with .gguf at its end, such as out.gguf"),
    ],
)
def test_wrong_words_are_one_line(request_: Request, words: str, model: Path) -> None:
    with pytest.raises(UserError, match=words):
        export(str(model), replace(request_, unverified=True))


def test_a_missing_engine_is_named_and_unverified_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else found(name))
    out = tmp_path / "out.gguf"
    with pytest.raises(UserError, match=r"xllamacpp is not installed: pip install slmkit\[export\]"):
        export(str(model), Request("gguf", str(out), "F32"))
    assert entries(tmp_path) == []
    path, parity = export(str(model), Request("gguf", str(out), "F32", unverified=True))
    assert parity is None
    record = json.loads(record_of(path).read_text())
    assert (record["passed"], record["unverified"]) == (False, "xllamacpp is not installed: pip install slmkit[export]")
    assert entries(tmp_path) == ["out.gguf", "out.gguf.parity.json"]
    monkeypatch.setattr(workflow, "MADE", (("gguf", "F32"), ("gguf", "Q8_0")))
    rows = verify(str(model))
    absent = [one for one in rows if one.runtime == "gguf"]
    assert absent
    assert all(one.problem.startswith("xllamacpp is not installed") and not one.is_wrong for one in absent)


def with_fault(to: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let a target be written from a model with other weights."""
    target = TARGETS[to]

    def write(loaded, path, kind, request) -> None:
        wrong = path.parent.parent / "wrong"
        shutil.copytree(loaded.source, wrong)
        changed(wrong, change)
        target.write(replace(loaded, source=wrong), path, kind, request)

    monkeypatch.setitem(TARGETS, to, replace(target, write=write))


def swap_rows(tensors: dict[str, torch.Tensor]) -> None:
    key = tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.1.self_attn.k_proj.weight"] = key.roll(1, 0)


@pytest.mark.parametrize("to", ["hf", pytest.param("gguf", marks=needs_llama_cpp)])
def test_a_wrong_tensor_is_refused_and_the_earlier_export_stays(
    to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"hf": "float32", "gguf": "F32"}[to]
    out = tmp_path / f"out{TARGETS[to].suffix}"
    path, parity = export(str(model), Request(to, str(out), kind))
    assert parity is not None
    assert parity.passed
    before = record_of(path).read_text()
    assert json.loads(before)["passed"]
    there = entries(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        export(str(model), Request(to, str(out), kind))
    with_fault(to, monkeypatch, swap_rows)
    for request in (Request(to, str(out), kind, overwrite=True), Request(to, str(tmp_path / f"new{out.suffix}"), kind)):
        with pytest.raises(
            UserError, match="not written, since it differs from the model: log-probabilities:"
        ) as refused:
            export(str(model), request)
        assert "\n" not in str(refused.value)
        assert entries(tmp_path) == there
        assert record_of(path).read_text() == before
    monkeypatch.undo()
    monkeypatch.setattr(workflow, "STRINGS", 50)
    export(str(model), Request(to, str(out), kind, overwrite=True))
    assert entries(tmp_path) == there
    assert json.loads(record_of(path).read_text())["checks"]["token ids"]["compared"] == 50


@needs_llama_cpp
def test_rounding_hides_no_wrong_conversion(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 bits change what the model predicts more than wrong angles do: weights and computation are compared apart."""
    rope = gguf.rope_of_file
    _, parity = export(str(model), Request("gguf", str(tmp_path / "right.gguf"), "Q4_0"))
    assert parity is not None
    assert parity.checks["log-probabilities of the same weights"]["mean_kl"] < 0.01
    with monkeypatch.context() as patch:  # without the divisors of RoPE's frequencies
        patch.setattr(gguf, "rope_of_file", lambda *given: (rope(*given)[0], None))
        with pytest.raises(UserError, match="log-probabilities of the same weights: a mean divergence"):
            export(str(model), Request("gguf", str(tmp_path / "wrong.gguf"), "Q4_0"))
    with_fault("gguf", monkeypatch, swap_rows)
    with pytest.raises(
        UserError, match=r"^blk.1.attn_k.weight in Q4_0 has other weights than the model: 32 neighbours"
    ):
        export(str(model), Request("gguf", str(tmp_path / "wrong.gguf"), "Q4_0"))
    assert entries(tmp_path) == ["right.gguf", "right.gguf.parity.json"]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_one_wrong_group_of_integers_is_refused(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one layer: it hardly changes what the model predicts."""
    _, parity = export(str(model), Request("hf", str(tmp_path / "right"), kind))
    assert parity is not None
    assert parity.checks["log-probabilities of the same weights"]["mean_kl"] < 0.001

    def wrong(decoder: Decoder, kind: Kind) -> Decoder:
        made = rounded_copy(decoder, kind)
        quantized_modules(made)["blocks.0.mlp.up"].scales[3, 1] *= 1.5
        return made

    monkeypatch.setattr(targets, "rounded_copy", wrong)
    with pytest.raises(UserError, match=rf"^blocks.0.mlp.up.weight in {kind} has other weights than the model"):
        export(str(model), Request("hf", str(tmp_path / "wrong"), kind))
    assert entries(tmp_path) == ["right"]


OPTIONS: dict[str, dict[str, Any]] = {"shard": {"shard": 1.0}, "allow-fallback": {"allow_fallback": True}}
USED = {("hf", "float32", "shard"), ("hf", "float16", "shard"), ("hf", "bfloat16", "shard")}
USED |= {(to, kind, "allow-fallback") for to in ("gguf", "ollama") for kind in TARGETS[to].kinds}


@pytest.mark.parametrize("to", TARGETS)
def test_an_option_that_changes_nothing_is_refused_by_name(to: str, model: Path, tmp_path: Path) -> None:
    """Each option of the command that is not of every target, in each kind of weights."""
    out = str(tmp_path / f"out{TARGETS[to].suffix}")
    for kind in TARGETS[to].kinds:
        for option, given in OPTIONS.items():
            request = Request(to, out, kind, unverified=True, **given)
            if (to, kind, option) in USED:
                workflow.expect_possible(str(model), request)
            else:
                with pytest.raises(UserError, match=f"^--{option}: it changes nothing in {to}, {kind}"):
                    workflow.expect_possible(str(model), request)
    # All options of the command are either of every target, or among these.
    names = set(inspect.signature(command).parameters) - {"model", "to", "kind", "output", "unverified", "overwrite"}
    assert names == {name.replace("-", "_") for name in OPTIONS}


def test_overwrite_replaces_nothing_but_exports(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    (tmp_path / "out.gguf").write_text("no export")
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / "parity.json").write_text("{}")
    for request, source in (
        (Request("hf", str(mine)), model), (Request("gguf", str(tmp_path / "out.gguf")), model),
        (Request("hf", str(copy)), copy), (Request("hf", str(tmp_path)), copy),
    ):  # fmt: skip
        with pytest.raises(UserError, match="replaces only what `slm export` wrote"):
            export(str(source), replace(request, overwrite=True, unverified=True))
    assert (mine / "thesis.txt").read_text() == "mine"


def test_overwrite_keeps_what_was_added_to_an_export_or_put_in_its_place(model: Path, tmp_path: Path) -> None:
    out, _ = export(str(model), Request("hf", str(tmp_path / "out")))
    export(str(model), Request("hf", str(out), overwrite=True))
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("mine")
    with pytest.raises(UserError, match=r"out/\.git/HEAD: --overwrite replaces only"):
        export(str(model), Request("hf", str(out), overwrite=True))
    shutil.rmtree(out / ".git")
    (out / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"out/README\.md: --overwrite replaces only"):
        export(str(model), Request("hf", str(out), overwrite=True))
    assert (out / "README.md").read_text() == "mine"


def test_an_export_of_this_folder_is_beside_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    for spelled in (".", "./", "../copy", "../copy/"):
        _, _, final = workflow.expect_possible(spelled, Request("gguf", kind="F32", unverified=True))
        assert final.absolute().resolve() == tmp_path / "copy-F32.gguf"


def test_files_of_one_name_and_two_targets_have_a_record_each(tmp_path: Path) -> None:
    names = {record_of(tmp_path / name) for name in ("fox.gguf", "fox.html")}
    assert names == {tmp_path / "fox.gguf.parity.json", tmp_path / "fox.html.parity.json"}


def test_what_got_the_name_meanwhile_stays(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["hf"]

    def write(loaded, path, kind, request) -> None:
        target.write(loaded, path, kind, request)
        (tmp_path / "out").mkdir()

    monkeypatch.setitem(TARGETS, "hf", replace(target, write=write))
    with pytest.raises(UserError, match="out: exists already"):
        export(str(model), Request("hf", str(tmp_path / "out")))
    assert entries(tmp_path / "out") == []
    assert entries(tmp_path) == ["out"]


# -- disks and signals ------------------------------------------------------------------------------------------------

LIMIT = 40_000  # bytes of a file: less than the weights, more than the tokenizer
ON_A_FULL_DISK = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
{SLM}
"""


@pytest.mark.parametrize("words", [("hf", "--type", "float32"), ("hf", "--type", "int8"), ("gguf", "--type", "F32")])
def test_a_disk_that_fills_is_one_line_and_leaves_nothing(words: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out{TARGETS[words[0]].suffix}"
    done = python(ON_A_FULL_DISK, "export", model, "--to", *words, "--output", out, "--unverified")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith("slm: ")
    assert "cannot be written" in last
    assert entries(tmp_path) == []


STOPPED = f"""
import time
from slmkit.export import targets
write = targets.write_shards
def slow(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(600)
targets.write_shards = slow
{SLM}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_export_leaves_nothing_under_its_name(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as said, open(os.devnull, "r+") as none:
        words = ["export", str(model), "--to", "hf", "--output", str(out)]
        process = Fork(STOPPED, words, [none.fileno(), writing, none.fileno()])
        os.close(writing)
        try:
            assert said.readline() == "written\n"
            (staged,) = tmp_path.iterdir()  # while it is written, it has another name
            assert staged.name.startswith(".out.")
        finally:
            process.send_signal(number)
            code = process.wait(300)
    assert not out.exists()
    if number != signal.SIGKILL:
        assert code == 128 + number
        assert entries(tmp_path) == []
    # What a killed process left is deleted by the next one.
    export(str(model), Request("hf", str(out)))
    assert entries(tmp_path) == ["out"]


# -- verify -----------------------------------------------------------------------------------------------------------


@needs_llama_cpp
def test_verify_compares_what_is_installed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "MADE", (("gguf", "F32"), ("gguf", "Q8_0")))
    rows = verify(str(model))
    assert [(one.runtime, one.kind) for one in rows] == [
        ("slmkit", "float32"), ("slmkit", "int8"), ("slmkit", "int4"), ("transformers", "float32"), ("gguf", "F32"),
        ("gguf", "Q8_0"),
    ]  # fmt: skip
    assert not [one for one in rows if one.is_wrong], rows
    sizes = [one.parity.size for one in rows if one.parity]
    assert len(sizes) == 6
    assert sizes[0] > 2 * sizes[1] > 2 * sizes[2]
    exact = [one.parity for one in rows if one.parity and one.kind in ("float32", "F32")]
    assert all(
        parity.checks["greedy tokens"]["equal"] == parity.checks["greedy tokens"]["compared"] for parity in exact
    )


@needs_llama_cpp
def test_a_page_without_a_record_says_its_kind(model: Path, tmp_path: Path) -> None:
    write_html(load(model, tmp_path / "whole"), tmp_path / "page.html", "f16")
    assert workflow.kind_of(tmp_path / "page.html", "html") == "f16"


def test_a_record_says_which_program_reads_a_folder(model: Path, tmp_path: Path) -> None:
    for content, target in (('{"target": "mlx", "kind": "int4"}', "mlx"), ("[]", "hf"), ("{", "hf")):
        copy = Path(shutil.copytree(model, tmp_path / "copy", dirs_exist_ok=True))
        (copy / "parity.json").write_text(content)
        _, kind, make = workflow._given(str(copy))
        assert make().func is TARGETS[target].open
        assert kind == ("int4" if target == "mlx" else "float32")


def test_verify_says_that_a_file_is_absent(model: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.gguf: no such file"):
        verify(str(model), ["absent.gguf"])


def test_verify_finds_a_conversion_that_went_wrong(model: Path, copied: Path, tmp_path: Path) -> None:
    right, _ = export(str(model), Request("gguf", str(tmp_path / "right.gguf"), "F32"))
    wrong, _ = export(str(changed(copied, swap_rows)), Request("gguf", str(tmp_path / "wrong.gguf"), "F32"))
    for path in (right, wrong):
        record_of(path).unlink()  # as another program leaves it: the file itself says its type
    rows = verify(str(model), [str(right), str(wrong), str(copied)])
    assert [(one.kind, one.is_wrong) for one in rows] == [
        ("float32", False), ("F32", False), ("F32", True), ("float32", True),
    ]  # fmt: skip
    assert rows[2].problem.startswith("log-probabilities: ")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(right.read_bytes()[: right.stat().st_size // 2])
    (row,) = verify(str(model), [str(damaged)])[1:]
    assert row.is_wrong
    assert row.parity is None
    (tmp_path / "other.txt").touch()
    with pytest.raises(UserError, match="expected a .gguf"):
        verify(str(model), [str(tmp_path / "other.txt")])


@needs_llama_cpp
def test_a_program_that_refuses_what_was_written_for_it_is_wrong(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["gguf"]

    def truncated(loaded, path, kind, request) -> None:
        target.write(loaded, path, kind, request)
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setitem(TARGETS, "gguf", replace(target, write=truncated))
    monkeypatch.setattr(workflow, "MADE", (("gguf", "F32"), ("gguf", "Q4_K_M")))
    rows = verify(str(model))[-2:]
    assert [(one.kind, one.is_wrong) for one in rows] == [("F32", True), ("Q4_K_M", False)]
    assert "llama.cpp refuses it" in rows[0].problem
    assert "--allow-fallback" in rows[1].problem  # it cannot be written, which is no difference


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("hf", lambda folder: os.truncate(folder / "model.safetensors", 9_000), "transformers cannot read"),
        ("hf", lambda folder: (folder / "tokenizer.json").write_text("{"), "transformers cannot read"),
        ("onnx", lambda folder: (folder / "tokenizer.json").write_text("{"), "ONNX Runtime refuses it"),
        ("onnx", lambda folder: (folder / "tokenizer.json").unlink(), "ONNX Runtime refuses it"),
    ],
)
def test_a_damaged_folder_is_a_line_of_the_table(
    name: str, damage: Callable[[Path], object], words: str, model: Path, copied: Path
) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime")
        (copied / "model.onnx").touch()
    damage(copied)
    (row,) = verify(str(model), [str(copied)])[1:]
    assert (row.is_wrong, row.parity) == (True, None)
    assert words in row.problem
    assert "\n" not in row.problem


def test_the_command_prints_a_table_and_ends_with_1_where_something_differs(
    model: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from slmkit.cli import main

    changed(copied, swap_rows)
    for path, code, word in ((model, 0, "same"), (copied, 1, "differs")):
        monkeypatch.setattr(sys, "argv", ["slm", "verify", str(model), str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr().out
        assert ended.value.code == code, out
        row = next(line for line in out.splitlines() if str(path) in line and "100/100" in line)
        assert word in row
    assert f"{copied} float32: log-probabilities: " in out


def test_the_figures_are_in_the_file(model: Path, tmp_path: Path) -> None:
    path, parity = export(str(model), Request("hf", str(tmp_path / "out"), "float32"))
    assert isinstance(parity, Parity)
    record = json.loads((path / "parity.json").read_text())
    assert record["checks"] == json.loads(parity.to_json())["checks"]
    assert (record["passed"], record["target"], record["kind"]) == (True, "hf", "float32")
    assert {"slmkit", "torch", "transformers"} <= record["versions"].keys()
    weights = record["files"]["model.safetensors"]
    assert weights["bytes"] == (path / "model.safetensors").stat().st_size
    assert time.strptime(record["date"][:10], "%Y-%m-%d")
    assert record["model_sha256"].keys() == {"weights", "tokenizer"}
