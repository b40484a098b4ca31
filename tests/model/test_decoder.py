"""The decoder agrees with itself, however it is called."""

from __future__ import annotations

import pytest
import torch

from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.initialization import build_decoder


def tiny(**changes: object) -> SLMConfig:
    shape = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return SLMConfig(**(shape | changes))


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("pieces", [[1] * 20, [20], [7, 1, 12], [19, 1]], ids=str)
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(pieces: list[int]) -> None:
    decoder = build_decoder(tiny()).eval()
    x = ids(2, 20)
    with torch.no_grad():
        whole = decoder(x)
        cache = decoder.new_cache(2, 20)
        parts = torch.cat([decoder(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
    assert (whole - parts).abs().max() < 1e-5
    assert cache.lengths.tolist() == [20, 20]


def test_a_position_does_not_see_what_follows_it() -> None:
    decoder = build_decoder(tiny()).eval()
    x = ids(1, 16)
    changed = x.clone()
    changed[0, 10] = (x[0, 10] + 1) % 97
    with torch.no_grad():
        before, after = decoder(x), decoder(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before() -> None:
    first = build_decoder(tiny(), seed=3).state_dict()
    torch.rand(100)
    second = build_decoder(tiny(), seed=3).state_dict()
    other = build_decoder(tiny(), seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_residual_projections_start_smaller_with_depth() -> None:
    decoder = build_decoder(tiny(num_hidden_layers=8, hidden_size=128))
    expected = 0.2 / 16**0.5
    assert decoder.blocks[0].attention.out.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert decoder.blocks[0].mlp.gate.weight.std().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_with_the_copying_initialization_a_new_model_expects_what_followed_a_token_before(kv_heads: int) -> None:
    def gained(initialization: str) -> float:
        """Nats per token by which a text of different tokens is likelier the second time it is read."""
        shape = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": kv_heads}
        config = tiny(**shape, initializer_range=0.02)
        decoder = build_decoder(config, seed=1, initialization=initialization).eval()
        generator = torch.Generator().manual_seed(0)
        x = torch.stack([torch.randperm(97, generator=generator)[:24] for _ in range(8)]).repeat(1, 2)
        with torch.no_grad():
            chances = decoder.logits(decoder(x[:, :-1])).log_softmax(-1).gather(-1, x[:, 1:, None])
        return (chances[:, 24:].mean() - chances[:, :23].mean()).item()

    assert abs(gained("gpt2")) < 0.5
    assert gained("copying") > 5


def test_an_unknown_initialization_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown initialization 'copy'.*copying"):
        build_decoder(tiny(), initialization="copy")


def test_a_text_longer_than_the_context_is_refused_with_both_numbers() -> None:
    decoder = build_decoder(tiny())
    with pytest.raises(UserError, match=r"65 tokens .* context of 64"):
        decoder(ids(1, 65))


def test_dropout_is_active_in_training_alone() -> None:
    decoder = build_decoder(tiny(hidden_dropout=0.5, attention_dropout=0.5))
    x = ids(1, 8)
    assert not torch.equal(decoder.train()(x), decoder(x))
    assert torch.equal(decoder.eval()(x), decoder(x))


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied, untied = build_decoder(tiny()), build_decoder(tiny(tie_word_embeddings=False))
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight is not untied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 97 * 32
