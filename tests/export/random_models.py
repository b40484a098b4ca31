"""Models of each family with random weights in which every choice matters, for the tests of GGUF."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from slmkit.data import stories
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer

ORIGINAL, CONTEXT, WINDOW = 64, 256, 20  # positions: of the model before it was stretched, of the model, of a window
TOKENS, ROWS = 300, 307
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 500_000.0}

# A head is not hidden_size / num_attention_heads wide where the family lets it; there are fewer key heads than queries.
SHAPE: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 72,
    "num_hidden_layers": 3, "rope_parameters": PLAIN, "tie_word_embeddings": False,
}  # fmt: skip
WHOLE_HEADS = SHAPE | {"head_dim": 6}
GPT2 = {key: SHAPE[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")}
GEMMA = SHAPE | {"sliding_window": WINDOW, "query_pre_attn_scalar": 10}
GEMMA2 = GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "tie_word_embeddings": True}
LATENT = {key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "head_dim")} | {
    "q_lora_rank": 12, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name → family and settings
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
    "llama, llama3": ("llama", SHAPE | {"rope_parameters": LLAMA3}),
    "llama, biases, linear": ("llama", SHAPE | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}),
    "llama, tied, yarn": ("llama", SHAPE | {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "llama, another yarn": ("llama", SHAPE | {"rope_parameters": YARN | {"beta_fast": 4.0, "attention_factor": 1.3}}),
    "mistral, window of the context": ("mistral", SHAPE | {"sliding_window": CONTEXT}),
    "slm": ("slm", SHAPE | {"attention_bias": True}),
    "qwen2, yarn": ("qwen2", WHOLE_HEADS | {"rope_parameters": YARN | {"attention_factor": 1.2}}),
    "qwen3": ("qwen3", SHAPE),
    "smollm3": ("smollm3", SHAPE | {"num_hidden_layers": 5}),
    "olmo2, tied": ("olmo2", WHOLE_HEADS | {"tie_word_embeddings": True}),
    "olmo3, yarn": (
        "olmo3",
        WHOLE_HEADS
        | {"num_hidden_layers": 5, "sliding_window": WINDOW}
        | {"rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 10_000.0}}},
    ),
    "gemma2, yarn": ("gemma2", GEMMA2 | {"rope_parameters": YARN}),
    "gemma2, other layers": ("gemma2", GEMMA2 | {"layer_types": [FULL, SLIDING, SLIDING]}),
    "gemma2, no window": ("gemma2", GEMMA2 | {"layer_types": [FULL] * 3}),
    "gemma3, linear": (
        "gemma3_text",
        GEMMA
        | {"num_hidden_layers": 7}
        | {"rope_parameters": {FULL: LINEAR, SLIDING: {"rope_type": "default", "rope_theta": 100.0}}},
    ),
    "gemma3, windows only": ("gemma3_text", GEMMA | {"layer_types": [SLIDING] * 3}),
    "gemma3, no window": ("gemma3_text", GEMMA | {"layer_types": [FULL] * 3, "final_logit_softcapping": 5.0}),
    "deepseek, yarn": (
        "deepseek_v3",
        LATENT | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
    ),
    "deepseek, halves": ("deepseek_v3", LATENT | {"q_lora_rank": None, "rope_interleave": False}),
}


@functools.cache
def tokenizer() -> SLMTokenizer:
    """A byte-level BPE of 300 tokens."""
    trained = SLMTokenizer(TOKENS)
    trained.train(story.text for story in stories.tell_many(0, 20))
    return trained


def config_of(family: str, settings: dict[str, Any]) -> SLMConfig:
    shape = {"vocab_size": ROWS, "max_position_embeddings": CONTEXT, "eos_token_id": sorted(tokenizer().stop_token_ids)}
    return SLMConfig(model_type=family, **(shape | settings))


def random_decoder(config: SLMConfig, scale: float = 1.5) -> Decoder:
    """Matrices that change what they read a lot, and norms and biases that are not one and zero."""
    decoder, generator = build_decoder(config, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in decoder.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(values * 0.3)
            else:
                parameter.copy_(values * scale / parameter.size(-1) ** 0.5)
    return decoder.eval()


def write_model(directory: Path, config: SLMConfig, scale: float = 1.5) -> Decoder:
    """A model directory with its tokenizer."""
    decoder = random_decoder(config, scale)
    save_decoder(decoder, config, directory)
    tokenizer().save_pretrained(directory)
    return decoder
