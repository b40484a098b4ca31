"""A grown vocabulary: what was there stays bit for bit, and new tokens begin as the mean of what spelled them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import load_decoder, save_decoder
from slmkit.model.initialization import build_decoder, grow_vocabulary
from tests.model.test_cache import FAMILIES

PIECES = {100: [5, 6, 7], 101: [8], 102: [5, 5, 9]}


def config_of(family: str, **changes: object) -> SLMConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"sliding_window": 7} if family in ("mistral", "gemma3_text", "gemma2", "olmo3") else {}
    latent = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
    more |= latent if family == "deepseek_v3" else {}
    known = {"model_type": family, "vocab_size": 100, "max_position_embeddings": 64}
    return SLMConfig.model_validate(known | shape | more | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_learned_stays_and_new_rows_are_means(family: str) -> None:
    config = config_of(family)
    decoder = build_decoder(config, seed=1).eval()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    ids = torch.randint(0, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    grown, larger = grow_vocabulary(decoder, config, PIECES)
    assert larger.vocab_size == 103
    old, new = decoder.logits(decoder(ids)), grown.logits(grown(ids))
    assert new.shape[-1] == 103
    torch.testing.assert_close(new[..., :100], old, rtol=0, atol=1e-6)
    for name, tensor in grown.state_dict().items():
        assert torch.equal(tensor[:100] if len(tensor) == 103 else tensor, before[name])
    for weight in (grown.embedding.weight, grown.head_weight):
        for index, parts in PIECES.items():
            torch.testing.assert_close(weight[index], weight[parts].mean(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_takes_no_more_probability_than_its_pieces_have_on_average(tied: bool) -> None:
    config = config_of("llama", tie_word_embeddings=tied)
    decoder = build_decoder(config, seed=2)
    with torch.no_grad():
        decoder.head_weight.mul_(40)  # as decided as a trained model
    ids = torch.randint(0, 100, (4, 30), generator=torch.Generator().manual_seed(1))
    grown, _ = grow_vocabulary(decoder, config, PIECES)
    shares = grown.logits(grown(ids)).softmax(-1)
    assert shares.amax() > 0.5
    for index, parts in PIECES.items():
        assert (shares[..., index] <= shares[..., parts].mean(-1) + 1e-6).all()


def test_rows_that_no_token_has_used_are_filled_and_the_model_stays_as_large() -> None:
    config = config_of("llama")
    decoder = build_decoder(config)
    grown, same = grow_vocabulary(decoder, config, {98: [1, 2]})
    assert same.vocab_size == 100
    assert torch.equal(grown.embedding.weight[98], decoder.embedding.weight[[1, 2]].mean(0))
    assert torch.equal(grown.embedding.weight[:98], decoder.embedding.weight[:98])


def test_a_grown_model_is_trained_and_its_weights_are_not_those_it_grew_from() -> None:
    config = config_of("llama")
    decoder = build_decoder(config)
    grown, _ = grow_vocabulary(decoder, config, PIECES)
    ids = torch.tensor([[100, 5, 101]])
    grown.logits(grown(ids)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in grown.parameters())


def test_ids_with_a_gap_are_another_tokenizers() -> None:
    config = config_of("llama")
    with pytest.raises(UserError, match="token 100 is beyond the model's vocabulary of 100 and is no new one"):
        grow_vocabulary(build_decoder(config), config, {101: [1]})


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_a_grown_model_with_equal_logits(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = config_of(family)
    if family == "slm":
        pytest.skip("model_type slm is slmkit's own")
    grown, larger = grow_vocabulary(build_decoder(config, seed=3), config, PIECES)
    save_decoder(grown.eval(), larger, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 103, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(grown.logits(grown(ids)), theirs(ids).logits, rtol=0, atol=1e-4)
    again, _ = load_decoder(tmp_path)
    assert torch.equal(again.embedding.weight, grown.embedding.weight)
