"""A model directory is written whole and read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmkit.config import UserError
from slmkit.model import build_decoder, load_decoder, save_decoder
from slmkit.model.directory import WEIGHTS
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


def test_a_truncated_file_is_one_line_with_its_path(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
        load_decoder(directory)


def test_a_directory_without_weights_says_so(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    with pytest.raises(UserError, match="no weights"):
        load_decoder(directory)
