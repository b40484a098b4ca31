"""What a user writes is checked, and what is published is what transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.model import SLMConfig
from slmkit.model.config import PRESETS, TRAINING_FIELDS


def test_heads_follow_from_each_other_where_they_are_not_given() -> None:
    config = SLMConfig(hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple"),
        ({"hidden_size": 30, "num_attention_heads": 6}, "even"),
        ({"vocab_size": 0}, "greater than 0"),
        ({"sequence_length": 4096, "max_position_embeddings": 128}, "longer"),
        ({"hiden_size": 3}, "Extra"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SLMConfig(**changes)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'llama-3.2-1b'"):
        SLMConfig.from_preset("llama-3-1b")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_disk(name: str, tmp_path: Path) -> None:
    config = SLMConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    assert SLMConfig.from_pretrained(tmp_path) == config


def test_training_fields_never_reach_the_models_config(tmp_path: Path) -> None:
    SLMConfig(learning_rate=0.5).save_pretrained(tmp_path)
    assert not TRAINING_FIELDS & json.loads((tmp_path / "config.json").read_text()).keys()


def test_rope_is_written_both_ways_and_read_in_either(tmp_path: Path) -> None:
    config = SLMConfig.from_preset("llama-3.2-1b")
    content = config.published()
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 500_000
    assert content["rope_scaling"]["factor"] == 32
    for older in (["rope_theta", "rope_scaling"], ["rope_parameters"]):
        spelled = {k: v for k, v in content.items() if k in older or not k.startswith("rope")}
        (tmp_path / "config.json").write_text(json.dumps(spelled))
        assert SLMConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_a_key_that_would_have_to_be_ignored_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "sliding_window": 512}))
    with pytest.raises(UserError, match="unknown key 'sliding_window'"):
        SLMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_missing_or_broken_config_is_one_line_with_its_path(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        SLMConfig.from_pretrained(tmp_path)
