"""docs/documents.md: each figure in the column "here" is what the library computes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slmkit.device import find_device
from slmkit.model.architectures import Architecture, Layer, architecture_of
from slmkit.model.cache import AT_ONCE, cache_bytes
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import empty_decoder
from slmkit.model.sizes import cache_size, flops_per_token, parameter_count, parameters_by_module
from slmkit.training.estimate.memory import MemoryProfile, reading_bytes, training_bytes
from slmkit.training.recipe.recipe import find_recipe, load_recipe
from tests.long import IS_LONG
from tests.real_data import real_data

PAGE = (Path(__file__).parent.parent / "docs" / "documents.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: cells[1]
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")
    )
    if len(cells) == 3
}
GPT2 = 50_257
LLAMA_2_7B = SLMConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    tie_word_embeddings=False,
)
IN_MEMORY = (  # rows that are computed without storing a tensor, in seconds each
    "12 GB of training memory at batch 32 in bfloat16",
    "training memory at batch 16, 32 and 64, bfloat16 and float16: 8, 12 and 20 GB",
    "the same in float32: 16, 24 and 40 GB",
    "activations at batch 1: 200 MB",
    "total inference memory: 860 MB",
    "gradient checkpointing: 40 % less memory, 20 % more time",
    "bfloat16 saves 50 % of memory",
    "the same for inference only: 2, 3 and 5 GB",
)


def shape(preset: str, **changes: object) -> Architecture:
    return architecture_of(SLMConfig.from_preset(preset, **changes))


def unshared(a: Architecture) -> Architecture:
    return replace(a, kv_heads=a.heads)


def cache_share(a: Architecture) -> float:
    return cache_size(unshared(a), 1024).at_length / cache_size(a, 1024).at_length


def pairs(length: int, window: int) -> float:
    """Pairs of a query and a key before it that a window leaves, as a share of all."""
    inside = min(length, window)
    return (inside * (inside + 1) / 2 + (length - inside) * window) / (length * (length + 1) / 2)


def attention_saved(length: int) -> float:
    a = shape("gemma-3-270m")
    return 1 - sum(pairs(length, layer.window or length) for layer in a.layers) / a.depth


def all_saved(length: int) -> float:
    a = shape("gemma-3-270m", vocab_size=GPT2)
    flops = flops_per_token(replace(a, layers=(Layer(),) * a.depth), length)  # without windows
    scores = flops.attention * (length + 1) / 2 / length  # of keys that are not behind the query
    return scores * attention_saved(length) / (flops.matrices + scores)


def mega(number: float) -> str:
    return f"{number / 1e6:.0f} MB"


def millions(a: Architecture) -> str:
    return f"{parameter_count(a) / 1e6:.1f} M"


def figures() -> dict[str, str]:
    slm, clm, llama = shape("vector-slm"), shape("vector-clm-50m"), shape("llama-3.2-1b")
    gemma, ours, smallm = shape("gemma-3-270m"), shape("gemma-3-270m", vocab_size=GPT2), shape("smallm-60m")
    small, medium = shape("gpt2"), shape("gpt2", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    blocks = 1 - parameters_by_module(slm)["embedding"] / parameter_count(slm)
    n, embedding = parameter_count(llama), parameters_by_module(llama)["embedding"]
    cache = [cache_size(llama, length).at_length for length in (8_192, 32_768, 131_072)]
    parts, flops = parameters_by_module(ours), flops_per_token(ours, 128)
    attention, mlp = 2 * parts["attention"] + flops.attention, 2 * parts["mlp"]
    step = 3 * flops.forward * 32 * 128
    saved = 1 - parameters_by_module(gemma)["attention"] / parameters_by_module(unshared(gemma))["attention"]
    recipe = load_recipe(find_recipe("gemma-3-270m")).train
    smallm_step = load_recipe(find_recipe("smallm-60m")).train.tokens_per_step
    tokens = load_recipe(find_recipe("vector-slm"))
    windows = [layer.window for layer in gemma.layers if layer.window]
    llama2 = parameter_count(architecture_of(LLAMA_2_7B))
    four_bits = 0.5 + 2 / 32  # and a scale of 16 bits for each 32 weights
    return {
        "VectorCLM: 50 million parameters": millions(clm),
        "VectorSLM: a small vocabulary keeps parameters in the blocks": f"{blocks:.1%} of {millions(slm)}".replace(
            "%", " %"
        ),
        "16,384 tokens": f"{slm.vocab_size:,}",
        "fewer KV heads make the KV cache smaller": (
            f"{cache_share(slm):.1f} times (VectorSLM), {cache_share(clm):.1f} times (VectorCLM)"
        ),
        "1.23 billion parameters": f"{n / 1e9:.3f} billion",
        "training in float32, batch 1: 8 to 10 GB": f"{16 * n / 1e9:.1f} GB",
        "training in float16, batch 1: 4 to 6 GB": f"{16 * n / 1e9:.1f} GB",
        "weights to run: 2.3 GB in full precision": f"{4 * n / 1e9:.2f} GB in float32, {2 * n / 1e9:.2f} GB in 16 bits",
        "weights to run: 1.1 GB in 4 bits": (
            f"{(2 * embedding + four_bits * (n - embedding)) / 1e9:.2f} GB with the embedding in 16 bits, "
            f"{four_bits * n / 1e9:.2f} GB without"
        ),
        "grouped queries make the KV cache 4 times smaller": f"{cache_share(llama):.1f} times",
        "memory of 32 K and 128 K tokens: 4 and 16 times that of 8 K": (
            f"{cache[1] / cache[0]:.1f} and {cache[2] / cache[0]:.1f} times: "
            f"{cache[0] / 1e9:.2f}, {cache[1] / 1e9:.2f} and {cache[2] / 1e9:.2f} GB"
        ),
        "270 million parameters": f"{millions(ours)} with its tokenizer, {millions(gemma)} with Gemma's",
        "weights in bfloat16: 540 MB": (
            f"{mega(2 * parameter_count(ours))} with its tokenizer, {mega(2 * parameter_count(gemma))} with Gemma's"
        ),
        "KV cache of 1,024 tokens: 120 MB": (
            f"{cache_size(gemma, 1024, 2).at_length / 1e6:.1f} MB in bfloat16, "
            f"{cache_size(gemma, 1024, 4).at_length / 1e6:.1f} MB in float32"
        ),
        "grouped queries: 40 % fewer parameters in attention": f"{100 * saved:.1f} %",
        "feed-forward 3.2 times as wide": f"{gemma.mlp_width / gemma.width:.1f} times",
        "operations of the embedding (its product with the head): 80 M": (
            f"{2 * parts['embedding'] / 1e6:.1f} M a token"
        ),
        "operations of attention: 850 M for 128 tokens": (
            f"{attention / 1e6:.1f} M a token, {attention * 128 / 1e9:.2f} G for 128"
        ),
        "operations of the feed-forward: 1.2 G for 128 tokens": (
            f"{mlp / 1e6:.1f} M a token, {mlp * 128 / 1e9:.1f} G for 128"
        ),
        "operations: 2.1 G a token": (
            f"{flops.forward / 1e6:.1f} M a token, {flops.forward * 128 / 1e9:.1f} G for 128"
        ),
        "hybrid attention: 78 % fewer FLOPs": (
            f"{100 * attention_saved(128):.0f} % of attention's at 128 and 512 tokens, "
            f"{100 * attention_saved(1024):.1f} % at 1,024, {100 * attention_saved(32768):.1f} % at 32,768"
        ),
        "131,072 tokens a step": f"{recipe.tokens_per_step:,}",
        "initial loss 9.71": f"{math.log(GPT2):.2f}",
        "39.8 % less loss at 5.85": f"{100 * (1 - 5.85 / 9.71):.1f} %",
        "0.3 s an iteration on a T4, batch 32": f"{step / 1e12:.1f} TFLOP, so {step / 0.3e12:.1f} TFLOP/s",
        "150,000 iterations in 25 to 30 hours on a T4": (
            f"{150_000 * 0.3 / 3600:.1f} hours at 0.3 s each; {150_000 * 32 * 0.3 / 3600:.0f} hours if"
        ),
        "context 32 times GPT-2's": f"{gemma.max_positions / small.max_positions:.0f} times",
        "GPT-2 small: 124 M, 248 MB; medium: 355 M, 710 MB": "; ".join(
            f"{millions(a)}, {mega(2 * parameter_count(a))}" for a in (small, medium)
        ),
        "training in float32 takes twice as much as in bfloat16": (
            f"{16 * parameter_count(gemma) / 1e9:.2f} GB of weights"
        ),
        "cosine decay to `eta_min=5e-4`": f"{recipe.schedule(150_000)(149_999):.1f} times its peak",
        "20,000 documents for the tokenizer": (
            f"{len(tokens.data.sources) * (tokens.tokenizer.documents_per_source or 0):,}"
        ),
        "16 layers, 2,048 wide, 8,192 in the MLP, 32 heads over 8, 128,256 tokens, 128 K context": (
            f"{llama.depth}, {llama.width:,}, {llama.mlp_width:,}, {llama.heads}, {llama.kv_heads}, "
            f"{llama.vocab_size:,}, {llama.max_positions:,}"
        ),
        "50 GB of disk": (
            f"{12 * parameter_count(ours) / 1e9:.1f} GB a checkpoint, {2 * 0.47:.1f} GB for 0.47 billion tokens"
        ),
        "KV cache 2 to 3 times faster by grouped queries": f"{cache_share(gemma):.1f} times smaller",
        "LLaMA 2 7B: 14 GB": f"{2 * llama2 / 1e9:.1f} GB for {llama2 / 1e9:.2f} billion parameters",
        "18 layers, 15 of them with a window of 512, 4 heads over 1": ", ".join(
            str(n) for n in (gemma.depth, len(windows), *set(windows), gemma.heads, gemma.kv_heads)
        ),
        "60 million parameters": millions(smallm),
        "50,257 tokens, 6 layers, 6 heads, 384 wide, 128 tokens long": (
            f"{smallm.vocab_size:,}, {smallm.depth}, {smallm.heads}, {smallm.width}, {smallm.max_positions}"
        ),
        "batch 32 with 32 accumulated": (
            f"{smallm_step:,} tokens a step, {smallm_step * 20_000 / 1e9:.1f} billion in 20,000"
        ),
    }


FIGURES = figures()


@pytest.mark.parametrize("claim", FIGURES)
def test_what_is_said_of_a_claim_is_what_is_computed(claim: str) -> None:
    assert ROWS[claim].startswith(FIGURES[claim])


def test_every_other_row_says_that_nothing_was_computed() -> None:
    others = {
        claim: here for claim, here in ROWS.items() if claim not in {*FIGURES, *IN_MEMORY, "claim", "---", "document"}
    }
    assert not [claim for claim, here in others.items() if not re.match("not (run|one figure|computed|measured)", here)
                and "`" not in here]  # fmt: skip


def test_the_figures_in_the_remarks() -> None:
    assert attention_saved(15_740) >= 0.78 > attention_saved(15_739)
    assert "from 15,740 tokens on" in PAGE
    assert f"of all operations {100 * all_saved(32_768):.1f} % at 32,768" in PAGE
    parts = parameters_by_module(shape("smallm-60m"))
    untied = parameter_count(shape("smallm-60m", tie_word_embeddings=False))
    blocks = sum(parts.values()) - parts["embedding"]
    tied = f"{parts['embedding'] / 1e6:.1f} M in the embedding, which is the head too, and {blocks / 1e6:.1f} M in"
    assert f"{tied} the blocks; untied it would be {untied / 1e6:.1f} M" in PAGE
    state = 16 * parameter_count(shape("gemma-3-270m", vocab_size=GPT2))
    assert f"with GPT-2's tokenizer they are {state / 1e9:.2f} GB" in PAGE
    assert f"{2 * parameter_count(shape('llama-3.2-1b')) / 2**30:.2f} GiB" in PAGE


def test_training_memory_of_the_gemma_document() -> None:
    ours, settings = (
        MemoryProfile(empty_decoder(SLMConfig.from_preset("gemma-3-270m", vocab_size=GPT2))),
        load_recipe(find_recipe("gemma-3-270m")).train,
    )

    def needed(rows: int, precision: str, recompute_every: int = 0) -> float:
        chosen = settings.model_copy(update={"gradient_checkpointing": recompute_every})
        return training_bytes(ours, chosen, rows, 128, find_device("cpu", precision)) / 1e9

    whole, checkpointed = needed(32, "bfloat16"), needed(32, "bfloat16", 1)
    said = f"{whole:.1f} GB with its tokenizer, {checkpointed:.1f} GB with checkpointing of every layer"
    assert ROWS[IN_MEMORY[0]] == said
    assert ROWS[IN_MEMORY[5]] == f"{100 * (1 - checkpointed / whole):.0f} % less at batch 32"
    if not IS_LONG:  # each figure takes seconds
        return
    full, half, half_full = needed(32, "float32"), needed(16, "bfloat16"), needed(16, "float32")
    most, most_full = whole + 2 * (whole - half), full + 2 * (full - half_full)  # each row adds as much
    assert ROWS[IN_MEMORY[1]] == f"{half:.1f}, {whole:.1f} and {most:.1f} GB in bfloat16"
    assert ROWS[IN_MEMORY[2]] == f"{half_full:.1f}, {full:.1f} and {most_full:.1f} GB"
    assert ROWS[IN_MEMORY[6]] == f"{100 * (1 - whole / full):.0f} % at batch 32"


def test_inference_memory_of_the_gemma_document() -> None:
    ours = shape("gemma-3-270m", vocab_size=GPT2)

    def needed(rows: int, length: int) -> int:
        return reading_bytes(ours, rows, length, torch.bfloat16)

    def passing_through(total: int, length: int) -> str:
        return mega(total - 2 * parameter_count(ours) - cache_bytes(ours, 1, length, AT_ONCE, 2))

    total = needed(1, 1024)
    short, long = passing_through(needed(1, 128), 128), passing_through(total, 1024)
    assert ROWS[IN_MEMORY[3]] == f"{long} for a row of 1,024 tokens in bfloat16, {short} for 128"
    assert ROWS[IN_MEMORY[4]] == f"{mega(total)} for a row of 1,024 tokens in bfloat16"
    if not IS_LONG:
        return
    few, some, many = (needed(rows, 1024) for rows in (16, 32, 64))
    sizes = f"{few / 1e9:.1f}, {some / 1e9:.1f} and {many / 1e9:.1f} GB"
    assert ROWS[IN_MEMORY[7]] == f"{sizes} for rows of 1,024 tokens in bfloat16"


def test_every_figure_of_the_documents_is_on_the_page() -> None:
    folder = real_data("../seeds")
    unit = r"(?:GB|MB|%|×|x|ms|hours|tokens/second|million|billion|[MB] (?:FLOPs|parameters))(?![A-Za-z])"
    claims = set(re.findall(r"\d+(?:\.\d+)?", " ".join(ROWS).replace(",", "")))
    missing, found = set(), 0
    for path in sorted(folder.glob("*.md")):
        text = path.read_text(encoding="utf-8").replace(",", "")
        for first, last in re.findall(rf"(?<![\w.])(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?[ -]?{unit}", text):
            missing |= {number for number in (first, last) if number and number not in claims}
            found += 1
    assert found > 60
    assert not missing
