"""Compiled forward passes are the decoder's and the reference's, in every family."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from slmkit.adapt.lora import add_lora, fold
from slmkit.adapt.quantize import round_to, to_quantize
from slmkit.model import kernels
from slmkit.model.compiled import CompiledDecoder, for_decoding
from slmkit.model.decoder import Decoder, Embedding
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.initialization import build_decoder
from tests.long import several
from tests.model.test_cache import config
from tests.parity.configurations import DRAW, PER_FAMILY
from tests.parity.twins import Twins, text, twins

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C++ compiler")
LATENT = {"deepseek_v3"}
CONFIGURATIONS = [
    (family, number) for family in DRAW if family not in LATENT for number in range(several(4, PER_FAMILY))
]
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
    cache, ids = llama.ours.new_cache(2, 64), text(2, 40)
    with torch.no_grad():
        read = decoder(ids, cache)  # more than 32 tokens a row: as the decoder itself
        assert torch.equal(read, llama.ours(ids, llama.ours.new_cache(2, 64)))
    decoder.logits(decoder(ids[:, :1], cache)).sum().backward()  # with gradients too
    assert llama.ours.norm.weight.grad is not None


def trained(decoder: Decoder) -> Decoder:
    """In place, as an optimizer does: every weight, norm and bias."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return decoder


def trained_behind_the_version_counter(decoder: Decoder) -> Decoder:
    for parameter in decoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return decoder


def assigned(decoder: Decoder) -> Decoder:
    state = trained(copy.deepcopy(decoder)).state_dict()
    decoder.load_state_dict(state, assign=True)
    return decoder


def adapted(decoder: Decoder) -> Decoder:
    add_lora(decoder, config("llama"), LoRASettings(r=2, target_modules=["mlp.down"]))
    return trained(decoder)


def folded(decoder: Decoder) -> Decoder:
    return fold(adapted(decoder))


def quantized(decoder: Decoder) -> Decoder:
    round_to(decoder, to_quantize(decoder, "int4", 32, "bfloat16"), 32)
    return decoder


def with_fewer_tokens(decoder: Decoder) -> Decoder:
    decoder.embedding = Embedding(60, decoder.architecture.width).to(decoder.dtype)
    return decoder


CHANGES: dict[str, Callable[[Decoder], Decoder]] = {
    "bfloat16": Decoder.bfloat16, "float16": Decoder.half, "float32": Decoder.float, "trained": trained,
    ".data": trained_behind_the_version_counter, "assigned": assigned, "adapted": adapted, "folded": folded,
    "quantized": quantized, "fewer tokens": with_fewer_tokens,
}  # fmt: skip


def continued(decoder: Decoder | CompiledDecoder, cached_by: Decoder) -> Tensor:
    """Logits of two rows in steps of one token, [2, 12, vocab_size]."""
    cache = cached_by.new_cache(2, 16)
    with torch.no_grad():
        steps = [decoder.logits(decoder(column, cache)) for column in (text(2, 12) % 60).split(1, dim=1)]
    return torch.cat(steps, dim=1).float()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2"])  # biases, norms with an offset, tied heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_decoder_is_read_anew_or_computes_itself(change: str, dtype: torch.dtype, family: str) -> None:
    torch.manual_seed(0)
    decoder = trained(build_decoder(config(family), seed=3).eval().to(dtype))
    if change in ("adapted", "folded") and family != "llama":
        pytest.skip("names of a llama")
    step = for_decoding(decoder)
    assert isinstance(step, CompiledDecoder)
    before = continued(step, decoder)
    CHANGES[change](decoder)
    after = continued(step, decoder)
    assert torch.equal(after, continued(for_decoding(decoder), decoder))
    plain = continued(decoder, decoder)
    most = 1e-3 if dtype == decoder.dtype == torch.float32 else 0.2
    assert (after - plain).norm() <= most * plain.norm()
    if decoder.dtype != dtype or change not in ("float32", "bfloat16"):
        assert not torch.equal(after, before)


def test_an_adapter_that_is_taken_away_again() -> None:
    decoder = trained(build_decoder(config("llama"), seed=3).eval())
    step, linear = for_decoding(decoder), decoder.blocks[1].mlp.down
    adapted(decoder)
    assert torch.equal(continued(step, decoder), continued(decoder, decoder))
    decoder.blocks[1].mlp.down = linear
    assert torch.equal(continued(step, decoder), continued(decoder, decoder))  # the others are still there
    fold(decoder)
    assert not torch.equal(continued(step, decoder), continued(decoder, decoder))
    assert torch.equal(continued(step, decoder), continued(for_decoding(decoder), decoder))


def test_a_decoder_on_another_device_computes_itself() -> None:
    decoder = build_decoder(config("llama"), seed=3).eval()
    step = for_decoding(decoder)
    decoder.to("meta")
    with torch.no_grad():
        hidden = step(torch.ones(2, 1, dtype=torch.long, device="meta"), decoder.new_cache(2, 16))
        assert hidden.is_meta
        assert step.logits(hidden).is_meta
        with pytest.raises((RuntimeError, NotImplementedError)):  # weights there, cache here
            step(torch.ones(2, 1, dtype=torch.long), build_decoder(config("llama"), seed=3).new_cache(2, 16))


@pytest.mark.parametrize("new", [1, 3, 32])
def test_a_row_does_not_depend_on_the_number_of_rows(new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, rows = build_decoder(config("gemma2"), seed=3).eval().bfloat16(), 70
    step, ids = for_decoding(decoder), text(rows, 2 * new)
    monkeypatch.setattr(Decoder, "forward", refuse)
    with torch.no_grad():
        together, alone = decoder.new_cache(rows, 2 * new), decoder.new_cache(rows, 2 * new)
        for columns in ids.split(new, dim=1):
            logits = step.logits(step(columns, together))
            for row in (0, 1, 31, 32, 33, 69):
                one = step.logits(step(columns[row : row + 1], alone[row : row + 1]))
                assert torch.equal(logits[row], one[0])
    assert together.lengths.tolist() == [2 * new] * rows


def test_caches_that_do_not_fit() -> None:
    decoder = build_decoder(config("llama"), seed=3).eval()
    step, ids = for_decoding(decoder), text(3, 1)
    other = build_decoder(config("llama").model_copy(update={"num_key_value_heads": 1}), seed=3)
    fewer = build_decoder(config("llama").model_copy(update={"num_hidden_layers": 2}), seed=3)
    with torch.no_grad():
        for cache in (decoder.new_cache(2, 16), other.new_cache(3, 16), fewer.new_cache(3, 16)):
            with pytest.raises(ValueError, match="keys"):
                step(ids, cache)
