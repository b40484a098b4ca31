"""What a written file says of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from slmkit.config import UserError
from slmkit.export.gguf import write_gguf
from slmkit.export.runtimes import load
from slmkit.export.targets import as_stored
from tests.export.random_models import MODELS, config_of, write_model


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_a_gguf_come_back_to_their_places(name: str, tmp_path: Path) -> None:
    """Fused, permuted, transposed and split ones: as BF16 rounds them, and in float32 exactly."""
    write_model(tmp_path / "model", config_of(*MODELS[name]))
    loaded = load(str(tmp_path / "model"), tmp_path / "scratch")
    state = loaded.decoder.state_dict()
    for kind in ("F32", "BF16"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind)
        found = as_stored(tmp_path / "model.gguf", loaded).state_dict()
        for parameter, tensor in state.items():
            rounds = kind == "BF16" and tensor.dim() == 2 and parameter != "place.weight"
            expected = tensor.bfloat16().float() if rounds else tensor
            assert (found[parameter] == expected).all(), parameter


def test_other_weights_are_named(tmp_path: Path) -> None:
    write_model(tmp_path / "model", config_of(*MODELS["qwen3"]))
    loaded = load(str(tmp_path / "model"), tmp_path / "scratch")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "F16")
    loaded.decoder.blocks[1].mlp.down.weight.data[:, 3] += 0.05
    with pytest.raises(UserError, match=r"^blk.1.ffn_down.weight in F16 has other weights than the model"):
        as_stored(tmp_path / "model.gguf", loaded)
