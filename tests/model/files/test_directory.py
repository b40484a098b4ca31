"""A model directory is written whole and read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmkit.config import UserError
from slmkit.model.files.directory import SHARDS, WEIGHTS, load_decoder, save_decoder
from slmkit.model.initialization import build_decoder
from tests.model.test_cache import FAMILIES, config
from tests.model.test_decoder import tiny


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_decoder(build_decoder(tiny(), seed=1), tiny(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_written_is_read_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    config = tiny(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    decoder = build_decoder(config, seed=5)
    save_decoder(decoder, config, tmp_path)
    loaded, loaded_config = load_decoder(tmp_path)
    assert loaded_config == config
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in decoder.state_dict().items())
    assert ("lm_head.weight" in load_file(tmp_path / WEIGHTS)) is not tied


def test_loading_equals_building_in_what_it_computes(directory: Path) -> None:
    x = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(load_decoder(directory)[0](x), build_decoder(tiny(), seed=1).eval()(x))


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    content = load_file(directory / WEIGHTS) | tensors
    save_file({name: t.contiguous() for name, t in content.items() if t is not None}, directory / WEIGHTS)


def test_a_missing_tensor_is_named(directory: Path) -> None:
    change(directory, **{"model.norm.weight": None})
    with pytest.raises(UserError, match=r"missing tensors, such as 'model\.norm\.weight'"):
        load_decoder(directory)


def test_an_unexpected_tensor_is_named(directory: Path) -> None:
    change(directory, **{"model.layers.9.mlp.up_proj.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"unexpected tensors, such as 'model\.layers\.9"):
        load_decoder(directory)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(directory: Path) -> None:
    change(directory, **{"model.norm.weight": torch.zeros(5)})
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has shape \(5,\), its config says \(32,\)"):
        load_decoder(directory)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_named(directory: Path, broken: float) -> None:
    for name, tensor in load_file(directory / WEIGHTS).items():
        wrong = tensor.clone()
        wrong.view(-1)[-1] = broken
        change(directory, **{name: wrong})
        with pytest.raises(UserError, match=rf"model\.safetensors: '{name}' has numbers that are not finite"):
            load_decoder(directory)
        change(directory, **{name: tensor})
    load_decoder(directory)


def test_a_truncated_file_is_one_line_with_its_path(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
        load_decoder(directory)


def test_a_directory_without_weights_says_so(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    with pytest.raises(UserError, match="no weights"):
        load_decoder(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    decoder = build_decoder(config(family), seed=5)
    save_decoder(decoder, config(family), tmp_path)
    loaded, loaded_config = load_decoder(tmp_path)
    assert loaded_config == config(family)
    assert loaded.architecture == decoder.architecture
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in decoder.state_dict().items())


def shard(directory: Path) -> list[Path]:
    """Cut the weights into two files with an index, as large models are saved."""
    content = load_file(directory / WEIGHTS)
    names = sorted(content)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: content[name] for name in inside}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (directory / SHARDS).write_text(json.dumps(index))
    (directory / WEIGHTS).unlink()
    return [directory / file for file in parts]


def test_shards_are_read_as_one(directory: Path) -> None:
    whole = load_decoder(directory)[0].state_dict()
    shard(directory)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_decoder(directory)[0].state_dict().items())


def test_a_missing_shard_is_named(directory: Path) -> None:
    shard(directory)[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: no such file"):
        load_decoder(directory)


def test_an_index_that_is_none_is_one_line(directory: Path) -> None:
    shard(directory)
    (directory / SHARDS).write_text('{"weight_map": [1]}')
    with pytest.raises(UserError, match="not a readable index of shards"):
        load_decoder(directory)


def test_an_architecture_that_is_not_held_is_refused_with_those_that_are(directory: Path) -> None:
    content = json.loads((directory / "config.json").read_text()) | {"model_type": "mamba"}
    (directory / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"'mamba' is not supported; known: deepseek_v3, gemma2, gemma3_text, gpt2, llama"
    ):
        load_decoder(directory)
