"""Adapters of ours in `peft`, and adapters of `peft` here: equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slmkit.adapt import LoRASettings, fold, load_adapted, load_model, save_adapter
from slmkit.adapt.adapter import read_tensors, trained_tensors
from slmkit.adapt.lora import adapted_linears
from slmkit.model import Decoder, load_decoder
from tests.adapt.helpers import FAMILIES, KINDS, adapted, base_in, config_of, ids, logits, shake

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TARGETS: dict[str, dict[str, Any]] = {
    "all": {},
    "some, in our words": {"target_modules": ["query", "value", "mlp.down"]},
    "one layer": {"target_modules": r"blocks\.1\.attention\..*"},
    "out alone": {"target_modules": ["attention.out"]},  # in GPT-2 the MLP has a c_proj too
}


def reference(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def their_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def ours_in(tmp_path: Path, family: str, settings: dict[str, Any], **changes: Any) -> tuple[Decoder, LoRASettings]:
    """A base and an adapter on disk; the adapted decoder."""
    config = config_of(family, **changes)
    decoder = base_in(tmp_path / "base", config)
    chosen = adapted(decoder, config, **settings)
    save_adapter(decoder, config, chosen, tmp_path / "base", tmp_path / "adapter")
    return decoder, chosen


def check_in_peft(decoder: Decoder, tmp_path: Path) -> None:
    base = reference(tmp_path / "base")
    plain = their_logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (logits(decoder) - their_logits(theirs)).abs().max() <= 1e-4
    assert (their_logits(theirs) - plain).abs().max() > 1e-2  # it does something


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_logits_of_our_adapter(family: str, kind: str, tmp_path: Path) -> None:
    decoder, _ = ours_in(tmp_path, family, KINDS[kind])
    check_in_peft(decoder, tmp_path)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_so_it_does_of_some_of_the_modules(family: str, targets: str, kind: str, tmp_path: Path) -> None:
    decoder, _ = ours_in(tmp_path, family, KINDS[kind] | TARGETS[targets])
    check_in_peft(decoder, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_we_compute_the_logits_of_pefts_adapter(family: str, kind: str, tmp_path: Path) -> None:
    base_in(tmp_path / "base", config_of(family))
    made = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **KINDS[kind])
    theirs = saved_by_peft(tmp_path, made)
    adapted_decoder, _, settings = load_adapted(tmp_path / "adapter")
    assert (logits(adapted_decoder) - theirs).abs().max() <= 1e-4
    assert settings.r == 3
    folded, _ = load_model(tmp_path / "adapter")
    assert not adapted_linears(folded)
    assert (logits(folded) - theirs).abs().max() <= 1e-4
    plain, _ = load_decoder(tmp_path / "base")
    assert (logits(plain) - theirs).abs().max() > 1e-2


def saved_by_peft(tmp_path: Path, config: Any) -> torch.Tensor:
    """An adapter made by peft with `config`, written to `adapter`; its logits."""
    model = peft.get_peft_model(reference(tmp_path / "base"), config).eval()
    shake({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../base"}))
    return their_logits(model)


def test_ranks_and_alphas_of_single_layers_are_pefts(tmp_path: Path) -> None:
    base_in(tmp_path / "base", config_of("llama"))
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"down_proj": 9, "1.mlp.up_proj": 2}}
    targets = ["q_proj", "up_proj", "down_proj"]
    theirs = saved_by_peft(tmp_path, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **patterns))
    decoder, config, settings = load_adapted(tmp_path / "adapter")
    assert (logits(decoder) - theirs).abs().max() <= 1e-4
    save_adapter(decoder, config, settings, tmp_path / "base", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(reference(tmp_path / "base"), tmp_path / "again").eval()
    assert (their_logits(again) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_that_are_trained_whole_are_pefts(family: str, tied: bool, tmp_path: Path) -> None:
    saved = {"modules_to_save": ["embedding", "lm_head"]}
    decoder, _ = ours_in(tmp_path, family, saved, tie_word_embeddings=tied)
    names = {name for name in trained_tensors(decoder) if "lora" not in name}
    assert names == ({"embedding.weight"} if tied else {"embedding.weight", "head.weight"})
    check_in_peft(decoder, tmp_path)
    folded, _ = load_model(tmp_path / "adapter")
    assert (logits(folded) - logits(decoder)).abs().max() <= 1e-4


def test_a_head_of_its_own_can_be_adapted(tmp_path: Path) -> None:
    settings = {"target_modules": ["all-linear", "lm_head"]}
    decoder, _ = ours_in(tmp_path, "llama", settings, tie_word_embeddings=False)
    check_in_peft(decoder, tmp_path)
    base_in(tmp_path / "base", config_of("llama", tie_word_embeddings=False))
    theirs = saved_by_peft(tmp_path, peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    assert (logits(load_adapted(tmp_path / "adapter")[0]) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_back_is_what_was_written_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    decoder, _ = ours_in(tmp_path, family, KINDS[kind] | {"target_modules": ["key", "value", r".*mlp\.(gate|up)"]})
    read = read_tensors(decoder, config_of(family), tmp_path / "adapter")
    written = trained_tensors(decoder)
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in read)


def test_a_fused_adapter_of_pefts_is_split_and_written_as_one_again(tmp_path: Path) -> None:
    base_in(tmp_path / "base", config_of("gpt2"))
    theirs = saved_by_peft(tmp_path, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn"], use_rslora=True))
    decoder, config, settings = load_adapted(tmp_path / "adapter")
    assert {name.rpartition(".")[2] for name in adapted_linears(decoder)} == {"query", "key", "value"}
    save_adapter(decoder, config, settings, tmp_path / "base", tmp_path / "again")
    assert (logits(load_adapted(tmp_path / "again")[0]) - theirs).abs().max() <= 1e-4
    again = peft.PeftModel.from_pretrained(reference(tmp_path / "base"), tmp_path / "again").eval()
    assert (their_logits(again) - theirs).abs().max() <= 1e-4


def test_folded_it_is_a_plain_model_for_transformers(tmp_path: Path) -> None:
    from slmkit.model import save_decoder

    decoder, _ = ours_in(tmp_path, "gpt2", KINDS["dora"])
    before = logits(decoder)
    save_decoder(fold(decoder), config_of("gpt2"), tmp_path / "folded")
    assert (their_logits(reference(tmp_path / "folded")) - before).abs().max() <= 1e-4
