"""A GGUF of one layer with random weights, to look at a tokenizer in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from slmkit import SLMTokenizer
from slmkit.export.gguf_tokenizer import add_tokenizer

WIDTH, CONTEXT = 32, 256


def describe_model(directory: Path, tokenizer: SLMTokenizer, ends: list[int] | None = None, **more: Any) -> None:
    """Write config.json and generation_config.json beside a tokenizer; `ends`: tokens that end a text."""
    ends = sorted(tokenizer.stop_token_ids) if ends is None else ends
    config = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT, "rope_theta": 10000.0, "hidden_act": "silu", "eos_token_id": ends,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, **more}))


def write_tiny_gguf(directory: Path, path: Path, rows: int | None = None) -> Path:
    """A Llama with the directory's tokenizer and `rows` rows (default: one for each id)."""
    tokenizer = SLMTokenizer.from_pretrained(directory)
    rows = rows or len(tokenizer)
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 2)
    add_tokenizer(writer, tokenizer, directory, rows)
    shapes = {
        "token_embd": (rows, WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (64, WIDTH), "blk.0.ffn_up": (64, WIDTH), "blk.0.ffn_down": (WIDTH, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32) * 0.3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
