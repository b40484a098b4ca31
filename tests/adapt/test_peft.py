"""Adapters of ours in `peft`, and adapters of `peft` here: equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slmkit.adapt.adapter import AdapterFiles, trained_tensors
from slmkit.adapt.load import load_adapted, load_model
from slmkit.adapt.lora import adapted_linears, fold
from slmkit.config import UserError
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.files.directory import load_decoder
from tests.adapt.helpers import FAMILIES, KINDS, adapted, base_in, config_of, ids, logits, save_adapter, shake
from tests.parity.test_transformers import randomised

transformers = pytest.importorskip("transformers")

TARGETS: dict[str, dict[str, Any]] = {
    "all": {},
    "some, in our words": {"target_modules": ["query", "value", "mlp.down"]},
    "one layer": {"target_modules": r"blocks\.1\.attention\..*"},
    "out alone": {"target_modules": ["attention.out"]},  # in GPT-2 the MLP has a c_proj too
}


def peft() -> Any:
    """The package, whose import takes seconds."""
    return pytest.importorskip("peft")


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
    theirs = peft().PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
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
    made = peft().LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **KINDS[kind])
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
    model = peft().get_peft_model(reference(tmp_path / "base"), config).eval()
    shake({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../base"}))
    return their_logits(model)


# peft takes DeepSeek's gate_proj, up_proj and down_proj for experts, in dense layers too.
OF_DEEPSEEK: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora, with dropout": {"use_rslora": True, "lora_dropout": 0.3},
    "MLP alone": {"target_modules": ["mlp.gate", "mlp.down"]},
    "down in one layer": {"target_modules": [r"blocks\.1\.mlp\.down", "attention.out"]},
    "attention alone": {"target_modules": ["q_a_proj", "q_b_proj", "key_value"]},
    "attention alone, DoRA": {"target_modules": ["latent", "out"], "use_dora": True},
}


@pytest.mark.parametrize("case", OF_DEEPSEEK)
@pytest.mark.parametrize("query_rank", [12, None])
def test_peft_computes_the_logits_of_our_adapter_of_a_dense_deepseek(
    case: str, query_rank: int | None, tmp_path: Path
) -> None:
    if query_rank is None and case == "attention alone":
        return
    decoder, _ = ours_in(tmp_path, "deepseek_v3", OF_DEEPSEEK[case], q_lora_rank=query_rank)
    check_in_peft(decoder.eval(), tmp_path)
    again, _, _ = load_adapted(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(decoder))
    assert adapted_linears(again).keys() == adapted_linears(decoder).keys()


def test_so_it_does_where_single_layers_have_ranks_of_their_own(tmp_path: Path) -> None:
    decoder, settings = ours_in(tmp_path, "deepseek_v3", {})
    for name in ("blocks.0.mlp.down", "blocks.1.attention.out"):
        adapted_linear = decoder.get_submodule(name)
        adapted_linear.lora_A = torch.nn.Parameter(adapted_linear.lora_A[:2])
        adapted_linear.lora_B = torch.nn.Parameter(adapted_linear.lora_B[:, :2])
    save_adapter(decoder, config_of("deepseek_v3"), settings, tmp_path / "base", tmp_path / "adapter")
    check_in_peft(decoder, tmp_path)
    assert torch.equal(logits(load_adapted(tmp_path / "adapter")[0]), logits(decoder))


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_a_proj", "down_proj"], ["o_proj", "gate_proj", "up_proj"], r".*(kv_b|down)_proj"],
    ids=str,
)
def test_we_compute_the_logits_of_pefts_adapter_of_a_dense_deepseek(targets: Any, tmp_path: Path) -> None:
    base_in(tmp_path / "base", config_of("deepseek_v3"))
    theirs = saved_by_peft(tmp_path, peft().LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    assert (logits(load_adapted(tmp_path / "adapter")[0]) - theirs).abs().max() <= 1e-4


def test_an_adapter_of_a_peft_that_knew_no_experts_is_read(tmp_path: Path) -> None:
    """Before 0.18 peft named these modules as all others, and stored the same tensors."""
    decoder, _ = ours_in(tmp_path, "deepseek_v3", {})
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    named = [name.removesuffix(".weight") for name in content.pop("target_parameters")]
    path.write_text(json.dumps(content | {"target_modules": content["target_modules"] + named}))
    assert torch.equal(logits(load_adapted(tmp_path / "adapter")[0]), logits(decoder))


def test_dora_that_peft_cannot_load_is_refused_before_it_is_trained() -> None:
    config = config_of("deepseek_v3")
    with pytest.raises(UserError, match=r"use_dora: peft cannot load DoRA of .*gate_proj"):
        adapted(randomised(config), config, use_dora=True)


def test_ranks_and_alphas_of_single_layers_are_pefts(tmp_path: Path) -> None:
    base_in(tmp_path / "base", config_of("llama"))
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"down_proj": 9, "1.mlp.up_proj": 2}}
    targets = ["q_proj", "up_proj", "down_proj"]
    theirs = saved_by_peft(tmp_path, peft().LoraConfig(r=3, lora_alpha=5, target_modules=targets, **patterns))
    decoder, config, settings = load_adapted(tmp_path / "adapter")
    assert (logits(decoder) - theirs).abs().max() <= 1e-4
    save_adapter(decoder, config, settings, tmp_path / "base", tmp_path / "again")
    again = peft().PeftModel.from_pretrained(reference(tmp_path / "base"), tmp_path / "again").eval()
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
    theirs = saved_by_peft(tmp_path, peft().LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    assert (logits(load_adapted(tmp_path / "adapter")[0]) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_back_is_what_was_written_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    targets = {"target_modules": ["key", "value", r".*mlp\.(gate|up)"]}
    decoder, settings = ours_in(tmp_path, family, KINDS[kind] | targets)
    read = AdapterFiles(config_of(family), settings, tmp_path / "base").read(tmp_path / "adapter", decoder)
    written = trained_tensors(decoder)
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in read)


def test_a_fused_adapter_of_pefts_is_split_and_written_as_one_again(tmp_path: Path) -> None:
    base_in(tmp_path / "base", config_of("gpt2"))
    theirs = saved_by_peft(tmp_path, peft().LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn"], use_rslora=True))
    decoder, config, settings = load_adapted(tmp_path / "adapter")
    assert {name.rpartition(".")[2] for name in adapted_linears(decoder)} == {"query", "key", "value"}
    save_adapter(decoder, config, settings, tmp_path / "base", tmp_path / "again")
    assert (logits(load_adapted(tmp_path / "again")[0]) - theirs).abs().max() <= 1e-4
    again = peft().PeftModel.from_pretrained(reference(tmp_path / "base"), tmp_path / "again").eval()
    assert (their_logits(again) - theirs).abs().max() <= 1e-4


def test_folded_it_is_a_plain_model_for_transformers(tmp_path: Path) -> None:
    from slmkit.model.files.directory import save_decoder

    decoder, _ = ours_in(tmp_path, "gpt2", KINDS["dora"])
    before = logits(decoder)
    save_decoder(fold(decoder), config_of("gpt2"), tmp_path / "folded")
    assert (their_logits(reference(tmp_path / "folded")) - before).abs().max() <= 1e-4
