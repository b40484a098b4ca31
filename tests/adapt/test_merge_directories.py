"""What is merged may lie on disk in any way a model does; what cannot be merged is refused before anything is read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.merging import MEASURED
from slmkit.adapt import merging as merging_room
from slmkit.config import UserError, load_settings, read_yaml
from slmkit.model.config import SLMConfig
from slmkit.model.families import family_of
from slmkit.model.files.directory import SHARDS, WEIGHTS, empty_decoder, load_decoder, stored_names
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.workflows import merge as merging
from tests.adapt.merge_models import MergeRecipe, bits, merge, small, write, write_family
from tests.model.test_cache import UNLIKE, config

MEAN = {"merge_method": "linear", "models": ["tune-0", "tune-1"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_family(tmp_path, small(), tunes=2)
    return tmp_path


def stored_as(directory: Path, dtype: torch.dtype) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, directory / WEIGHTS)


@pytest.mark.parametrize("family", UNLIKE)
def test_every_family_merges_into_the_mean_of_its_weights(family: str, tmp_path: Path) -> None:
    shape = config(family).model_copy(update={"vocab_size": 260})
    write_family(tmp_path, shape, tunes=2)
    states = [load_decoder(tmp_path / name)[0].state_dict() for name in ("tune-0", "tune-1")]
    merged, found = load_decoder(merge(tmp_path, **MEAN))
    assert found == shape
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2, atol=1e-6, rtol=0)


def test_the_result_is_a_model_directory_that_transformers_reads(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (folder / "tune-0" / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    output = merge(folder, dtype="bfloat16", **MEAN)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert theirs.dtype == torch.bfloat16
    assert theirs.generation_config.temperature == 0.3
    assert len(transformers.AutoTokenizer.from_pretrained(output)) == 260
    x = torch.arange(20)[None]
    with torch.no_grad():
        ours = load_decoder(output)[0]
        assert (theirs.float()(x).logits - ours.logits(ours(x))).abs().max() < 1e-4
    again = load_settings(MergeRecipe, read_yaml(output / "merge.yaml"), [f"output_dir={folder}/again"])
    assert bits(merging.write_merge(merging.prepare_merge(again))) == bits(output)


@pytest.mark.parametrize(
    ("dtypes", "wanted", "found"),
    [
        ((torch.bfloat16, torch.bfloat16), None, "bfloat16"),
        ((torch.float16, torch.float16), None, "float16"),
        ((torch.float32, torch.float16), None, "float32"),
        ((torch.bfloat16, torch.float16), None, "float32"),
        ((torch.float32, torch.float32), "float16", "float16"),
        ((torch.bfloat16, torch.bfloat16), "float32", "float32"),
    ],
)
def test_any_precision_is_read_computed_in_float32_and_rounded_once(
    folder: Path, dtypes: tuple[torch.dtype, ...], wanted: str | None, found: str
) -> None:
    for name, dtype in zip(MEAN["models"], dtypes):
        stored_as(folder / name, dtype)
    parts = [load_file(folder / name / WEIGHTS) for name in MEAN["models"]]
    output = merge(folder, dtype=wanted, **MEAN)
    for name, tensor in load_file(output / WEIGHTS).items():
        assert tensor.dtype == getattr(torch, found)
        expected = parts[0][name].float() * 0.5 + parts[1][name].float() * 0.5
        assert torch.equal(tensor, expected.to(tensor.dtype))
    assert json.loads((output / "config.json").read_text())["dtype"] == found


def test_a_half_precision_model_alone_comes_back_bit_for_bit(folder: Path) -> None:
    stored_as(folder / "tune-0", torch.bfloat16)
    before = load_file(folder / "tune-0" / WEIGHTS)
    after = load_file(merge(folder, merge_method="linear", models=["tune-0"]) / WEIGHTS)
    assert all(torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in before.items())


def test_shards_runs_a_tied_head_and_names_without_a_prefix_are_read(folder: Path) -> None:
    plain = bits(merge(folder, "plain", **MEAN))
    tensors = load_file(folder / "tune-0" / WEIGHTS)
    half = dict(list(tensors.items())[::2])
    other = {name: tensor for name, tensor in tensors.items() if name not in half}
    other["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    shards = {"a.safetensors": half, "b.safetensors": other}
    for name, part in shards.items():
        save_file(part, folder / "tune-0" / name)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "tune-0" / SHARDS).write_text(json.dumps(index))
    (folder / "tune-0" / WEIGHTS).unlink()
    bare = {name.removeprefix("model."): t for name, t in load_file(folder / "tune-1" / WEIGHTS).items()}
    save_file(bare, folder / "tune-1" / WEIGHTS)
    shutil.move(folder / "tune-1", folder / "kept")
    (folder / "tune-1").mkdir()
    (folder / "tune-1" / "best").symlink_to("../kept")  # as a run has it
    assert bits(merge(folder, "from-all", **MEAN)) == plain


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(folder: Path, **recipe: object) -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        merge(folder, **recipe)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, "hidden_size is 32, and 16 in "),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, and 2 in "),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, and 3 in "),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is "),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, and 1e-05 in "),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, and True in "),
        ({"model_type": "qwen3"}, "model_type is 'qwen3', and 'llama' in "),
        ({"vocab_size": 300}, "vocab_size is 300, and 260 in "),
    ],
)
def test_the_first_difference_between_two_models_is_named(folder: Path, changes: dict, words: str) -> None:
    shutil.rmtree(folder / "tune-1")
    other = small(**changes)
    write(folder / "tune-1", build_decoder(other), other)
    line = refused(folder, **MEAN)
    assert f"tune-1: {words}" in line
    assert "only models of one architecture can be merged" in line


def test_what_only_training_reads_may_differ(folder: Path) -> None:
    content = json.loads((folder / "tune-1" / "config.json").read_text())
    content |= {"hidden_dropout": 0.1, "attention_dropout": 0.1, "initializer_range": 0.5, "eos_token_id": [0, 3]}
    (folder / "tune-1" / "config.json").write_text(json.dumps(content))
    assert SLMConfig.from_pretrained(merge(folder, **MEAN)) == small()


def test_models_of_different_tokenizers_are_refused(folder: Path) -> None:
    other = SLMTokenizer(264)
    other.train(["some words and some more words"] * 9)
    other.save_pretrained(folder / "tune-1")
    assert "its tokenizer (264 tokens) is not that of" in refused(folder, **MEAN)
    (folder / "tune-1" / "tokenizer.json").unlink()
    assert "tune-1: no tokenizer.json in it" in refused(folder, **MEAN)


def test_an_adapter_is_to_be_folded_in_first(folder: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "base")}
    shutil.rmtree(folder / "tune-1")
    (folder / "tune-1").mkdir()
    (folder / "tune-1" / "adapter_config.json").write_text(json.dumps(adapter))
    line = refused(folder, **MEAN)
    assert (
        f"tune-1: an adapter; only whole models can be merged: fold it in first with `slm merge {folder}/base --ad"
        in line
    )


def test_weights_that_are_not_those_of_the_config_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "tune-1" / WEIGHTS)
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, folder / "tune-1" / WEIGHTS)
    assert "'model.norm.weight' has shape (3,), its config says (16,)" in refused(folder, **MEAN)
    save_file(tensors | {"model.norm.weight": torch.zeros(16).to(torch.float8_e4m3fn)}, folder / "tune-1" / WEIGHTS)
    assert "is stored as F8_E4M3: expected F32, F16 or BF16" in refused(folder, **MEAN)
    path = folder / "tune-1" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or cut short" in refused(folder, **MEAN)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"merge_method": "tie"}, "merge_method: expected 'linear', 'slerp'"),
        ({"merge_method": "linear", "weights": 1}, "unknown key 'weights'"),
        ({"merge_method": "linear", "base_model": "base"}, "linear does not read base_model: leave it out"),
        ({"merge_method": "linear", "t": 0.3}, "linear does not read t"),
        ({"merge_method": "linear", "models": [{"model": "tune-0", "density": 0.5}]}, "not read models.0.density"),
        ({"merge_method": "linear", "models": [{"model": "tune-0", "weight": -1}]}, "weights [-1.0]: normalize"),
        ({"merge_method": "linear", "models": [{"model": "tune-0", "weight": 0}]}, "weights [0.0]: normalize"),
        ({"merge_method": "slerp", "models": ["tune-0"]}, "slerp interpolates between two models: name two, not 1"),
        ({"merge_method": "slerp", "base_model": "base"}, "not one of the two models of slerp"),
        ({"merge_method": "slerp", "t": 1.5}, "t: expected numbers from 0 to 1, found 1.5"),
        ({"merge_method": "slerp", "t": []}, "t: expected a number, a list of numbers, or a list of {filter, value}"),
        ({"merge_method": "linear", "models": [{"model": "tune-0", "weight": [1, "x"]}]}, "models.0.weight"),
        ({"merge_method": "ties"}, "set base_model to model directories or runs, such as base_model="),
        ({"merge_method": "ties", "base_model": "base", "models": ["base"]}, "only the base_model is there"),
        ({"merge_method": "linear", "models": []}, "models: expected 1 or more entries, found []"),
        ({"merge_method": "linear", "models": ["nowhere"]}, "nowhere: no such directory"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_recipe_with_a_mistake(folder: Path, recipe: dict, words: str) -> None:
    assert words in refused(folder, **MEAN | recipe)


def test_what_is_there_is_never_written_over(folder: Path) -> None:
    (folder / "out").mkdir()
    assert "out: exists already and is not overwritten" in refused(folder, **MEAN)


def test_a_merge_that_fails_midway_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        return merged_tensor(*arguments)

    merged_tensor = merging_room.merged_tensor
    monkeypatch.setattr(merging_room, "merged_tensor", fail)
    assert "cannot be written: [Errno 28] No space left" in refused(folder, **MEAN)
    assert len(calls) == 6


# -- memory -----------------------------------------------------------------------------------------------------------


def test_no_more_is_held_than_a_tensor_of_each_model(tmp_path: Path) -> None:
    """Models of 200 MB, an eighth of it the embedding, which is merged some rows at a time."""
    shape = small(
        vocab_size=25_000, hidden_size=512, intermediate_size=1024, num_hidden_layers=34, num_attention_heads=8
    )
    sizes = {name: tensor.shape for name, tensor in empty_decoder(shape).state_dict().items()}
    block = torch.randn(25_000 * 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    base = {
        theirs: block[: sizes[ours].numel()].reshape(sizes[ours]).clone()
        for theirs, (ours,) in stored_names(sizes, family_of(shape.model_type)).items()
    }
    for name in ("base", "tune-0", "tune-1"):
        (tmp_path / name).mkdir()
        shape.save_pretrained(tmp_path / name)
        SLMTokenizer(260).save_pretrained(tmp_path / name)
        save_file(base, tmp_path / name / WEIGHTS)
    size = (tmp_path / "base" / WEIGHTS).stat().st_size
    assert size > 190e6
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "output_dir": str(tmp_path / "out")}
    recipe["models"] = [{"model": str(tmp_path / f"tune-{i}"), "weight": 0.5, "density": 0.5} for i in (0, 1)]
    (tmp_path / "merge.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "merge.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == pytest.approx(size, rel=0.01)
    # The embedding's magnitudes in float32 are 51 MB, and some parts of 2^20 numbers; what of the mapped files stays in
    # memory besides is the system's choice (80 to 112 MB in all). One whole model would be 200 MB, all three 600.
    assert int(done.stdout.split()[-1]) < 0.75 * size
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())  # no differences
