"""Text given to a model's own directory: its tokenizer's conventions are kept, ids and text equal `transformers`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slmkit import SLMEnsemble, SLMForCausalLM
from slmkit.cli import main
from slmkit.cli.show import load_for_generation
from slmkit.config import UserError
from slmkit.generation.chat import ChatSession
from slmkit.generation.engine import Engine, Request
from slmkit.generation.generator import TextStream, generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.config import SLMConfig
from slmkit.model.files.generation_config import new_tokens
from slmkit.tokenizer import SLMTokenizer
from tests.generation.helpers import complete
from tests.tokenizer.kinds import MADE, REAL, directory_of
from tests.tokenizer.test_kinds import TEMPLATES

transformers = pytest.importorskip("transformers")

PROMPTS = ["The cat sat", "", " by the sea\n"]
GREEDY = SamplingSettings(do_sample=False)
WIDER = 7  # rows of the head that no token has


def model_beside(directory: Path, seed: int = 0) -> None:
    """A small Llama for the tokenizer there, its head wider than the vocabulary."""
    tokenizer = SLMTokenizer.from_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + WIDER, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
        model.lm_head.weight[len(tokenizer) :] = 0  # so that transformers, which draws them too, finds others likelier
    model.save_pretrained(directory)


@pytest.mark.parametrize("kind", [*MADE, *REAL])
def test_text_in_and_text_out_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    directory = directory_of(kind, tmp_path)
    model_beside(directory)
    decoder, tokenizer = load_for_generation(str(directory), "cpu")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    reference = transformers.LlamaForCausalLM.from_pretrained(directory)
    for prompt in PROMPTS:
        ids = theirs(prompt).input_ids
        ids = ids[: len(ids) - len(tokenizer.ending)] or [tokenizer.eos_token_id]
        stops = sorted(tokenizer.stop_token_ids)
        made = reference.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=stops)
        new = [index for index in made[0, len(ids) :].tolist() if index not in tokenizer.special_tokens.values()]
        assert tokenizer.encode_prompt(prompt) == ids
        if kind in ("wordpiece",) or max(new, default=0) >= len(tokenizer):
            continue  # whose decoder cleans up across many tokens
        assert complete(decoder, tokenizer, prompt, settings=GREEDY, max_new_tokens=12).text == text_behind(
            tokenizer, ids[-1:], new
        )


def text_behind(tokenizer: SLMTokenizer, before: list[int], new: list[int]) -> str:
    before = [index for index in before if index not in tokenizer.special_tokens.values()]
    return tokenizer.decode([*before, *new])[len(tokenizer.decode(before)) :]


@pytest.mark.parametrize("kind", ["metaspace-first", "byte-level"])
def test_an_id_without_a_token_is_never_drawn(kind: str, tmp_path: Path) -> None:
    """The head's further rows are made the likeliest of all; with and without sampling, alone and in an ensemble."""
    directory = directory_of(kind, tmp_path)
    model_beside(directory)
    decoder, tokenizer = load_for_generation(str(directory), "cpu")
    size = len(tokenizer)

    def biased(hidden: torch.Tensor) -> torch.Tensor:
        logits = type(decoder).logits(decoder, hidden)
        return torch.cat([logits[..., :size], logits[..., size:] + 100], dim=-1)

    decoder.logits = biased  # type: ignore[method-assign]
    for settings in (GREEDY, SamplingSettings(seed=1, temperature=2.0)):
        assert complete(decoder, tokenizer, "The cat", settings=settings, max_new_tokens=20).tokens
    tokenizer.chat_template = TEMPLATES["zephyr"]
    assert isinstance("".join(ChatSession(decoder, tokenizer, GREEDY, max_new_tokens=10).reply("hello")), str)
    model = SLMForCausalLM.from_pretrained(directory)
    model.decoder.logits = biased  # type: ignore[method-assign]
    for one in (model, SLMEnsemble([model, model])):
        assert int(one.generate(torch.tensor([[5, 6]]), max_new_tokens=20, do_sample=True, seed=3).max()) < size


def test_what_generation_config_says_is_obeyed_and_carried_over(tmp_path: Path) -> None:
    directory = directory_of("metaspace-first", tmp_path)
    model_beside(directory)
    pad = SLMTokenizer.from_pretrained(directory).special_tokens["<pad>"]
    said: dict[str, Any] = {
        "bos_token_id": 1, "eos_token_id": [2, pad], "do_sample": True, "temperature": 0.3, "top_p": 0.7,
        "repetition_penalty": 1.2, "typical_p": 0.9,
    }  # fmt: skip
    (directory / "generation_config.json").write_text(json.dumps(said))
    _, tokenizer = load_for_generation(str(directory), "cpu")
    assert tokenizer.stop_token_ids == {2, pad}
    usual = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.0}
    found = SamplingSettings.for_model(directory, 1, usual, temperature=None, top_p=0.5)
    assert (found.temperature, found.top_p, found.min_p, found.repetition_penalty) == (0.3, 0.5, 0.0, 1.2)
    assert found.typical_p == 0.9, "obeyed though it has no usual value"
    model = SLMForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == said | {"pad_token_id": None}
    again = SLMConfig.from_pretrained(tmp_path / "again")
    assert again.generation_config == {key: said[key] for key in said}
    assert "generation_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_model_that_says_nothing_is_sampled_as_usual(tmp_path: Path) -> None:
    usual = {"temperature": 0.8, "top_p": 0.95}
    assert SamplingSettings.for_model(tmp_path, None, usual, temperature=None) == SamplingSettings(
        temperature=0.8, top_p=0.95
    )
    (tmp_path / "generation_config.json").write_text('{"do_sample": false}')
    assert SamplingSettings.for_model(tmp_path, None, usual).is_greedy


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{not json", "not a readable generation_config.json: "),
        ("[1]", "expected an object, found a list"),
        *[
            (json.dumps({"do_sample": True, key: value}), f"generation_config.json: {key}")
            for key, value in [
                ("eos_token_id", "</s>"), ("eos_token_id", [2, "</s>"]), ("eos_token_id", -1),
                ("pad_token_id", "<pad>"), ("do_sample", "yes"),
                ("temperature", "0.6"), ("temperature", -1), ("top_k", -1), ("top_k", 1.5),
                ("top_p", 1.5), ("min_p", 1), ("repetition_penalty", 0), ("typical_p", 0),
                ("suppress_tokens", 5), ("max_length", 0), ("max_new_tokens", "9"),
            ]
        ],
    ],
)  # fmt: skip
def test_a_wrong_generation_config_is_one_line_that_names_file_and_key(content: str, said: str, tmp_path: Path) -> None:
    directory = directory_of("metaspace-first", tmp_path)
    model_beside(directory)
    (directory / "generation_config.json").write_text(content)
    for read in (lambda: SamplingSettings.for_model(directory, 1, {}), lambda: SLMConfig.from_pretrained(directory)):
        with pytest.raises(UserError) as raised:
            read()
        assert str(raised.value).startswith(f"{directory}/generation_config.json")
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)


def test_ids_that_a_model_stops_at_or_suppresses_may_be_ordinary_tokens(tmp_path: Path) -> None:
    directory = directory_of("metaspace-first", tmp_path)
    model_beside(directory)
    plain, tokenizer = load_for_generation(str(directory), "cpu")
    first, *_ = stream_ids(plain, tokenizer)
    assert first not in tokenizer.special_tokens.values()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first]}))
    stopped = TextStream(*load_for_generation(str(directory), "cpu"), "a", settings=GREEDY, max_new_tokens=9)
    assert (list(stopped), stopped.tokens, stopped.finish_reason) == ([], 1, "stop")
    (directory / "generation_config.json").write_text(json.dumps({"suppress_tokens": [first]}))
    assert first not in stream_ids(*load_for_generation(str(directory), "cpu"))
    again = SLMForCausalLM.from_pretrained(directory)
    prompt = torch.tensor([tokenizer.encode_prompt("a")])
    assert first not in again.generate(prompt, max_new_tokens=9)[0, prompt.size(1) :]


@pytest.mark.parametrize(
    ("said", "new"), [({"max_new_tokens": 4}, 4), ({"max_length": 9}, 6), ({"max_length": 9, "max_new_tokens": 2}, 2)]
)
def test_how_long_a_text_is_unless_the_caller_says(
    said: dict[str, int],
    new: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = directory_of("byte-level", tmp_path)
    model_beside(directory)
    (directory / "generation_config.json").write_text(json.dumps(said | {"do_sample": False}))
    model, prompt = SLMForCausalLM.from_pretrained(directory), torch.tensor([[5, 6, 7]])
    assert model.generate(prompt, eos_token_id=[]).size(1) == 3 + new
    reference = transformers.LlamaForCausalLM.from_pretrained(directory)
    reference.generation_config.eos_token_id = None
    assert reference.generate(prompt, pad_token_id=0).size(1) == 3 + new
    assert model.generate(prompt, eos_token_id=[], max_new_tokens=7).size(1) == 3 + 7
    assert model.generate(prompt, eos_token_id=[], max_length=8).size(1) == 8

    asked: list[int] = []
    insert = Engine.insert

    def recorded(engine: Engine, request: Request) -> int:
        asked.append(request.max_new_tokens)
        return insert(engine, request)

    def run(*command: str) -> None:
        monkeypatch.setattr("sys.argv", ["slm", *command])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code

    def record(*_: Any, max_new_tokens: int, **__: Any) -> None:
        asked.append(max_new_tokens)

    monkeypatch.setattr(Engine, "insert", recorded)
    three = SLMTokenizer.from_pretrained(directory).decode([5, 6, 7])
    run("generate", str(directory), three)
    run("generate", str(directory), three, "--max-new-tokens", "7")
    assert asked == [new, 7]
    monkeypatch.setattr("slmkit.generation.chat.ChatSession", record)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    run("chat", str(directory))
    assert asked[2:] == [said.get("max_new_tokens", 9)]


def test_a_length_that_the_prompt_fills_is_one_line() -> None:
    with pytest.raises(UserError, match="max_length of 9 leaves no room after a prompt of 9 tokens: give"):
        new_tokens({"max_length": 9}, usual=200, prompt=9)


def stream_ids(decoder: Any, tokenizer: Any) -> list[int]:
    prompt = torch.tensor([tokenizer.encode_prompt("a")])
    asked = {"max_new_tokens": 9, "stop_ids": set(), "settings": GREEDY, "pad_token_id": 0}
    return generate_ids(decoder, prompt, known=tokenizer.known_ids, **asked)[0, prompt.size(1) :].tolist()


def test_settings_that_are_not_obeyed_are_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "stop_strings": None, "max_length": 99}
    loud = {
        "bad_words_ids": [[3]], "begin_suppress_tokens": [3], "forced_bos_token_id": 3, "forced_eos_token_id": 3,
        "min_new_tokens": 3, "no_repeat_ngram_size": 2, "num_beams": 4, "penalty_alpha": 0.6, "stop_strings": ["x"],
        "what_comes_next": 1,
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(silent | {"temperature": 0.6, "top_p": 0.9}))
    found = SamplingSettings.for_model(tmp_path, None, {"temperature": 0.8, "top_p": 0.95})
    assert found.is_greedy, "transformers samples only where do_sample says so"
    assert not caplog.records
    (tmp_path / "generation_config.json").write_text(json.dumps(loud))
    SamplingSettings.for_model(tmp_path, None, {})
    assert [record.message.split(": ")[2] for record in caplog.records] == [", ".join(sorted(loud))]
