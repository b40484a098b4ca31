"""A plain training loop in PyTorch alone, as one writes it on a page: what a toolkit has to be better than.

GPT-2 and Llama with PyTorch's fused attention, cross-entropy and AdamW, without any library on top. They load the
weights of a Hugging Face model directory, so that other implementations can be compared loss by loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal attention; q, k and v are one product.  [batch, tokens, width] → same"""

    def __init__(self, width: int, heads: int, kv_heads: int, bias: bool) -> None:
        super().__init__()
        self.sizes, self.head_dim = [width, *2 * [width // heads * kv_heads]], width // heads
        self.qkv = nn.Linear(width, sum(self.sizes), bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        parts = self.qkv(x).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if rope is not None:
            q, k = rotated(q, *rope), rotated(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
        return self.out(y.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """RoPE over halves.  x [batch, heads, tokens, head_dim], cosines and sines [tokens, head_dim]"""
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool = True, approximate: str = "tanh") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attention = Attention(width, heads, heads, bias)
        self.up, self.down = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)
        self.approximate = approximate

    def forward(self, x: Tensor, rope: None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), rope)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate=self.approximate))


class GPT(nn.Module):
    """GPT-2 without dropout: learned positions, LayerNorm, GELU, tied head.  ids [batch, tokens] → logits"""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        positions: int,
        bias: bool = True,
        approximate: str = "tanh",
    ) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(vocab_size, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads, bias, approximate) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.place(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


class LlamaBlock(nn.Module):
    def __init__(self, width: int, mlp_width: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)
        self.attention = Attention(width, heads, kv_heads, bias=False)
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), rope)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """Llama: RoPE, RMSNorm, SwiGLU, grouped key and value heads, tied head.  ids [batch, tokens] → logits"""

    def __init__(self, c: dict[str, Any], length: int) -> None:
        super().__init__()
        width, heads, eps = c["hidden_size"], c["num_attention_heads"], c["rms_norm_eps"]
        self.embedding = nn.Embedding(c["vocab_size"], width)
        self.blocks = nn.ModuleList(
            LlamaBlock(width, c["intermediate_size"], heads, c["num_key_value_heads"], eps)
            for _ in range(c["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(width, eps=eps)
        head_dim = width // heads
        slopes = c["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(length), slopes).repeat(1, 2)  # [tokens, head_dim]
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        rope = self.cosines[: ids.size(1)], self.sines[: ids.size(1)]
        for block in self.blocks:
            x = block(x, rope)
        return F.linear(self.norm(x), self.embedding.weight)


def load_plain(directory: Path, length: int) -> nn.Module:
    """A GPT-2 or a Llama without RoPE scaling, with the weights of a model directory."""
    config = json.loads((directory / "config.json").read_text())
    theirs = load_file(directory / "model.safetensors")
    if config["model_type"] == "gpt2":
        shape = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
        model: nn.Module = GPT(*(config[name] for name in shape))
        model.load_state_dict({ours: from_gpt2(theirs, ours) for ours in model.state_dict()})
    else:
        model = Llama(config, length)
        tables = {"cosines": model.cosines, "sines": model.sines}
        model.load_state_dict(tables | {ours: from_llama(theirs, ours) for ours, _ in model.named_parameters()})
    return model


GPT2_NAMES = {
    "embedding": "wte", "place": "wpe", "norm": "ln_f", "norm1": "ln_1", "norm2": "ln_2", "up": "mlp.c_fc",
    "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "down": "mlp.c_proj",
}  # fmt: skip
LLAMA_NAMES = {
    "embedding": "embed_tokens", "norm": "norm", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj", "down": "mlp.down_proj", "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}  # fmt: skip


def split_name(ours: str) -> tuple[str, str, str]:
    """`blocks.3.attention.out.weight` → ("3", "attention.out", "weight"); outside the blocks the number is empty."""
    rest, kind = ours.rsplit(".", 1)
    if not rest.startswith("blocks."):
        return "", rest, kind
    _, number, place = rest.split(".", 2)
    return number, place, kind


def from_gpt2(theirs: dict[str, Tensor], ours: str) -> Tensor:
    """GPT-2's tensor for one of ours; its linear weights are stored as [in, out]."""
    number, place, kind = split_name(ours)
    name = f"{f'h.{number}.' if number else ''}{GPT2_NAMES[place]}.{kind}"
    tensor = theirs[name if name in theirs else f"transformer.{name}"]
    return tensor.T if number and tensor.dim() == 2 else tensor


def from_llama(theirs: dict[str, Tensor], ours: str) -> Tensor:
    number, place, kind = split_name(ours)
    names = LLAMA_NAMES[place]
    before = f"model.layers.{number}." if number else "model."
    parts = [theirs[f"{before}{name}.{kind}"] for name in ([names] if isinstance(names, str) else names)]
    return torch.cat(parts)


def adamw(parameters: Iterable[nn.Parameter], rates: dict[str, Any]) -> torch.optim.AdamW:
    """PyTorch's fused AdamW with weight decay on matrices only."""
    parameters = list(parameters)
    decayed, others = ([p for p in parameters if (p.dim() >= 2) is matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": rates["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rates["lr"], betas=tuple(rates["betas"]), eps=rates["eps"], fused=True)


def warm_up_and_cosine(step: int, steps: int, warm_up: int, peak: float, least: float) -> float:
    """Learning rate of a step, counted from 0: linear up to the peak, then half a cosine down to the least."""
    if step < warm_up:
        return peak * (step + 1) / (warm_up + 1)
    return least + 0.5 * (peak - least) * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
