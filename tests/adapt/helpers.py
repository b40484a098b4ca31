"""Small models with adapters whose every part matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slmkit.adapt.adapter import AdapterFiles, trained_tensors
from slmkit.adapt.lora import add_lora
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.files.directory import save_decoder
from tests.parity.test_transformers import randomised

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8},
    "gpt2": {},
}
DEEPSEEK = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def config_of(family: str, **changes: Any) -> SLMConfig:
    return SLMConfig(model_type=family, **(SHAPE | FAMILIES.get(family, DEEPSEEK) | changes))


def base_in(directory: Path, config: SLMConfig) -> Decoder:
    """A model in which biases and norms matter, written to `directory`."""
    decoder = randomised(config)
    save_decoder(decoder, config, directory)
    return decoder


def adapted(decoder: Decoder, config: SLMConfig, **settings: Any) -> LoRASettings:
    """Give the decoder an adapter that has learned something."""
    chosen = LoRASettings(**({"r": 4, "lora_alpha": 6} | settings))
    add_lora(decoder, config, chosen, seed=3)
    shake(trained_tensors(decoder))
    return chosen


def save_adapter(
    decoder: Decoder, config: SLMConfig, settings: LoRASettings, base: str | Path, directory: Path
) -> None:
    AdapterFiles(config, settings, Path(base)).write(decoder, trained_tensors(decoder), directory)


def shake(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)


def ids() -> torch.Tensor:
    return torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(0))


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(ids()))
