"""llama.cpp as a peer by `xllamacpp`: a Llama as a GGUF file, its decoding inside this process, and its server.

pip install xllamacpp gguf
python -m benchmarks.llama_cpp model.gguf --port 8080 --slots 64 --length 256
"""

from __future__ import annotations

import argparse
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
import xllamacpp
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from slmkit.model.config import SLMConfig

FORMATS = ("F32", "BF16", "Q8_0", "Q4_0")
BLOCK_PARTS = {  # transformers' names → GGUF's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    weights: Mapping[str, torch.Tensor],
    config: SLMConfig,
    path: Path,
    weight_format: str,
    tokenizer: Path | None = None,
) -> None:
    """Write a Llama as GGUF, its matrices in `weight_format`; with Q4_0 embedding and head in Q8_0.

    `weights` have transformers' names. `tokenizer` is the directory of a byte-level BPE that splits as GPT-2 does;
    without one the vocabulary is of placeholders: prompts are token ids.
    """
    outer_format = "Q8_0" if weight_format == "Q4_0" else weight_format  # as `slm quantize`; llama.cpp's own is Q6_K
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_add_bos_token(False)
    if tokenizer is None:
        writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
        writer.add_token_types([int(TokenType.NORMAL)] * config.vocab_size)
        writer.add_token_merges(["t 0"])  # at least one is required
    else:
        _add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, tensor in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, heads if "q_proj" in name else kv_heads)
        of_matrix = weight_format if name.startswith("model.layers.") else outer_format
        kind = GGMLQuantizationType[of_matrix if tensor.dim() == 2 else "F32"]
        data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Vocabulary, merges, end tokens and chat template of a tokenizer.json. Raises `ValueError` for another kind."""
    found = json.loads((directory / "tokenizer.json").read_text())
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    splits, model = found["pre_tokenizer"], found["model"]
    if model["type"] != "BPE" or splits["type"] != "ByteLevel" or not splits["use_regex"] or found["normalizer"]:
        raise ValueError(f"{directory}: expected a byte-level BPE that splits as GPT-2 does")
    spelled = {number: f"[unused {number}]" for number in range(vocab_size)}
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for spelling, number in model["vocab"].items():
        spelled[number], kinds[number] = spelling, int(TokenType.NORMAL)
    for token in found["added_tokens"]:
        spelled[token["id"]], kinds[token["id"]] = token["content"], int(TokenType.CONTROL)
        if token["content"] == settings["eos_token"]:
            writer.add_eos_token_id(token["id"])
        if token["content"] == "<|im_end|>":
            writer.add_eot_token_id(token["id"])
    writer.add_token_list([spelled[number] for number in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_chat_template(settings["chat_template"])


def _gguf_name(name: str) -> str:
    outside = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outside:
        return outside[name]
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{BLOCK_PARTS[part]}.weight"


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in the order of GGUF's Llama, whose RoPE rotates neighbours.

    transformers rotates channel i with channel i + head_dim / 2.
    """
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


class LlamaCpp:
    """A GGUF model in llama.cpp, called inside this process: no HTTP, no tokenizing, greedy."""

    def __init__(self, path: Path, threads: int, sequences: int, length: int, cache_type: str = "F16") -> None:
        """Room for `sequences` at once of `length` tokens each; keys and values are kept as `cache_type`."""
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.n_parallel, parameters.kv_unified = sequences, False
        parameters.n_ctx = sequences * length
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type[f"GGML_TYPE_{cache_type}"]
        parameters.cache_ram_mib = parameters.verbosity = 0
        self.server = xllamacpp.Server(parameters)

    def generate(self, ids: torch.Tensor, new: int) -> list[list[int]]:
        """ids [batch, prompt] → `new` greedy tokens of each sequence. Raises `ValueError` if there are fewer."""
        request = {
            "prompt": ids.tolist(),
            "max_tokens": new,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        choices = self.server.handle_completions(request)["choices"]
        rows = [[int(number) for number in re.findall(r"t(\d+)", choice["text"])] for choice in choices]
        if any(len(row) != new for row in rows) or len(rows) != len(ids):
            raise ValueError(f"llama.cpp made {[len(row) for row in rows]} tokens, not {new} for each of {len(ids)}")
        return rows


def serve(path: Path, port: int, slots: int, length: int, threads: int) -> None:
    """llama.cpp's server of a GGUF model on 127.0.0.1, with a number of slots and of tokens in each."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.model_alias = str(path), {path.stem}
    parameters.hostnames, parameters.port = ["127.0.0.1"], port
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_parallel, parameters.n_ctx, parameters.kv_unified = slots, slots * length, False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    threading.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    serve(arguments.path, arguments.port, arguments.slots, arguments.length, arguments.threads)


if __name__ == "__main__":
    main()
