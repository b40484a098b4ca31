"""An adapter on disk: whose it is, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmkit.adapt.adapter_config import target_names
from slmkit.adapt.load import load_adapted, load_model
from slmkit.config import UserError
from tests.adapt.helpers import adapted, base_in, config_of, logits, save_adapter

OTHER_MODEL = "it is an adapter of another model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = config_of("llama")
    decoder = base_in(tmp_path / "base", config)
    settings = adapted(decoder, config)
    save_adapter(decoder, config, settings, "../base", tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(adapter: Path, change: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_base_is_found_from_the_adapter_and_from_where_one_is(adapter: Path, monkeypatch: Any) -> None:
    expected = logits(load_model(adapter)[0])
    change_config(adapter, base_model_name_or_path=str(adapter.parent / "base"))
    assert torch.equal(logits(load_model(adapter)[0]), expected)
    change_config(adapter, base_model_name_or_path="base")
    with pytest.raises(UserError, match=r"adapter_config.json: its base 'base' is not there: put the model back, or"):
        load_model(adapter)
    monkeypatch.chdir(adapter.parent)
    assert torch.equal(logits(load_model(adapter)[0]), expected)
    change_config(adapter, base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not say which model it adapts"):
        load_model(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, r"'model.layers.0.mlp.down_proj' is for a matrix of 32 × 48, its base has 48 × 48"),
        ({"num_hidden_layers": 1}, r"adapts 'model.layers.1.mlp.down_proj', which its base does not have"),
        ({"num_hidden_layers": 3}, r"no weights for 7 of the modules in its config, such as 'model.layers.2.self"),
    ],
)
def test_an_adapter_of_another_base_is_refused(adapter: Path, changes: dict[str, Any], message: str) -> None:
    shutil.rmtree(adapter.parent / "base")
    base_in(adapter.parent / "base", config_of("llama", **changes))
    with pytest.raises(UserError, match=f"{message}.*: {OTHER_MODEL}"):
        load_model(adapter)


def test_an_adapter_of_another_family_is_refused(adapter: Path) -> None:
    shutil.rmtree(adapter.parent / "base")
    base_in(adapter.parent / "base", config_of("gpt2"))
    with pytest.raises(UserError, match=OTHER_MODEL):
        load_model(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA"),
        ({"bias": "all"}, "bias 'all': trained biases are not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' also changes the base: convert it"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\], which is not supported"),
        ({"r": 0}, "adapter_config.json: r: expected more than 0"),
    ],
)
def test_what_is_not_held_here_is_refused_by_its_key(adapter: Path, changes: dict[str, Any], message: str) -> None:
    change_config(adapter, **changes)
    with pytest.raises(UserError, match=message):
        load_adapted(adapter)


def test_an_adapter_with_nan_is_refused(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    name, tensor = next(iter(load_file(weights).items()))
    tensor.view(-1)[0] = float("nan")
    save_file(load_file(weights) | {name: tensor}, weights)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: '.*' has numbers that are not finite"):
        load_model(adapter)


def test_damaged_and_missing_files_are_named(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-20])
    with pytest.raises(UserError, match="adapter_model.safetensors: damaged or cut short"):
        load_model(adapter)
    weights.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: no such file"):
        load_model(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not a readable adapter_config.json"):
        load_model(adapter)


def test_tensors_that_are_no_loras_are_named(adapter: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    change_tensors(adapter, lambda tensors: tensors.update({f"{name}.lora_C.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"lora_C.weight' is not a LoRA weight of a linear layer"):
        load_model(adapter)


def test_half_an_update_is_refused(adapter: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    change_tensors(adapter, lambda tensors: tensors.pop(f"{name}.lora_B.weight"))
    with pytest.raises(UserError, match=r"q_proj' has lora_A.weight; expected lora_A.weight, lora_B.weight"):
        load_model(adapter)


def test_an_embedding_of_another_vocabulary_is_refused(adapter: Path) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    copies = {name: torch.zeros(90, 32), "base_model.model.lm_head.weight": torch.zeros(90, 32)}
    change_tensors(adapter, lambda tensors: tensors.update(copies))
    with pytest.raises(
        UserError, match=rf"embed_tokens.weight' has shape \(90, 32\), its base's is \(97, 32\): {OTHER_MODEL}"
    ):
        load_model(adapter)


def test_an_embedding_and_a_head_that_differ_are_refused_where_they_are_one(adapter: Path) -> None:
    embedding = "base_model.model.model.embed_tokens.weight"
    change_tensors(adapter, lambda tensors: tensors.update({embedding: torch.zeros(97, 32)}))
    with pytest.raises(UserError, match="changes only one of embedding and head, which share a matrix"):
        load_model(adapter)
    change_tensors(adapter, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(97, 32)}))
    with pytest.raises(UserError, match="its embedding and its head differ"):
        load_model(adapter)


def test_targets_are_written_as_short_as_they_are_unmistakable() -> None:
    names = [f"h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert target_names(names, []) == ["c_attn", "c_proj"]
    assert target_names([n for n in names if "attn" in n], [n for n in names if "mlp" in n]) == [
        "c_attn",
        "attn.c_proj",
    ]
    assert target_names(names[:1], names[1:]) == ["0.attn.c_attn"]
