"""GGUF files in llama.cpp: the log-probabilities of every family, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, quants

from slmkit.config import UserError
from slmkit.export import gguf as export_gguf
from slmkit.export import gguf_types
from slmkit.export.compare import EXACT, Probe, compare
from slmkit.export.gguf import (
    Loader,
    interleaved,
    plan_tensors,
    rope_of_file,
    settings_of,
    summary,
    tensors_of,
    write_gguf,
)
from slmkit.export.gguf_types import K_QUANTS, KINDS, PlannedTensor, encoded, k_quantizer
from slmkit.export.llama_cpp import LlamaCpp
from slmkit.export.runtimes import Slmkit
from slmkit.model.architectures import Architecture
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from tests.export.random_models import (
    CONTEXT,
    FULL,
    GEMMA,
    GEMMA2,
    LATENT,
    LINEAR,
    LLAMA3,
    MODELS,
    PLAIN,
    SHAPE,
    SLIDING,
    TOKENS,
    WHOLE_HEADS,
    WINDOW,
    YARN,
    config_of,
    tokenizer,
    write_model,
)

LENGTHS = [1, 30, 200, CONTEXT - 1]  # past the window, and past the original context
IDS = torch.randint(TOKENS, (CONTEXT,), generator=torch.Generator().manual_seed(5))
LARGEST = 1e-3  # difference of a log-probability


def gelu_by_table(x: Tensor) -> Tensor:
    """GELU as llama.cpp computes it between -10 and 10: looked up by float16 in a table of float16.  [...] → same"""
    looked_up = F.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0, torch.where(x >= 10, x, looked_up))


@torch.no_grad()
def log_probs(model: Any) -> Tensor:
    """[lengths, vocab_size] of one of ours or of transformers."""
    logits = model.logits(model(IDS[None])) if isinstance(model, Decoder) else model(IDS[None], use_cache=False).logits
    return logits[0].log_softmax(-1)[[length - 1 for length in LENGTHS]]


def expected_log_probs(decoder: Decoder) -> Tensor:
    """[lengths, vocab_size], with llama.cpp's GELU."""
    if "gelu" in decoder.architecture.activation:
        for block in decoder.blocks:
            block.mlp.activation = gelu_by_table
    return log_probs(decoder)


def difference(path: Path, expected: Tensor) -> float:
    with LlamaCpp(path, CONTEXT) as llama_cpp:
        return float((torch.from_numpy(llama_cpp.log_probs(IDS.tolist(), LENGTHS)) - expected).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_every_family_gives_the_same_log_probabilities_in_llama_cpp(tmp_path: Path, name: str) -> None:
    decoder = write_model(tmp_path, config_of(*MODELS[name]))
    write_gguf(tmp_path, tmp_path / "model.gguf", "F32")
    if MODELS[name][0] != "slm":
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (log_probs(theirs) - log_probs(decoder)).abs().max() < LARGEST
    assert difference(tmp_path / "model.gguf", expected_log_probs(decoder)) < LARGEST


def test_the_comparison_knows_of_llama_cpp_s_tables_of_gelu(tmp_path: Path) -> None:
    decoder = write_model(tmp_path, config_of("gemma3_text", GEMMA | {"vocab_size": TOKENS}), scale=1.0)
    write_gguf(tmp_path, tmp_path / "model.gguf", "F32")
    probe = Probe.of(decoder, tokenizer(), strings=5, conversations=2, count=8)
    with LlamaCpp(tmp_path / "model.gguf", probe.context) as llama_cpp:
        parity = compare(Slmkit(decoder, tokenizer(), 0), llama_cpp, probe, EXACT)
    assert parity.failures == []
    assert parity.bounds.log_prob == LlamaCpp.gelu_error


def keys_as_one_head(rows: Tensor, heads: int, dim: int) -> Tensor:
    return interleaved(rows, heads, dim) if heads != 2 else interleaved(rows, 1, rows.size(0))


def unscaled(a: Architecture, loader: Loader) -> tuple[dict[str, Any], None]:
    return {key: value for key, value in rope_of_file(a, loader)[0].items() if "scaling" not in key}, None


def without_offset(config: SLMConfig, a: Architecture, loader: Loader) -> Iterator[PlannedTensor]:
    for planned in tensors_of(config, a, loader):
        yield replace(planned, change=lambda tensor: tensor) if "norm" in planned.name else planned


def one_more_in_the_window(a: Architecture, loader: Loader) -> dict[str, Any]:
    return settings_of(a, loader) | {"attention.sliding_window": WINDOW + 1}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama, tied, yarn", {"interleaved": keys_as_one_head}),
        ("smollm3", {"interleaved": lambda rows, heads, dim: rows}),
        ("llama, llama3", {"rope_of_file": unscaled}),
        ("gemma3, linear", {"rope_of_file": unscaled}),
        ("gemma2, yarn", {"tensors_of": without_offset}),
        ("olmo3, yarn", {"settings_of": one_more_in_the_window}),
    ],
)
def test_a_wrong_conversion_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: dict[str, Any]
) -> None:
    decoder = write_model(tmp_path, config_of(*MODELS[name]))
    for function, replacement in wrong.items():
        monkeypatch.setattr(export_gguf, function, replacement)
    write_gguf(tmp_path, tmp_path / "model.gguf", "F32")
    assert difference(tmp_path / "model.gguf", expected_log_probs(decoder)) > 100 * LARGEST


def file_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a GGUF file, and its tensors by name."""
    reader = GGUFReader(path)
    settings = {name: one.contents() for name, one in reader.fields.items()}
    return settings, {tensor.name: tensor for tensor in reader.tensors}


# -- what llama.cpp cannot hold ---------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {  # → the field that the error names, before a blank
    "hidden_act gpt2": ("gpt2", {"hidden_act": "gelu"}),
    "hidden_act llama": ("llama", SHAPE | {"hidden_act": "relu2"}),
    "hidden_act gemma": ("gemma3_text", GEMMA | {"hidden_act": "silu"}),
    "rope_parameters dynamic": ("llama", SHAPE | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "rope_parameters llama3": ("qwen3", SHAPE | {"rope_parameters": LLAMA3}),
    "rope_parameters ramp": ("smollm3", SHAPE | {"rope_parameters": YARN | {"beta_fast": 16.0}}),
    "rope_parameters linear": ("deepseek_v3", LATENT | {"rope_parameters": LINEAR}),
    "rope_parameters scaled windows": ("gemma3_text", GEMMA | {"rope_parameters": {FULL: LINEAR, SLIDING: LINEAR}}),
    "rope_parameters another base": (
        "olmo3",
        WHOLE_HEADS
        | {"sliding_window": 20, "layer_types": [FULL, SLIDING, SLIDING]}
        | {"rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 5.0}}},
    ),
    "sliding_window mistral": ("mistral", SHAPE | {"sliding_window": CONTEXT - 1}),
    "sliding_window qwen2": ("qwen2", WHOLE_HEADS | {"sliding_window": 20, "layer_types": [FULL, SLIDING, FULL]}),
    "sliding_window slm": ("slm", SHAPE | {"sliding_window": 20}),
    "attention_bias qwen3": ("qwen3", SHAPE | {"attention_bias": True}),
    "attention_bias olmo2": ("olmo2", WHOLE_HEADS | {"attention_bias": True}),
    "attention_bias gemma2": ("gemma2", GEMMA2 | {"attention_bias": True}),
    "attention_bias deepseek": ("deepseek_v3", LATENT | {"attention_bias": True}),
    "mlp_bias smollm3": ("smollm3", SHAPE | {"mlp_bias": True}),
    "no_rope_layers smollm3": ("smollm3", SHAPE | {"no_rope_layers": [1, 0, 1]}),
    "no_rope_layers slm": ("slm", SHAPE | {"no_rope_layers": [1, 1, 0]}),
    "head_dim qwen2": ("qwen2", SHAPE),
    "head_dim olmo3": ("olmo3", SHAPE | {"sliding_window": 20}),
    "query_pre_attn_scalar gemma2": ("gemma2", GEMMA2 | {"query_pre_attn_scalar": 17}),
    "query_pre_attn_scalar deep": ("gemma3_text", GEMMA | {"num_hidden_layers": 62}),
    "attn_logit_softcapping gemma2": ("gemma2", GEMMA2 | {"attn_logit_softcapping": None}),
    "final_logit_softcapping gemma2": ("gemma2", GEMMA2 | {"final_logit_softcapping": None}),
    "final_logit_softcapping slm": ("slm", SHAPE | {"final_logit_softcapping": 5.0}),
    "tie_word_embeddings gemma2": ("gemma2", GEMMA2 | {"tie_word_embeddings": False}),
    "rms_norm_eps deepseek": ("deepseek_v3", LATENT | {"rms_norm_eps": 1e-5}),
    "q_lora_rank deepseek": ("deepseek_v3", LATENT | {"num_hidden_layers": 27}),
    "norm slm": ("slm", SHAPE | {"norm": "layer"}),
    "norm_at slm": ("slm", SHAPE | {"norm_at": "both"}),
    "qk_norm slm": ("slm", SHAPE | {"qk_norm": "head"}),
    "gated_mlp slm": ("slm", SHAPE | {"gated_mlp": False}),
    "num_hidden_layers llama": ("llama", SHAPE | {"num_hidden_layers": 513}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_decoder_of_llama_cpp_does_not_compute_is_refused_by_the_name_of_its_field(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name.split()[0]}\b.*llama\.cpp's ") as error:
        plan_tensors(config_of(*REFUSED[name]), "F32")
    assert "\n" not in str(error.value)


# -- RoPE's base in both spellings (E3) -------------------------------------------------------------------------------


def test_both_spellings_of_rope_make_the_same_file_and_two_bases_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "both", config_of("llama", SHAPE | {"rope_parameters": PLAIN | {"rope_theta": 1e6}}))
    content = json.loads((tmp_path / "both" / "config.json").read_text())
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 1e6
    contents = {
        "both": content,
        "older": {key: value for key, value in content.items() if key != "rope_parameters"},
        "newer": {key: value for key, value in content.items() if key not in ("rope_theta", "rope_scaling")},
        "disagree": content | {"rope_theta": 10_000.0},
    }
    for name, one in contents.items():
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        for path in (tmp_path / "both").iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        (directory / "config.json").write_text(json.dumps(one))
    for name in ("both", "older", "newer"):
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "F32")
    assert len({(tmp_path / f"{name}.gguf").read_bytes() for name in ("both", "older", "newer")}) == 1
    assert file_of(tmp_path / "both.gguf")[0]["llama.rope.freq_base"] == 1e6
    with pytest.raises(UserError, match="rope_theta is 1000000.0 in rope_parameters and 10000.0 in the older"):
        write_gguf(tmp_path / "disagree", tmp_path / "disagree.gguf", "F32")


# -- types ------------------------------------------------------------------------------------------------------------

OPEN_EACH = """
import sys, xllamacpp
for path in sys.argv[1:]:
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup, settings.verbosity = path, 64, False, 0
    settings.n_parallel = settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    answer = xllamacpp.Server(settings).handle_completions({"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 4, (path, answer)
    print(path)
"""
BLOCKS_OF_32 = [kind for kind in KINDS if "_K" not in kind]
GRID = {  # widths of the model and its MLP → kinds
    (64, 172): [*BLOCKS_OF_32, "Q4_K_M"],
    (288, 768): [*BLOCKS_OF_32, "Q6_K"],
    (384, 1536): [*BLOCKS_OF_32, "Q2_K"],
    (256, 512): [kind for kind in KINDS if "_K" in kind],
}


def test_llama_cpp_opens_every_kind_and_its_size_is_as_planned(tmp_path: Path) -> None:
    paths = []
    for (hidden, inner), kinds in GRID.items():
        shape = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 4, "num_hidden_layers": 2}
        write_model(tmp_path, config_of("llama", shape))
        for kind in kinds:
            paths.append(tmp_path / f"{hidden}-{kind}.gguf")
            plan = write_gguf(tmp_path, paths[-1], kind, allow_fallback=True)
            settings, tensors = file_of(paths[-1])
            assert [(one.name, one.type, one.bytes) for one in plan] == [
                (tensor.name, tensor.tensor_type.name, tensor.n_bytes) for tensor in tensors.values()
            ]
            first, *_ = tensors.values()
            assert paths[-1].stat().st_size == first.data_offset + sum(one.bytes + -one.bytes % 32 for one in plan)
            weights = {one.type: sum(other.weights for other in plan if other.type == one.type) for one in plan}
            most = LlamaFileType(settings["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
            assert most.startswith(max(weights, key=lambda one: weights[one]))
    done = subprocess.run([sys.executable, "-c", OPEN_EACH, *paths], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-2_000:])
    assert done.stdout.splitlines() == [str(path) for path in paths]


def test_rows_that_do_not_divide_are_told_and_refused_above_a_quarter_of_the_weights() -> None:
    config = SLMConfig(hidden_size=256, intermediate_size=172, num_attention_heads=4, num_hidden_layers=2)
    plan = {one.name: one for one in plan_tensors(config, "Q8_0")}
    down = plan["blk.0.ffn_down.weight"]
    assert (down.shape, down.type, down.bytes) == ((256, 172), "F16", 256 * 172 * 2)
    assert down.reason == "172 columns are no multiple of 32 → F16"
    assert plan["blk.0.ffn_up.weight"].type == "Q8_0"
    assert plan["blk.0.ffn_norm.weight"].type == "F32"
    assert re.match(rf"Q8_0 9[0-9.]+%, F16 1\.\d%, .*{down.reason}", summary(list(plan.values())))
    narrow = config.model_copy(update={"hidden_size": 384, "head_dim": 96})
    with pytest.raises(UserError, match="100% of the weights cannot have it.*384 columns are no multiple of 256"):
        plan_tensors(narrow, "Q4_K_M")
    assert {one.type for one in plan_tensors(narrow, "Q4_K_M", allow_fallback=True)} == {"F16", "F32"}
    with pytest.raises(UserError, match="--type Q4_K: did you mean 'Q4_K_"):
        plan_tensors(config, "Q4_K")


def test_mixtures_keep_the_head_and_some_layers_in_finer_types() -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 16}
    tied = {one.name: one.type for one in plan_tensors(SLMConfig(**shape), "Q4_K_M")}
    untied = {one.name: one.type for one in plan_tensors(SLMConfig(**shape, tie_word_embeddings=False), "Q4_K_M")}
    assert (tied["token_embd.weight"], untied["token_embd.weight"], untied["output.weight"]) == ("Q6_K", "Q4_K", "Q6_K")
    for name in ("attn_v", "ffn_down"):
        finer = [layer for layer in range(16) if tied[f"blk.{layer}.{name}.weight"] == "Q6_K"]
        assert finer == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {tied[f"blk.{layer}.attn_k.weight"] for layer in range(16)} == {"Q4_K"}


@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_encodes_byte_for_byte_as_ggml(type_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(K_QUANTS, type_, 0.2)
    weights = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    k_quantizer.cache_clear()
    by_ggml = k_quantizer(type_)(weights.numpy())
    assert np.array_equal(quants.quantize(weights.numpy(), GGMLQuantizationType[type_]), by_ggml)


@pytest.mark.parametrize("type_", K_QUANTS)
def test_k_quants_are_near_the_weights_in_every_row(type_: str) -> None:
    weights = torch.randn(gguf_types.ROWS + 3, 512, generator=torch.Generator().manual_seed(0))
    found, underflows = encoded(PlannedTensor("x", (weights.size(0), 512), type_), weights)
    error = torch.from_numpy(quants.dequantize(found, GGMLQuantizationType[type_])) - weights
    assert underflows == 0
    assert (error.square().mean(1).sqrt() < K_QUANTS[type_]).all()


def test_a_k_quant_that_gguf_and_ggml_read_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    k_quantizer.cache_clear()
    dequantize = quants.dequantize
    monkeypatch.setattr(quants, "dequantize", lambda data, type_: dequantize(data, type_) * np.float32(1.0001))
    with pytest.raises(UserError, match="Q6_K: gguf and the ggml of xllamacpp disagree"):
        k_quantizer("Q6_K")


# -- numbers that a type cannot hold (E13) ----------------------------------------------------------------------------

BROKEN = "model.layers.1.mlp.down_proj.weight"


def with_weight(directory: Path, weight: float) -> Path:
    """A model in bfloat16 with one weight set."""
    write_model(directory, config_of("llama", SHAPE | {"intermediate_size": 64}), scale=1.0)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors[BROKEN][3, 5] = weight
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_weight_beyond_float16_is_refused_by_name_and_kept_in_other_types(tmp_path: Path) -> None:
    model = with_weight(tmp_path, 7e4)
    for kind in ("F16", "Q8_0"):
        with pytest.raises(UserError, match=rf"^'{BROKEN}' has a weight of 7.*beyond the 65,504 of float16: use BF16$"):
            write_gguf(model, tmp_path / "x.gguf", kind, allow_fallback=True)
    for kind in ("F32", "BF16"):
        write_gguf(model, tmp_path / "x.gguf", kind)
        tensor = file_of(tmp_path / "x.gguf")[1]["blk.1.ffn_down.weight"]
        assert quants.dequantize(tensor.data, tensor.tensor_type)[3, 5] == torch.tensor(7e4).bfloat16()


def test_weights_that_float16_makes_zero_are_counted(tmp_path: Path) -> None:
    plan = write_gguf(with_weight(tmp_path, 1e-9), tmp_path / "x.gguf", "F16")
    assert {one.name: one.underflows for one in plan if one.underflows} == {"blk.1.ffn_down.weight": 1}


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_in_every_type(tmp_path: Path, weight: float) -> None:
    model = with_weight(tmp_path, weight)
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        with pytest.raises(UserError, match=f"'{BROKEN}' has numbers that are not finite"):
            write_gguf(model, tmp_path / "x.gguf", kind, allow_fallback=True)


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    for family, settings, heads in (("llama", SHAPE, 1), ("olmo2", WHOLE_HEADS, 2)):
        names = [one.name for one in plan_tensors(config_of(family, settings | {"tie_word_embeddings": True}), "F32")]
        assert sum(name in ("token_embd.weight", "output.weight") for name in names) == heads
