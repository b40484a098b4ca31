"""ONNX: the graph computes what the decoder computes at every length, stores nothing twice, and runs in integers."""

from __future__ import annotations

import collections
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
import onnxruntime

from slmkit.adapt.swapping import linears
from slmkit.config import UserError
from slmkit.export import onnx as exporter
from slmkit.export.compare import Probe, as_stored, bounds_of, compare
from slmkit.export.onnx import CHAT, GRAPH, SCRIPT, OnnxRuntime, prepare, save_graph, write_onnx
from slmkit.export.runtimes import Slmkit, load
from slmkit.model.architectures import Architecture, architecture_of
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.export.random_models import (
    GEMMA,
    GPT2,
    LATENT,
    MODELS,
    SHAPE,
    SLIDING,
    YARN,
    config_of,
    random_decoder,
)  # fmt: skip
from tests.export.small_model import small_config, small_tokenizer
from tests.long import several

CONTEXT = 96
ONE, TWO = {"num_hidden_layers": 1}, {"num_hidden_layers": 2}
# An export takes seconds: between them these models have every choice that any family makes (tested below).
EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2 | ONE),
    "slm, dynamic": (
        "slm",
        SHAPE | TWO | {"qk_norm": "width", "norm_at": "post", "attn_logit_softcapping": 3.0, "no_rope_layers": [1, 0]}
        | {"attention_bias": True, "mlp_bias": True}
        | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 8.0}},
    ),
    "gemma3": ("gemma3_text", GEMMA | ONE | {"layer_types": [SLIDING], "final_logit_softcapping": 5.0}),
    "deepseek": ("deepseek_v3", LATENT | ONE | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
}  # fmt: skip


def architecture(family: str, settings: dict[str, Any]) -> Architecture:
    return architecture_of(config_of(family, settings))


def choices(a: Architecture) -> set[tuple[str, Any]]:
    """What an architecture chooses, its sizes apart."""
    named = ("norm", "norm_at", "qk_norm", "activation", "gated_mlp", "qkv_bias", "out_bias", "mlp_bias", "tied")
    there = ("attention_cap", "logit_cap", "latent", "learned_positions")
    scalings = {type(layer.rope.scaling).__name__ if layer.rope else "no RoPE" for layer in a.layers}
    scalings -= {"NoneType", "Linear", "Llama3"}  # other frequencies in the same graph
    return (
        {(name, getattr(a, name)) for name in named}
        | {(name, bool(getattr(a, name))) for name in there}
        | {("scaled embedding", a.embedding_scale != 1)}
        | {("window", layer.window is not None) for layer in a.layers}
        | {("rope", name) for name in scalings}
    )


def test_every_choice_of_a_family_is_exported_below() -> None:
    exported = set.union(*(choices(architecture(*model)) for model in EXPORTED.values()))
    for name, model in MODELS.items():
        assert choices(architecture(*model)) <= exported, name


# -- equal at every length (E15) --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Path]:
    family, settings = EXPORTED[request.param]
    if settings.get("rope_parameters", {}).get("rope_type") == "dynamic":
        settings = settings | {"max_position_embeddings": CONTEXT // 8}  # the context is 8 times that
    config = config_of(family, {"max_position_embeddings": CONTEXT} | settings)
    path = tmp_path_factory.mktemp("onnx") / GRAPH
    changed = random_decoder(config)
    prepare(changed, "fp32")
    save_graph(changed, path, "fp32")
    return random_decoder(config), path


def session_of(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(
    session: onnxruntime.InferenceSession, ids: np.ndarray, past: list[np.ndarray], mask: np.ndarray | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [batch, new, vocab_size] and present tensors; without `past` what is cached is empty."""
    cached = [one for one in session.get_inputs() if one.name.startswith("past_key_values")]
    past = past or [np.zeros((len(ids), one.shape[1], 0, one.shape[3]), np.float32) for one in cached]
    seen = past[0].shape[2]
    mask = np.ones((len(ids), seen + ids.shape[1]), np.int64) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clip(0)[:, seen:]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs |= dict(zip((one.name for one in cached), past))
    logits, *present = session.run(None, {one.name: inputs[one.name] for one in session.get_inputs()})
    return logits, present


def test_logits_and_caches_equal_the_decoder_at_every_batch_length_and_past(exported: tuple[Decoder, Path]) -> None:
    decoder, path = exported
    session = session_of(path)
    for batch, new, past in itertools.product((1, 2, 5), (1, 2, 17), (0, 1, 64, None)):
        past = CONTEXT - new if past is None else past
        ids = torch.randint(decoder.vocab_size, (batch, past + new), generator=torch.Generator().manual_seed(new))
        cache, held = decoder.new_cache(batch, CONTEXT, CONTEXT), []
        with torch.inference_mode():
            if past:
                decoder(ids[:, :past], cache)
                _, held = run(session, ids[:, :past].numpy(), [])
            expected = decoder.logits(decoder(ids[:, past:], cache))
        logits, present = run(session, ids[:, past:].numpy(), held)
        where = f"batch {batch}, {new} new tokens after {past}"
        assert logits.shape == expected.shape, where
        assert np.abs(logits - expected.numpy()).max() <= 1e-4, where
        parts = [part for layer in zip(cache.keys, cache.values) for part in layer if part.size(-1)]
        assert len(parts) == len(present)
        for ours, theirs in zip(parts, present):
            assert theirs.shape[2] == past + new, where
            assert np.abs(ours[:, :, : past + new].numpy() - theirs).max() <= 1e-4, where


def test_padding_on_the_left_changes_nothing(exported: tuple[Decoder, Path]) -> None:
    """Two texts of different lengths in a batch, read and continued by one token, as each alone."""
    session = session_of(exported[1])
    rng, short, long = np.random.default_rng(3), 5, 30
    texts = [rng.integers(0, 300, (1, count)) for count in (short + 1, long + 1)]
    padded = np.concatenate([np.zeros((1, long - short), np.int64), texts[0]], axis=1)
    together, mask = np.concatenate([padded, texts[1]]), np.ones((2, long + 1), np.int64)
    mask[0, : long - short] = 0
    read, held = run(session, together[:, :-1], [], mask[:, :-1])
    following, _ = run(session, together[:, -1:], held, mask)
    assert np.isfinite(read).all()
    for row, text in enumerate(texts):
        before, kept = run(session, text[:, :-1], [])
        after, _ = run(session, text[:, -1:], kept)
        assert np.abs(read[row, -before.shape[1] :] - before[0]).max() <= 1e-4
        assert np.abs(following[row] - after[0]).max() <= 1e-4


def test_the_graph_is_whole_documented_and_stores_nothing_twice(exported: tuple[Decoder, Path]) -> None:
    decoder, path = exported
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    heads, *dims = decoder.architecture.cached_per_position
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["logits"] == ["batch_size", "sequence_length", decoder.vocab_size]
    for layer, (part, dim) in itertools.product(range(len(decoder.blocks)), zip(("key", "value"), dims)):
        if dim:  # latent attention has no values
            assert shapes[f"past_key_values.{layer}.{part}"] == ["batch_size", heads, "past_sequence_length", dim]
            assert shapes[f"present.{layer}.{part}"] == ["batch_size", heads, "total_sequence_length", dim]
    expect_nothing_twice(graph)
    stored = sum(onnx.numpy_helper.to_array(one).nbytes for one in graph.initializer)
    weights = sum(parameter.numel() for parameter in decoder.parameters()) * 4
    assert weights <= stored <= weights + 4096


def expect_nothing_twice(graph: onnx.GraphProto) -> None:
    contents = [(one.data_type, tuple(one.dims), one.raw_data) for one in graph.initializer]
    values = [onnx.numpy_helper.to_array(one) for one in graph.initializer]
    assert len(set(contents)) == len(contents)
    large = [np.sort(value.flatten()).tobytes() for value in values if value.size >= 64]  # transposed ones too
    assert len(set(large)) == len(large)


# -- a trained model: files, script, integers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A small model that has learned to repeat, and rows [rows, tokens] that it has not seen."""
    config = small_config(num_hidden_layers=1, initializer_range=0.02, hidden_size=80, head_dim=20)
    decoder, generator = build_decoder(config, seed=1), torch.Generator().manual_seed(5)
    follows = torch.randint(config.vocab_size, (config.vocab_size, 4), generator=generator)

    def rows(count: int) -> torch.Tensor:
        ids = [torch.randint(config.vocab_size, (count,), generator=generator)]
        for _ in range(63):  # one of four tokens follows each
            drawn = torch.randint(4, (count,), generator=generator)
            ids.append(follows[ids[-1], torch.minimum(drawn, torch.randint(4, (count,), generator=generator))])
        return torch.stack(ids, dim=1)

    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(150):
        batch = rows(16)
        logits = decoder.logits(decoder(batch[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("trained") / "model"
    save_decoder(decoder, config, directory)
    small_tokenizer().save_pretrained(directory)
    return directory, rows(8)


@pytest.fixture(scope="module")
def folders(trained: tuple[Path, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each kind, written when it is first asked for; int4 as if it were too large for one file."""
    made: dict[str, Path] = {}

    def folder(kind: Any) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exporter, "LARGEST_FILE", 1000 if kind == "int4" else exporter.LARGEST_FILE)
                write_onnx(load(trained[0], made[kind].parent / "whole"), made[kind], kind)
        return made[kind]

    return folder


def reference_of(directory: Path) -> Slmkit:
    from slmkit.adapt.load import load_model

    return Slmkit(load_model(directory)[0], SLMTokenizer.from_pretrained(directory), 1)


def perplexity(log_probs: Callable[[list[int], list[int]], np.ndarray], rows: torch.Tensor) -> float:
    losses = []
    for row in rows.tolist():
        lengths = list(range(1, len(row)))
        losses += [-table[token] for table, token in zip(log_probs(row, lengths), row[1:])]
    return float(np.exp(np.mean(losses)))


# int4 has products in 8 bits too, those of the tied head.
@pytest.mark.parametrize("kind", several(["fp32", "fp16", "int4"], ["fp32", "fp16", "int8", "int4"]))
def test_the_folder_is_the_model_in_onnx_runtime(
    kind: str, trained: tuple[Path, torch.Tensor], folders: Callable[[str], Path]
) -> None:
    reference = reference_of(trained[0])
    probe = Probe.of(reference.decoder, reference.tokenizer, strings=300, conversations=10, count=40)
    with OnnxRuntime(folders(kind)) as runtime:
        parity = compare(reference, runtime, probe, bounds_of(kind))
        assert parity.passed, parity.failures
        assert runtime.size == sum(path.stat().st_size for path in folders(kind).glob("model.onnx*"))
        times = {"fp32": 1.0001, "fp16": 1.001, "int8": 1.01, "int4": 1.08}[kind]
        before = perplexity(reference.log_probs, trained[1])
        assert before < 8  # it has learned: of 400 tokens four follow each
        assert perplexity(runtime.log_probs, trained[1]) <= times * before


@pytest.mark.parametrize("kind", several(["int4"], ["int8", "int4"]))
def test_all_linears_run_in_integers_and_are_stored_once(
    kind: str, trained: tuple[Path, torch.Tensor], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Operations as ONNX Runtime runs them, after its own optimization; sizes as planned (E17)."""
    path, decoder = folders(kind) / GRAPH, reference_of(trained[0]).decoder
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    counts = collections.Counter(node.op_type for node in graph.node)
    assert counts["MatMulNBits"] == len(linears(decoder)) + 1  # with the tied head
    assert counts["GatherBlockQuantized"] == 1
    assert not counts["DequantizeLinear"] + counts["Gemm"]
    floats = {one.name for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
    products = [node for node in graph.node if node.op_type in ("MatMul", "FusedMatMul")]
    assert len(products) == 2 * len(decoder.blocks)  # of attention: queries and keys, weights and values
    assert not any(name in floats for node in products for name in node.input)
    expect_nothing_twice(onnx.load(path).graph)
    bits = {"int8": 8, "int4": 4}[kind]
    planned = 0
    for name, parameter in decoder.named_parameters():
        blocks = -(-parameter.size(-1) // 32)
        size = 8 if name == "embedding.weight" else bits
        planned += 4 * parameter.numel() if parameter.dim() == 1 else parameter.size(0) * blocks * (32 * size // 8 + 4)
    stored = sum(onnx.numpy_helper.to_array(one).nbytes for one in onnx.load(path).graph.initializer)
    assert planned <= stored <= 1.01 * planned
    said = session.get_modelmeta().custom_metadata_map
    assert (said["slmkit.kind"], said["slmkit.accuracy_level"]) == (kind, str(exporter.ACCURACY_LEVEL))
    levels = {a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {exporter.ACCURACY_LEVEL}


def test_one_wrong_group_of_integers_is_named(
    trained: tuple[Path, torch.Tensor], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each matrix of the graph is the model's, rounded; of 80 columns the last group has 16. int4 has both kinds."""
    loaded, folder = load(trained[0], tmp_path / "whole"), Path(shutil.copytree(folders("int4"), tmp_path / "int4"))
    matrices = [*OnnxRuntime(folder).stored(loaded)]
    assert {one.type for one in matrices} == {"int4", "int8"}
    assert len(matrices) == len(linears(loaded.decoder)) + 1
    rounded = as_stored(matrices, loaded)
    weights = [one.blocks[0].mlp.up.weight for one in (loaded.decoder, rounded)]
    assert 0 < (weights[0] - weights[1]).abs().max() < 0.2 * weights[0].abs().max()
    for name in ("decoder.embedding.", "decoder.blocks.0.mlp.up."):
        model = onnx.load(folder / GRAPH)
        (scales,) = (one for one in model.graph.initializer if one.name == f"{name}scales")
        values = onnx.numpy_helper.to_array(scales).copy()
        values.reshape(-1)[5] *= 1.5
        scales.CopyFrom(onnx.numpy_helper.from_array(values, scales.name))
        (tmp_path / name).mkdir()
        onnx.save(model, tmp_path / name / GRAPH)
        runtime = object.__new__(OnnxRuntime)  # only its file is read
        runtime.folder = tmp_path / name
        with pytest.raises(UserError, match=f"{name} in int. has other weights than the model"):
            as_stored(runtime.stored(loaded), loaded)


def generate(folder: Path, *words: str) -> str:
    """What the script prints, in a process that has no slmkit, torch or Jinja."""
    alone = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0]); "
        "assert not {'torch', 'slmkit', 'jinja2', 'transformers', 'onnx'} & sys.modules.keys()"
    )
    command = [sys.executable, "-I", "-c", alone, str(folder / SCRIPT), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder.parent, timeout=120)
    return done.stdout.removesuffix("\n")


def test_the_script_generates_alone_and_every_end_token_stops_it(
    trained: tuple[Path, torch.Tensor], folders: Callable[[str], Path]
) -> None:
    folder, tokenizer = folders("fp32"), SLMTokenizer.from_pretrained(trained[0])
    assert len([*filter(None, (folder / SCRIPT).read_text().splitlines())]) <= 40
    stops = json.loads((folder / "generation_config.json").read_text())

    def whole_characters(ids: list[int]) -> str:
        return tokenizer.decode(ids).rstrip("\ufffd")

    assert stops["eos_token_id"] == sorted(tokenizer.stop_token_ids)
    with OnnxRuntime(folder) as runtime:
        prompt = "The fox"
        expected = runtime.greedy(tokenizer.encode_prompt(prompt), 20)
        asked = [{"role": "user", "content": "Who? <b>"}]
        answer = runtime.greedy(tokenizer.encode_chat_prompt(asked), 20)
    assert not {*expected, *answer} & tokenizer.stop_token_ids
    assert generate(folder, prompt, "--max-new-tokens", "20") == whole_characters(expected)
    assert generate(folder, "--chat", "Who? <b>", "--max-new-tokens", "20") == whole_characters(answer)
    for place in (0, 7):
        (folder / "generation_config.json").write_text(json.dumps(stops | {"eos_token_id": [1, expected[place]]}))
        first = expected.index(expected[place])
        assert generate(folder, prompt, "--max-new-tokens", "20") == whole_characters(expected[:first])
    (folder / "generation_config.json").write_text(json.dumps(stops))
    full = generate(folder, prompt, "--max-new-tokens", "1000", "--temperature", "0.7")
    assert len(tokenizer.encode(full)) > 20  # ends with the context
    (folder / CHAT).rename(folder / "elsewhere")
    for words, refusal in ((["--chat", "Hi"], "no chat template"), (["fox " * 500], "more than the context of")):
        with pytest.raises(subprocess.CalledProcessError) as refused:
            generate(folder, *words)
        assert refused.value.returncode == 2
        assert refusal in refused.value.stderr
        assert "Traceback" not in refused.value.stderr
    (folder / "elsewhere").rename(folder / CHAT)


# -- what is refused (E9, E13) ----------------------------------------------------------------------------------------


@pytest.fixture
def without_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "save_graph", lambda *arguments: None)


@pytest.mark.usefixtures("without_the_graph")
def test_all_ends_of_config_and_tokenizer_are_in_the_folder(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory = changed_copy(trained[0], tmp_path, lambda state: state)
    (directory / "generation_config.json").write_text('{"eos_token_id": [17, 19]}')
    write_onnx(load(directory, tmp_path / "whole"), made_in(tmp_path), "fp32")
    tokenizer = SLMTokenizer.from_pretrained(directory)
    written = json.loads((tmp_path / "folder" / "generation_config.json").read_text())["eos_token_id"]
    assert {17, 19, tokenizer.eos_token_id, tokenizer.end_of_turn_id} <= set(written)


def changed_copy(source: Path, tmp_path: Path, change: Callable[[dict], Any]) -> Path:
    directory = tmp_path / "changed"
    shutil.copytree(source, directory)
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def made_in(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


@pytest.mark.usefixtures("without_the_graph")
@pytest.mark.parametrize(
    ("value", "kind", "problem"),
    [
        (7e4, "fp16", "mlp.gate.weight.*float16.*not finite"),
        (float("nan"), "fp32", "not finite"),
        (float("inf"), "int8", "not finite"),
        (7e4, "fp32", None),
        (1e-9, "fp16", None),
    ],
)
def test_weights_beyond_a_type_are_refused_by_name(
    value: float, kind: Any, problem: str | None, trained: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.mlp.gate_proj.weight"][3, 5] = value

    directory = changed_copy(trained[0], tmp_path, change)
    if problem is None:
        write_onnx(load(directory, tmp_path / "whole"), made_in(tmp_path), kind)
    else:
        with pytest.raises(UserError, match=problem):
            write_onnx(load(directory, tmp_path / "whole"), made_in(tmp_path), kind)


@pytest.mark.usefixtures("without_the_graph")
def test_ids_without_a_row_are_named(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory = changed_copy(trained[0], tmp_path, lambda state: state)
    SLMTokenizer.from_pretrained(directory).extended(additional_special_tokens=["<a>", "<b>"]).save_pretrained(
        directory
    )
    with pytest.raises(UserError, match="no rows for the tokenizer's ids 400 to 401"):
        write_onnx(load(directory, tmp_path / "whole"), made_in(tmp_path), "fp32")


@pytest.mark.usefixtures("without_the_graph")
def test_activations_beyond_float16_are_refused(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """Weights that float16 holds, whose products it does not."""

    def change(state: dict[str, torch.Tensor]) -> None:
        for part, value in (("up", 3e3), ("gate", 3e3), ("down", 1.0)):
            state[f"model.layers.0.mlp.{part}_proj.weight"] *= value

    with pytest.raises(UserError, match="hidden states are beyond float16's 65,504"):
        write_onnx(load(changed_copy(trained[0], tmp_path, change), tmp_path / "whole"), made_in(tmp_path), "fp16")


def test_large_weights_are_in_a_second_file_of_a_plain_name(folders: Callable[[str], Path]) -> None:
    graph = onnx.load(folders("int4") / GRAPH, load_external_data=False).graph
    places = {entry.value for one in graph.initializer for entry in one.external_data if entry.key == "location"}
    assert places == {"model.onnx.data"}
    assert (folders("int4") / "model.onnx.data").is_file()


def test_a_damaged_file_is_one_line(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made_in(tmp_path)
    for path in folders("fp32").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[: len(content) // 2] if path.name == GRAPH else content)
    with pytest.raises(UserError, match=r"model.onnx: ONNX Runtime refuses it: [^\n]+$"):
        OnnxRuntime(folder)
