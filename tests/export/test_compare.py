"""What a written file says of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from slmkit.adapt.quantize import rounded_copy
from slmkit.adapt.quantized_files import save_quantized
from slmkit.config import UserError
from slmkit.export.compare import as_stored, bits_of, farthest
from slmkit.export.folders import Mlx, write_mlx
from slmkit.export.gguf import matrices_of, write_gguf
from slmkit.export.runtimes import Transformers, load
from tests.export.random_models import MODELS, config_of, write_model


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_a_gguf_come_back_to_their_places(name: str, tmp_path: Path) -> None:
    """Fused, permuted, transposed and split ones: as BF16 rounds them, and in float32 exactly."""
    write_model(tmp_path / "model", config_of(*MODELS[name]))
    loaded = load(str(tmp_path / "model"), tmp_path / "scratch")
    state = loaded.decoder.state_dict()
    for kind in ("F32", "BF16"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind)
        found = as_stored(matrices_of(tmp_path / "model.gguf", loaded), loaded).state_dict()
        for parameter, tensor in state.items():
            rounds = kind == "BF16" and tensor.dim() == 2 and parameter != "place.weight"
            expected = tensor.bfloat16().float() if rounds else tensor
            assert (found[parameter] == expected).all(), parameter


def test_other_weights_are_named(tmp_path: Path) -> None:
    write_model(tmp_path / "model", config_of(*MODELS["qwen3"]))
    loaded = load(str(tmp_path / "model"), tmp_path / "scratch")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "F16")
    loaded.decoder.blocks[1].mlp.down.weight.data[:, 3] += 0.05
    with pytest.raises(UserError, match=r"^blk.1.ffn_down.weight in F16 has other weights than the model: 32 neigh"):
        as_stored(matrices_of(tmp_path / "model.gguf", loaded), loaded)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_1", "Q5_K_M", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "F16"])
def test_what_rounding_changes_is_well_within_the_bound(kind: str, tmp_path: Path) -> None:
    """Of normal weights. So a scale that is wrong by half is far beyond it."""
    config = config_of("llama", {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4})
    write_model(tmp_path / "model", config)
    loaded = load(str(tmp_path / "model"), tmp_path / "scratch")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind)
    as_stored(matrices_of(tmp_path / "model.gguf", loaded), loaded)
    for one in matrices_of(tmp_path / "model.gguf", loaded):
        assert one.places is not None
        whole = torch.cat([loaded.decoder.get_parameter(name) for name in one.parameters]).flatten()
        before = whole[one.places].unflatten(-1, (-1, one.group))
        apart = (one.values - before.flatten(-2)).unflatten(-1, (-1, one.group)).square().mean(-1).sqrt()
        assert (apart / before.abs().amax(-1)).max() < 0.7 * farthest(bits_of(one.type)), one.type


# -- integers of other folders ----------------------------------------------------------------------------------------


def wrong_scale(tensors: dict[str, torch.Tensor], name: str) -> None:
    scales = next(part for part in tensors if part.startswith(name) and part.endswith(("_scale", ".scales")))
    tensors[scales][3, -1] *= 1.5


def other_row(tensors: dict[str, torch.Tensor], name: str) -> None:
    """The codes of two rows are exchanged."""
    codes = next(part for part in tensors if part.startswith(name) and part.endswith(("_packed", ".weight")))
    tensors[codes] = tensors[codes][[1, 0, *range(2, len(tensors[codes]))]]


@pytest.mark.parametrize("fault", [wrong_scale, other_row])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("runtime", [Transformers, Mlx])
def test_one_wrong_group_of_integers_is_named(
    runtime: type[Transformers], bits: int, fault: Callable[[Any, str], None], tmp_path: Path
) -> None:
    write_model(tmp_path / "model", config_of("llama", {"hidden_size": 64, "intermediate_size": 128}))
    loaded, folder = load(str(tmp_path / "model"), tmp_path / "scratch"), tmp_path / "made"
    folder.mkdir()
    opened = object.__new__(runtime)  # only its file is read
    opened.directory = folder
    if runtime is Mlx:
        write_mlx(loaded, folder, bits)
    else:
        save_quantized(rounded_copy(loaded.decoder, "int8" if bits == 8 else "int4"), loaded.config, folder)
    rounded = as_stored(opened.stored(loaded), loaded)
    weights = [one.blocks[0].mlp.up.weight for one in (loaded.decoder, rounded)]
    assert 0 < (weights[0] - weights[1]).abs().max() < 0.2 * weights[0].abs().max()
    tensors = load_file(folder / "model.safetensors")
    fault(tensors, "model.layers.0.mlp.up_proj")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"(mlp\.up\.weight|mlp\.up_proj\.) in int. has other weights than the model"):
        as_stored(opened.stored(loaded), loaded)
