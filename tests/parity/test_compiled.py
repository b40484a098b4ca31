"""Compiled forward passes are the decoder's and the reference's, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from slmkit.model import kernels
from slmkit.model.compiled import CompiledDecoder, for_decoding
from slmkit.model.decoder import Decoder
from tests.parity.configurations import DRAW, PER_FAMILY
from tests.parity.twins import Twins, text, twins

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler")
LATENT = {"deepseek_v3"}
CONFIGURATIONS = [(family, number) for family in DRAW if family not in LATENT for number in range(PER_FAMILY)]
every_configuration = pytest.mark.parametrize(("family", "number"), CONFIGURATIONS, ids=lambda value: str(value))


def compiled(pair: Twins) -> CompiledDecoder:
    decoder = for_decoding(pair.ours)
    assert isinstance(decoder, CompiledDecoder)
    return decoder


def refuse(*arguments: object, **more: object) -> Tensor:
    raise AssertionError("the plain forward pass")


@every_configuration
def test_rows_of_different_lengths(family: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows that start 0, 3 and 11 tokens apart, in steps of 1, 3 and 1 tokens: longer than every window."""
    pair, ids = twins(family, number), text(3, 40)
    with torch.no_grad():
        expected = pair.theirs(ids, use_cache=False).logits
        decoder, cache = compiled(pair), pair.ours.new_cache(3, 64)
        monkeypatch.setattr(Decoder, "forward", refuse)
        past = [0, 3, 11]
        for row in range(3):
            for position in range(past[row]):
                decoder(ids[row : row + 1, position : position + 1], cache[row : row + 1])
        for new in [1, 1, 3, 1, 7, 1, 1, 5, 1, 1]:
            part = torch.stack([ids[row, past[row] : past[row] + new] for row in range(3)])
            logits = decoder.logits(decoder(part, cache))
            for row in range(3):
                assert (logits[row] - expected[row, past[row] : past[row] + new]).abs().max() <= 1e-4
                past[row] += new
        assert cache.lengths.tolist() == past


@every_configuration
def test_a_row_does_not_depend_on_the_others(family: str, number: int) -> None:
    """Bit by bit: alone, with others, and several tokens at once."""
    pair, ids = twins(family, number), text(4, 9)
    with torch.no_grad():
        decoder, together, alone, at_once = compiled(pair), *(pair.ours.new_cache(4, 32) for _ in range(3))
        steps = torch.cat([decoder(column, together) for column in ids.split(1, dim=1)], dim=1)
        each = [
            torch.cat([decoder(column, alone[row : row + 1]) for column in ids[row : row + 1].split(1, dim=1)], dim=1)
            for row in range(4)
        ]
        assert torch.equal(torch.cat(each), steps)
        parts = [decoder(ids[row : row + 1], at_once[row : row + 1]) for row in range(4)]
        assert torch.equal(torch.cat(parts), steps)


@pytest.mark.parametrize("family", sorted(set(DRAW) - LATENT))
def test_bfloat16(family: str) -> None:
    """Nearer to the model in float32 than its own arithmetic, whose every step is rounded to bfloat16."""
    pair, ids = twins(family, 1), text(2, 20)
    decoder = pair.ours
    with torch.no_grad():
        try:
            decoder.to(torch.bfloat16)
            rounded = {name: value.float() for name, value in decoder.state_dict().items()}
            cache, plain_cache = decoder.new_cache(2, 32), decoder.new_cache(2, 32)
            step, columns = for_decoding(decoder), ids.split(1, dim=1)
            ours = torch.cat([step.logits(step(column, cache)) for column in columns], dim=1)
            plain = torch.cat([decoder.logits(decoder(column, plain_cache)) for column in columns], dim=1).float()
            decoder.float().load_state_dict(rounded)
            expected = decoder.logits(decoder(ids))
        finally:
            twins.cache_clear()
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() <= (plain - expected).norm()


def test_what_the_kernels_do_not_know_stays_plain() -> None:
    pair = twins("deepseek_v3", 0)
    assert for_decoding(pair.ours) is pair.ours
    llama = twins("llama", 0)
    decoder = compiled(llama)
    cache, ids = llama.ours.new_cache(2, 64), text(2, 20)
    with torch.no_grad():
        read = decoder(ids, cache)  # more than 32 tokens: as the decoder itself
        assert torch.equal(read, llama.ours(ids, llama.ours.new_cache(2, 64)))
    decoder.logits(decoder(ids[:, :1], cache)).sum().backward()  # with gradients too
    assert llama.ours.norm.weight.grad is not None
