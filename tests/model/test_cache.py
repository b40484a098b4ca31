"""Reading with a cache is reading without, in every family; and a window needs no more room than it sees."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from tests.long import several

LENGTH = 40
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
WINDOWS = {"sliding_window": 7, "num_key_value_heads": 2}
FAMILIES = {
    "gpt2": {},
    "llama": {"num_key_value_heads": 2},
    "mistral": WINDOWS,
    "qwen3": {"num_key_value_heads": 1},
    "qwen2": WINDOWS | {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
    "smollm3": {"num_key_value_heads": 2},
    "olmo2": {},
    "olmo3": WINDOWS,
    "gemma2": WINDOWS | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": WINDOWS | {"num_hidden_layers": 6},
    "deepseek_v3": LATENT,
    "slm": {"norm": "layer", "norm_at": "both", "gated_mlp": False, "qk_norm": "width", "sliding_window": 1},
}
# Those that are unlike each other, for what the families have in common: positions learned, rotary and alternating,
# windows everywhere and in some layers, caps, latent attention, each place and kind of norm.
UNLIKE = several(("gpt2", "llama", "mistral", "gemma2", "deepseek_v3", "slm"), tuple(FAMILIES))
every_family = pytest.mark.parametrize("family", FAMILIES)
unlike_families = pytest.mark.parametrize("family", UNLIKE)


def config(family: str) -> SLMConfig:
    return SLMConfig(model_type=family, **SIZES | FAMILIES[family])


def decoder_of(family: str) -> Decoder:
    return build_decoder(config(family), seed=3).eval()


def ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(length))


def in_pieces(decoder: Decoder, x: Tensor, pieces: list[int], at_once: int = LENGTH) -> Tensor:
    cache = decoder.new_cache(x.size(0), x.size(1), at_once)
    with torch.no_grad():
        return torch.cat([decoder(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)


@every_family
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [LENGTH], [5, 1, 30, 4], [6, 34], [8, 1, 1, 20, 10]], ids=str)
def test_every_position_is_what_it_is_without_a_cache(family: str, pieces: list[int]) -> None:
    decoder, x = decoder_of(family), ids()
    with torch.no_grad():
        whole = decoder(x)
    assert (in_pieces(decoder, x, pieces, max(pieces)) - whole).abs().max() <= 1e-5


@every_family
@pytest.mark.parametrize("at_once", [3, 64])
def test_texts_of_different_lengths_do_not_touch_each_other(family: str, at_once: int) -> None:
    """Three texts in four slots, continued together by one or three tokens, each as it is alone."""
    decoder, x, lengths = decoder_of(family), ids(3, 60), [4, 11, 25]
    cache = decoder.new_cache(4, 60, at_once)
    with torch.no_grad():
        for slot, length in enumerate(lengths):
            for piece in x[slot : slot + 1, :length].split(3, dim=1):
                decoder(piece, cache[slot : slot + 1])
        found = []
        for new in (1, 3, 1, 1, 3, 1, 1, 3, 3, 1):
            past = torch.from_numpy(cache.lengths[:3].copy())
            places = past[:, None] + torch.arange(new)
            found.append((places, decoder(x.gather(1, places), cache[:3])))
        assert cache.lengths.tolist() == [length + 18 for length in lengths] + [0]
        alone = decoder(x)
    for places, hidden in found:
        assert (hidden - alone.gather(1, places[..., None].expand(-1, -1, 32))).abs().max() <= 1e-5


@every_family
def test_a_slot_goes_on_from_the_beginning_of_another(family: str) -> None:
    decoder, x = decoder_of(family), ids(1, 30)
    small, large = decoder.new_cache(2, 30, at_once=4), decoder.new_cache(2, 50, at_once=4)
    with torch.no_grad():
        whole = decoder(x)
        for piece in x.split(4, dim=1):
            decoder(piece, small[1:2])
        for target, beginning in ((small, 29), (large, 28)):
            target.copy_slot(0, small, 1, beginning)
            rest = decoder(x[:, beginning:], target[:1])
            assert (rest - whole[:, beginning:]).abs().max() <= 1e-5, beginning
        if any(layer.window for layer in decoder.architecture.layers):
            with pytest.raises(ValueError, match="slot 1 no longer holds what follows its first 12 positions"):
                large.copy_slot(0, small, 1, 12)


@every_family
def test_positions_taken_back_leave_nothing_behind(family: str) -> None:
    decoder, x = decoder_of(family), ids(2, 30)
    cache = decoder.new_cache(2, 40, at_once=5)
    with torch.no_grad():
        for piece in x[:, :20].split(5, dim=1):
            decoder(piece, cache)
        decoder(ids(2, 5), cache)
        cache.lengths -= [5, 3]
        cache.lengths[1] -= 2
        rest = torch.cat([decoder(piece, cache) for piece in x[:, 20:].split(5, dim=1)], dim=1)
        assert (rest - decoder(x)[:, 20:]).abs().max() <= 1e-5


@every_family
def test_documents_do_not_see_each_other_and_begin_at_position_0(family: str) -> None:
    decoder, x = decoder_of(family), ids(2)
    documents = torch.zeros(2, LENGTH, dtype=torch.long)
    documents[0, 13:], documents[0, 21:], documents[1, 30:] = 1, 2, 7
    with torch.no_grad():
        packed = decoder(x, documents=documents)
        for row, borders in enumerate(([0, 13, 21, LENGTH], [0, 30, LENGTH])):
            for start, stop in itertools.pairwise(borders):
                alone = decoder(x[row : row + 1, start:stop])
                assert (packed[row, start:stop] - alone[0]).abs().max() <= 1e-5, (row, start)


def test_a_layer_with_a_window_has_room_for_its_window_and_one_forward_pass() -> None:
    small = SLMConfig.from_preset("gemma-3-270m", hidden_size=64, num_attention_heads=1, vocab_size=100)
    cache = build_decoder(small).new_cache(1, 32_768, at_once=64)
    rooms = [keys.size(2) for keys in cache.keys]
    assert rooms == [32_768 if i in (5, 11, 17) else 512 + 63 for i in range(18)]


def test_the_latent_cache_holds_the_latents_and_the_turned_key() -> None:
    cache = decoder_of("deepseek_v3").new_cache(2, LENGTH)
    assert cache.keys[0].shape == (2, 1, LENGTH, 12 + 4)
    assert cache.values[0].numel() == 0


def test_a_step_attends_to_what_is_filled() -> None:
    decoder, x = decoder_of("llama"), ids(1, 6)
    cache = decoder.new_cache(1, 60)
    with torch.no_grad():
        decoder(x, cache)
    keys, values = cache.extend(0, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    assert keys.size(2) == values.size(2) == 7


def test_more_than_there_is_room_for_is_refused() -> None:
    decoder = decoder_of("mistral")
    with pytest.raises(ValueError, match="room for 10 positions"), torch.no_grad():
        decoder(ids(1, 11), decoder.new_cache(1, 10))
    with pytest.raises(ValueError, match="11 new positions, where this cache takes 8 at once"), torch.no_grad():
        decoder(ids(1, 11), decoder.new_cache(1, 20, at_once=8))
