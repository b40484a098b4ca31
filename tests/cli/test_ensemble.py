"""`--with` averages several models, where text is generated and in a chat."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmkit.generation.ensemble import Ensemble
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import load_decoder, save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from tests.cli.helpers import refused, slm
from tests.generation.helpers import complete

TEXT = "the fox had a kite and the owl had a drum and the hen had a hat "


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three untrained models a, b and c in a folder; c has a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, text) in enumerate((("a", TEXT), ("b", TEXT), ("c", TEXT[::-1]))):
        tokenizer = SLMTokenizer(270)
        tokenizer.train([text] * 20)
        config = SLMConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128, initializer_range=0.3,
        )  # fmt: skip
        save_decoder(build_decoder(config, seed), config, folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_text_is_the_ensembles(models: Path) -> None:
    done = slm("generate", "a", "the fox", "--with", "b", "--temperature", "0", "--max-new-tokens", "30", cwd=models)
    assert done.returncode == 0, done.stderr
    decoders = [load_decoder(models / name)[0] for name in "ab"]
    said = [
        complete(
            model, SLMTokenizer.from_pretrained(models / "a"), "the fox",
            settings=SamplingSettings(do_sample=False), max_new_tokens=30,
        ).text
        for model in (Ensemble(decoders), *decoders)
    ]  # fmt: skip
    assert done.stdout == f"the fox{said[0]}\n"
    assert len(set(said)) == 3


def test_a_chat_with_several_models(models: Path) -> None:
    answers = [
        slm("chat", "a", *more, "--temperature", "0", "--max-new-tokens", "20", cwd=models, stdin="hi\n")
        for more in ([], ["--with", "b"])
    ]
    assert all(done.returncode == 0 for done in answers)
    assert answers[0].stdout != answers[1].stdout


def test_another_tokenizer_and_a_missing_model_are_one_line(models: Path) -> None:
    assert "c: its tokenizer" in refused("generate", "a", "the fox", "--with", "c", cwd=models)
    assert "d: no such directory" in refused("chat", "a", "--with", "d", cwd=models)
