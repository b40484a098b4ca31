"""`slm quantize`: what it writes, what it measures, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from slmkit.adapt.load import load_model
from slmkit.adapt.quantize import quantized_modules, round_to, to_quantize
from slmkit.adapt.quantized_files import load_quantized, save_quantized
from slmkit.config import UserError
from slmkit.model.files.directory import load_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.workflows import quantize as workflow
from slmkit.workflows.evaluation.evaluate import evaluate
from slmkit.workflows.quantize import RESULTS, Request, greedy, loss, quantize_model, text_rows
from tests.adapt.trained import write_trained
from tests.cli.helpers import refused, slm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained(tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="module")
def made(model: Path) -> list[workflow.Figures]:
    return quantize_model(str(model), Request(["int8", "int4", "nf4"]))


def test_the_figures_are_those_of_the_directories(model: Path, made: list[workflow.Figures]) -> None:
    rows = text_rows("stories", SLMTokenizer.from_pretrained(model), 128)
    assert rows.shape == (80, 128)
    held_out, original = rows[64:], load_decoder(model)[0]
    texts = greedy(original, held_out[:8, :32])
    assert [one.directory for one in made] == [str(model), *(f"{model}-{kind}" for kind in ("int8", "int4", "nf4"))]
    for one in made:
        decoder, _ = load_model(one.directory)
        with torch.no_grad():
            likeliest = decoder.logits(decoder(texts)[:, 31:-1]).argmax(-1)
        assert one.agreement == pytest.approx((likeliest == texts[:, 32:]).double().mean().item(), abs=0.02)
        assert one.perplexity == pytest.approx(math.exp(loss(decoder, held_out)), rel=1e-5)
        assert one.bytes == (Path(one.directory) / "model.safetensors").stat().st_size
        assert one.bits == 8 * one.bytes / sum(parameter.numel() for parameter in original.parameters())
        assert one.tokens_per_second > 1
    assert made[0].agreement == 1
    assert made[0].bits == pytest.approx(32, abs=1)
    assert [quantized_modules(load_model(one.directory)[0]) == {} for one in made] == [True, False, False, False]


def test_fewer_bits_are_smaller_and_lose_little(made: list[workflow.Figures]) -> None:
    full, int8, int4, nf4 = made
    assert full.bytes > 2 * int8.bytes > 2.5 * int4.bytes
    assert abs(int8.perplexity / full.perplexity - 1) < 0.003
    assert int8.agreement > 0.98
    for one in (int4, nf4):
        assert one.method == ("round" if any("GPTQ is worse" in note for note in one.notes) else "gptq")
        assert 0.99 < one.perplexity / full.perplexity < 1.04
        assert one.agreement > 0.8
    assert all(one.notes[0] == "in 16 bits: embedding" for one in made[1:])


def test_the_directory_has_all_that_the_model_had_and_its_figures(model: Path, made: list[workflow.Figures]) -> None:
    for one in made[1:]:
        figures = json.loads((Path(one.directory) / RESULTS).read_text())
        assert [each["directory"] for each in figures] == [str(model), one.directory]
        assert figures[1]["perplexity"] == one.perplexity
        assert (Path(one.directory) / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not [path for path in model.parent.iterdir() if path.name.startswith(".")]


def test_gptq_that_is_worse_after_it_was_saved_and_loaded_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(decoder: torch.nn.Module, chosen: dict, group: int, *_: object) -> None:
        """A calibration that went wrong: scales are twice what they should be."""
        round_to(decoder, chosen, group)
        for module in quantized_modules(decoder).values():
            module.scales *= 2

    monkeypatch.setattr(workflow, "gptq", spoil)
    _, one = quantize_model(str(model), Request(["int4"], output=str(tmp_path / "out")))
    assert one.method == "round"
    assert "GPTQ is worse on held-out text, " in one.notes[-1]
    decoder, shape = load_decoder(model)
    round_to(decoder, to_quantize(decoder, "int4", 32, "bfloat16"), 32)
    save_quantized(decoder, shape, tmp_path / "rounded")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "rounded")]
    assert files[0] == files[1]


def test_the_kept_result_is_never_worse_than_rounding(
    model: Path, made: list[workflow.Figures], tmp_path: Path
) -> None:
    held_out = text_rows("stories", SLMTokenizer.from_pretrained(model), 128)[64:]
    for one, kind, group in ((made[2], "int4", 32), (made[3], "nf4", 64)):
        decoder, shape = load_decoder(model)
        round_to(decoder, to_quantize(decoder, kind, group, "bfloat16"), group)
        save_quantized(decoder, shape, tmp_path / kind)
        assert loss(load_model(one.directory)[0], held_out) <= loss(load_quantized(tmp_path / kind)[0], held_out)


def test_perplexity_is_that_of_a_text_if_one_is_given(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The fox had a red kite. " * 400)
    text = str(tmp_path / "text.txt")
    wanted = Request(["int4"], str(tmp_path / "out"), embedding="int8", method="round", calibration=text, text=text)
    _, one = quantize_model(str(model), wanted)
    source = workflow.SourceSettings(path=text)
    (wanted_result,) = evaluate(tmp_path / "out", text=[source], device="cpu", cache=False)
    assert one.perplexity == wanted_result.score("perplexity").value
    assert one.notes == (
        "nothing in 16 bits but norms", "only slmkit reads it: transformers reads no quantized embedding",
    )  # fmt: skip
    assert load_model(tmp_path / "out")[0].embedding.kind == "int8"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(["int3"]), "--to int3: expected int8, int4, nf4"),
        (Request(["int4"], group=48), "--group 48: expected 32, 64, 128"),
        (Request(["int4"], output="/"), "/: exists already"),
        (Request(["int4", "int8", "int4"]), "--to int4 --to int8 --to int4: give each once"),
        (Request(["int4", "int8"], output="x"), "--output is for one --to"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(request_: Request, words: str, model: Path) -> None:
    before = sorted(model.parent.iterdir())
    with pytest.raises(UserError, match=words):
        quantize_model(str(model), request_)
    assert sorted(model.parent.iterdir()) == before


@pytest.mark.parametrize(("option", "value"), [("--embedding", "int4"), ("--method", "awq")])
def test_the_command_names_the_words_that_it_knows(option: str, value: str, model: Path) -> None:
    assert f"'{value}' is not one of " in refused("quantize", model, "--to", "int4", option, value)


def test_a_model_of_the_hub_gets_a_directory_here() -> None:
    wanted = Request(["int4", "nf4"])
    assert workflow.expect_possible("hf://owner/name", wanted) == [Path("name-int4"), Path("name-nf4")]
    assert workflow.expect_possible("/tmp/", wanted) == [Path("/tmp-int4"), Path("/tmp-nf4")]


def test_too_little_text_and_a_quantized_model_are_refused(
    model: Path, made: list[workflow.Figures], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(UserError, match="11 tokens are too few to calibrate with: give 640"):
        quantize_model(str(model), Request(["int4"], str(tmp_path / "out"), calibration=str(tmp_path / "short.txt")))
    with pytest.raises(UserError, match="its weights are quantized: name the full model that it was made from"):
        quantize_model(made[1].directory, Request(["int4"], str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_the_command_and_those_that_read_its_result(model: Path, tmp_path: Path) -> None:
    done = slm("quantize", model, "--to", "int4", "-o", "small", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert " ".join(lines[0].split()) == "model method MB bits a weight perplexity tokens/s same tokens"
    assert lines[2].startswith("int4, groups of 32")
    assert lines[3:] == [
        "small: in 16 bits: embedding; figures: quantization.json", "next: slm generate small 'Once upon a time'",
    ]  # fmt: skip
    done = slm("generate", "small", "Once", "--seed", "1", "--max-new-tokens", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "text.txt").write_text("The fox had a red kite. " * 40)
    done = slm("eval", "small", "--data", "text.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = slm("inspect", "small", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "small: exists already" in refused("quantize", model, "--to", "int4", "-o", "small", cwd=tmp_path)
    recipe = ("quickstart-stories", "model.path=small", "data.source=text.txt", "tokenizer.path=small")
    done = slm("train", *recipe, cwd=tmp_path)
    assert done.returncode == 2
    assert "small: only an adapter (lora) can be trained on it: its weights are quantized" in done.stderr
