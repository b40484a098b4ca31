"""`slm bench decode`, and the benchmark beside its peers, on tiny models. No test looks at the clock."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import decode as benchmark
from benchmarks import gpu
from slmkit.adapt.quantize import round_to, to_quantize
from slmkit.adapt.quantized_files import save_quantized
from slmkit.cli.bench import decode
from slmkit.config import UserError
from slmkit.device import find_device, seconds_to_read
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.workflows import bench
from slmkit.workflows.bench import bytes_of_a_step
from tests.cli.helpers import slm

TINY = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 640,
}  # fmt: skip
MATRICES = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # of the layers
NORMS = 5 * 64


def rows_of(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()[1:]]


def test_the_command_measures_each_batch_with_the_weights_as_they_are_and_in_8_and_4_bits():
    done = slm("bench", "decode", "quickstart", "--prompt", "8", "--new", "4", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    expected = [[weights, batch] for weights in ("float32", "int8", "int4") for batch in ("1", "4", "16")]
    assert [row[:3] for row in rows] == [["quickstart", *each] for each in expected]
    assert all(float(figure.replace(",", "")) > 0 for row in rows for figure in row[3:6])
    limits = [float(row[5].replace(",", "")) for row in rows]
    assert limits[1] == pytest.approx(4 * limits[0], rel=0.01), "a step reads the weights once, whatever the batch"


def test_a_quantized_model_is_measured_as_it_is(tmp_path: Path):
    config = SLMConfig(**TINY)
    decoder = build_decoder(config, seed=0)
    round_to(decoder, to_quantize(decoder, "int4", 32, "bfloat16"), 32)
    save_quantized(decoder, config, tmp_path / "small")
    done = slm("bench", "decode", str(tmp_path / "small"), "--prompt", "4", "--new", "2", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert [row[1:3] for row in rows_of(done.stdout)] == [["int4", batch] for batch in ("1", "4", "16")]


def test_a_model_that_has_no_groups_of_columns_is_measured_as_it_is_and_the_next_one_whole(tmp_path: Path):
    config = SLMConfig(**{**TINY, "hidden_size": 48, "intermediate_size": 80})
    save_decoder(build_decoder(config, seed=0), config, tmp_path / "a-narrow-model")
    done = slm(
        "bench", "decode", "a-narrow-model", "quickstart", "--prompt", "4", "--new", "2", "--rounds", "1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert [row[1] for row in rows_of(done.stdout)] == ["float32"] * 6 + ["int8"] * 3 + ["int4"] * 3
    header, *lines = done.stdout.splitlines()
    assert all(line[header.index("weights") :].startswith(("float32 ", "int8 ", "int4 ")) for line in lines)
    assert done.stderr.splitlines() == [
        f"a-narrow-model: not measured in {weights}: no matrix has columns in groups of 32"
        for weights in ("int8", "int4")
    ]


def test_a_row_is_printed_as_soon_as_it_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    printed = []

    def measured(*_: object) -> Iterator[bench.DecodingSpeed]:
        for batch in (1, 4):
            yield bench.DecodingSpeed("int8", batch, 10.0, 5.0, limit=10.0)
            printed.append(capsys.readouterr().out.split())

    monkeypatch.setattr(bench, "decoding_speed", measured)
    decode(["tiny"])
    header = ["model", "weights", "batch", "prompt", "tokens/s", "new", "tokens/s", "limit", "reached"]
    assert printed == [
        [*header, "tiny", "int8", str(batch), "10", "5.0", "10", "50%"][-7 if batch > 1 else 0 :] for batch in (1, 4)
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_every_matrix_once_and_looks_up_rows_of_an_embedding_that_is_no_head(tied: bool):
    decoder = build_decoder(SLMConfig(**TINY, tie_word_embeddings=tied), seed=0)
    rotary = sum(buffer.nbytes for buffer in decoder.rotary.buffers())
    assert bytes_of_a_step(decoder) == 4 * (MATRICES + NORMS + 384 * 64) + rotary
    round_to(decoder, to_quantize(decoder, "int8", 32, "int8"), 32)
    assert bytes_of_a_step(decoder) == (MATRICES + 384 * 64) * (1 + 4 / 32) + 4 * NORMS + rotary


def test_reading_more_memory_takes_longer():  # 2,048 times as much
    device = find_device("cpu")
    assert 0 < seconds_to_read(2**16, device) < seconds_to_read(2**27, device)


def test_slmkit_transformers_and_llama_cpp_write_the_same_tokens(tmp_path: Path):
    config = SLMConfig(**TINY)
    decoder = benchmark.scaled_decoder(config)
    save_decoder(decoder, config, tmp_path)
    names = ["slmkit float32", "transformers float32 dynamic", "transformers float32 static", "llama.cpp F32"]
    peers = {name: benchmark.open_peer(name, tmp_path, sequences=8, length=64) for name in names}
    assert list(benchmark.expect_same_tokens(decoder, peers)) == names
    other = benchmark.by_slmkit(build_decoder(config, seed=1).eval())
    with pytest.raises(ValueError, match="float32: token 0 of row 0"):
        benchmark.expect_same_tokens(decoder, {"float32": other})


@pytest.mark.parametrize(("ours", "theirs"), benchmark.BITS.items())
def test_both_quantize_the_same_weights_and_stay_near_them(tmp_path: Path, ours: str, theirs: str):
    """The first token after a prompt is that of the full weights mostly; by chance it would be one of 384."""
    config = SLMConfig(**TINY)
    decoder = benchmark.scaled_decoder(config)
    save_decoder(decoder, config, tmp_path)
    ids = benchmark.prompts(384, 16, 8)
    expected = benchmark.by_slmkit(decoder)(ids, 1)
    for name in (f"slmkit {ours}", f"llama.cpp {theirs}"):
        said = benchmark.open_peer(name, tmp_path, sequences=16, length=64)(ids, 1)
        assert sum(a == b for a, b in zip(said, expected)) >= (6 if ours == "int4" else 14), name


def test_the_benchmark_yields_rates_ratios_and_growth_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "LLAMA_46M", TINY)
    monkeypatch.setattr(benchmark, "PREFILL", 64)
    monkeypatch.setattr(benchmark, "GROWTH", {"context": (8, 64), "batch": (1, 2)})
    only = ["slmkit float32", "transformers float32 dynamic", "llama.cpp F32"]
    arguments = argparse.Namespace(quick=False, new=2, rounds=2, only=only, profile=False)
    *_, result = benchmark.measure(arguments, tmp_path)
    rates = result["tokens_per_second"]
    assert list(rates) == ["batch 1", "batch 4", "batch 16", "prefill"]
    assert all(list(of) == only and all(rate["least"] > 0 for rate in of.values()) for of in rates.values())
    assert {name.split(": ", 1)[0] for name in result["ratios"]} == {*rates, "batch 16 / batch 1"}
    assert {what: list(curve) for what, curve in result["growth"].items()} == {
        "context": ["8", "64"],
        "batch": ["1", "2"],
    }
    assert result["limit_of_memory"].keys() == {"slmkit float32", "transformers float32", "llama.cpp F32"}
    benchmark.print_figures(result)
    benchmark.draw(json.loads(json.dumps(result)), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_of_one_round_each():
    figures = {
        "batch 1": {"slmkit int8": [10.0, 20.0, 40.0], "llama.cpp Q8_0": [5.0, 40.0, 10.0]},
        "batch 16": {"slmkit int8": [100.0, 100.0, 100.0], "llama.cpp Q8_0": [50.0]},
    }
    found = benchmark.ratios(figures)
    assert found["batch 1: slmkit int8 / llama.cpp Q8_0"] == {"median": 2.0, "least": 0.5, "most": 4.0}
    assert found["batch 16: slmkit int8 / llama.cpp Q8_0"]["median"] == 2.0
    assert found["batch 16 / batch 1: slmkit int8"] == {"median": 5.0, "least": 2.5, "most": 10.0}


def test_decoding_on_a_gpu_is_refused_elsewhere_and_its_smoke_test_runs_anywhere(monkeypatch: pytest.MonkeyPatch):
    found = gpu.decoding(smoke=True)
    assert found["read_terabytes_per_second"] > 0
    assert found["batch 16"]["tokens_per_second"]["transformers"]["median"] > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="measured on a CUDA device"):
        gpu.decoding(smoke=False)
