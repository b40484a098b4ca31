"""From a model that `transformers` made to one that talks, or knows more words: its vocabulary grows on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slmkit.adapt.load import load_model
from slmkit.config import UserError
from slmkit.generation.chat import ChatSession
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.files.directory import load_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe.recipe import load_recipe
from slmkit.workflows.merge import merge_adapters
from slmkit.workflows.train import RunDirectory, resume_run, train_recipe
from tests.test_life import Silent
from tests.tokenizer.conftest import TEXTS, byte_level_with, save_foreign

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("without_plan_and_pictures")
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


def made_by_transformers(folder: Path, kind: str) -> Path:
    """A model with random weights and a tokenizer that has never heard of conversations."""
    tokenizer = byte_level_with(["<s>", "</s>"], "<s>")
    size = tokenizer.get_vocab_size()
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=size, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    else:
        config = transformers.LlamaConfig(
            vocab_size=size + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128, tie_word_embeddings=False,
        )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return save_foreign(folder, tokenizer, {"eos_token": "</s>", "bos_token": "<s>"})


def recipe_of(tmp_path: Path, base: Path, objective: str, *more: str) -> object:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"data": {"source": str(tmp_path / "data.jsonl")}}))
    keys = [
        f"objective={objective}", f"model.path={base}", f"output_dir={tmp_path / 'run'}", "train.max_steps=4",
        "train.tokens_per_step=256", "train.eval_steps=2", "train.save_total_limit=9", "train.device=cpu",
        "train.sample_tokens=4", "train.precision=float32", "data.validation_fraction=0.2", *more,
    ]  # fmt: skip
    return load_recipe(tmp_path / "recipe.yaml", keys)


def write_rows(tmp_path: Path, rows: list[dict]) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def equal_in_transformers(directory: Path, size: int) -> None:
    decoder, config = load_decoder(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    assert config.vocab_size == theirs.config.vocab_size == size
    ids = torch.randint(0, size, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(decoder(ids)), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("template", END)
def test_a_foreign_base_model_learns_to_talk_in_any_template(tmp_path: Path, kind: str, template: str) -> None:
    base = made_by_transformers(tmp_path / "base", kind)
    talk = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sang to the sea"}]
    write_rows(tmp_path, [{"messages": [*talk, {"role": "user", "content": f"{number}"}]} for number in range(40)])
    run = train_recipe(recipe_of(tmp_path, base, "sft", f"tokenizer.chat_template={template}"), Silent())
    tokenizer = SLMTokenizer.from_pretrained(run.root / "latest")
    before = SLMTokenizer.from_pretrained(base)
    assert len(tokenizer) == len(before) + {"chatml": 2, "llama3": 3, "gemma": 2}[template]
    equal_in_transformers(run.root / "latest", len(tokenizer))
    generation = json.loads((run.root / "latest" / "generation_config.json").read_text())
    ends = {before.eos_token_id, tokenizer.special_tokens[END[template]]}
    assert set(generation["eos_token_id"]) == ends == tokenizer.stop_token_ids

    if kind == "gpt2":  # made to say nothing but its end of turn: the conversation stops there
        decoder, _ = load_decoder(run.root / "latest")
        with torch.no_grad():
            decoder.norm.weight.zero_()
            decoder.norm.bias.zero_()[0] = 100
            decoder.embedding.weight[tokenizer.end_of_turn_id] = 100 * decoder.norm.bias
        session = ChatSession(decoder, tokenizer, SamplingSettings(temperature=0.0), max_new_tokens=5)
        assert "".join(session.reply("the cat?")) == ""
        assert session.finish_reason == "stop"

    # Gone on with from a checkpoint, it grows again and comes to the same weights.
    last = run.root / "checkpoints" / "step-000004"
    whole, _ = load_decoder(last)
    (run.root / "latest").unlink()
    last.rename(tmp_path / "last")
    resume_run(run.root, Silent())
    again, _ = load_decoder(RunDirectory(run.root).checkpoints / "step-000004")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_pretraining_goes_on_with_words_that_get_a_token(tmp_path: Path) -> None:
    base = made_by_transformers(tmp_path / "base", "llama")
    text = " ".join(TEXTS[:3]) + " and photosynthesis by the sea"
    write_rows(tmp_path, [{"text": f"{number} {text}"} for number in range(30)])
    keys = ["tokenizer.added_tokens=[photosynthesis]", "tokenizer.additional_special_tokens=['<|fim|>', '<|x|>']"]
    run = train_recipe(recipe_of(tmp_path, base, "pretrain", *keys), Silent())
    tokenizer, before = SLMTokenizer.from_pretrained(run.root / "latest"), SLMTokenizer.from_pretrained(base)
    assert len(tokenizer) == len(before) + 3
    equal_in_transformers(run.root / "latest", len(tokenizer))
    word = tokenizer.added_words["photosynthesis"]
    grown = load_decoder(run.root / "latest")[0]
    pieces = load_decoder(base)[0].embedding.weight[before.encode("photosynthesis")].mean(0)
    assert 0 < (grown.embedding.weight[word] - pieces).abs().max() < 0.1, "begun as its pieces' mean, and trained"
    theirs = transformers.AutoTokenizer.from_pretrained(run.root / "latest")
    assert theirs.encode("photosynthesis", add_special_tokens=False) == [word] == tokenizer.encode("photosynthesis")


def test_a_model_without_a_tokenizer_is_given_one_and_anothers_is_refused(tmp_path: Path) -> None:
    base = made_by_transformers(tmp_path / "base", "gpt2")
    write_rows(tmp_path, [{"text": f"{number} the cat sat by the sea"} for number in range(60)])
    tokenizer = SLMTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (base / "tokenizer.json").unlink()
    run = train_recipe(recipe_of(tmp_path, base, "pretrain", f"tokenizer.path={tmp_path / 'tokenizer'}"), Silent())
    assert SLMTokenizer.from_pretrained(run.root / "latest").fingerprint == tokenizer.fingerprint
    other = SLMTokenizer(1000)
    other.train(f"word{number} word{number}" for number in range(2000))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="it belongs to another model; set tokenizer.path to this model's tokenizer"):
        train_recipe(recipe_of(tmp_path, base, "pretrain", f"tokenizer.path={tmp_path / 'other'}"), Silent())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_adapter_brings_its_new_tokens_along(tmp_path: Path, kind: str) -> None:
    """Its embedding and its head are trained whole; peft takes them once the base has as many rows."""
    peft = pytest.importorskip("peft")
    base = made_by_transformers(tmp_path / "base", kind)
    talk = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sang to the sea"}]
    write_rows(tmp_path, [{"messages": [*talk, {"role": "user", "content": f"{number}"}]} for number in range(40)])
    lora = ["tokenizer.chat_template=chatml", "lora.r=2", "train.learning_rate=1e-2"]
    run = train_recipe(recipe_of(tmp_path, base, "sft", *lora), Silent())
    adapter = (run.root / "latest").resolve()
    tokenizer = SLMTokenizer.from_pretrained(adapter)
    decoder, config = load_model(adapter)
    ids = torch.randint(0, len(tokenizer), (2, 30), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(config.vocab_size)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(decoder(ids)), theirs(ids).logits, rtol=0, atol=1e-4)
    assert isinstance(config.eos_token_id, list)
    assert {*config.eos_token_id} == tokenizer.stop_token_ids
    folded = merge_adapters(base, [adapter], tmp_path / "folded")
    equal_in_transformers(folded, config.vocab_size)
    found = load_decoder(folded)[1]
    assert found.for_generation() == config.for_generation()
    plain = {"generation_config": None}
    assert found.model_copy(update=plain) == config.model_copy(update=plain)

    last = run.root / "checkpoints" / "step-000004"
    (run.root / "latest").unlink()
    last.rename(tmp_path / "last")
    resume_run(run.root, Silent())
    again, before = (load_file(path / "adapter_model.safetensors") for path in (last, tmp_path / "last"))
    assert all(torch.equal(again[name], before[name]) for name in before)
