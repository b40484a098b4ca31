"""The HTML page in a real Chromium: its ids, log-probabilities and text are slmkit's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slmkit.adapt.load import load_model
from slmkit.config import UserError
from slmkit.export import html
from slmkit.export.html import HtmlPage, write_html
from slmkit.export.runtimes import EXACT, Probe, Slmkit, compare, probe_strings
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.serving.browser import chromium, expect_contrast, expect_names, expect_no_sideways_scroll, picture, until
from tests.tokenizer.kinds import directory_of

__all__ = ["chromium"]  # a fixture
Make = Callable[..., Path]
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "num_key_value_heads": 4}
GROUPED = {"num_key_value_heads": 2}
# One or two of each family, so that each choice of the architecture occurs.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"hidden_act": "gelu_new"},
    "llama": GROUPED | {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 64}},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 6, "hidden_act": "gelu"},
    "llama-dynamic": {
        "model_type": "llama", "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 1e4},
    },
    "mistral": GROUPED | {"sliding_window": 7, "rope_parameters": YARN | {"rope_theta": 1e4}},
    "qwen2": WINDOWS,
    "qwen3": {"num_key_value_heads": 1, "head_dim": 24},
    "smollm3": GROUPED | {"no_rope_layers": [1, 0]},
    "olmo2": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "olmo3": WINDOWS,
    "gemma2": WINDOWS | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GROUPED | {
        "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    "deepseek_v3": LATENT,
    "deepseek_v3-compressed": LATENT | {"model_type": "deepseek_v3", "q_lora_rank": 9, "rope_interleave": True},
    "slm": {"norm": "layer", "norm_at": "both", "gated_mlp": False, "qk_norm": "width", "sliding_window": 1, "hidden_act": "relu2"},
}  # fmt: skip
TEXT = "Once upon a time there was a cat. It's 12345 o'clock!"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make("llama", seed=…, tokenizer=…, **settings)` → a model directory with random weights."""

    def made(name: str = "llama", tokenizer: Path | None = None, **settings: Any) -> Path:
        directory = tokenizer or tmp_path_factory.mktemp(name)
        if tokenizer is None:
            plain = SLMTokenizer(320)
            plain.train([TEXT])
            plain.save_pretrained(directory)
        sizes = {
            "model_type": name.split("-")[0], "vocab_size": len(SLMTokenizer.from_pretrained(directory)) + 3, "hidden_size": 32,
            "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 400,
        }  # fmt: skip
        config = SLMConfig(**sizes | MODELS.get(name, {}) | settings)
        decoder = build_decoder(config, seed=5)
        for parameter in decoder.parameters():  # so large that a wrong order of rows or a wrong angle is seen
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.15
        save_decoder(decoder, config, directory)
        return directory

    return made


def reference(directory: Path) -> Slmkit:
    return Slmkit(load_model(directory)[0].eval(), SLMTokenizer.from_pretrained(directory), 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_page_predicts_what_slmkit_does(name: str, make: Make, chromium: Any, tmp_path: Path) -> None:
    model = make(name)
    write_html(model, tmp_path / "page.html", "f32")
    ours = reference(model)
    probe = Probe.of(ours.decoder, ours.tokenizer, strings=50, conversations=20, count=256)
    with HtmlPage(tmp_path / "page.html", chromium) as page:
        assert page.checked["equal"], page.checked
        assert page.checked["webassembly"]
        parity = compare(ours, page, probe, EXACT)
    assert parity.passed, parity.failures
    assert parity.checks["greedy tokens"]["compared"] >= min(256, ours.decoder.max_positions // 2)
