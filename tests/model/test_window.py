"""A layer with a window attends in blocks of queries: the outcome is that of the mask written out, at linear cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slmkit.model import attend as module
from slmkit.model.architectures import Layer
from slmkit.model.attend import QUERIES_AT_ONCE, AttentionInputs, Context, attend, block_mask, dense_mask
from slmkit.model.config import SLMConfig
from slmkit.model.initialization import build_decoder
from slmkit.model.sizes import flops_per_token
from tests.model.test_cache import FAMILIES, decoder_of, ids, in_pieces

SHORT = 5  # queries at once, so that short texts have many blocks
WITH_WINDOW = [family for family in FAMILIES if any(layer.window for layer in decoder_of(family).architecture.layers)]
LONG = 2 * QUERIES_AT_ONCE + 37  # tokens


def view_of(tokens: int, window: int) -> AttentionInputs:
    """Of a whole row, without documents."""
    ids_of_rows = torch.zeros(2, tokens, dtype=torch.long)
    return Context({Layer(window=window): 0}, {}, ids_of_rows, cache=None, documents=None).inputs[0]


def mask_of(tokens: int, window: int) -> Tensor:
    """Written out: query q sees keys q - window + 1 to q.  [tokens, tokens]"""
    return torch.tensor([[q - window < k <= q for k in range(tokens)] for q in range(tokens)])


def heads(tokens: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    shapes = [(2, 4, tokens, 16), (2, kv_heads, tokens, 16), (2, kv_heads, tokens, 16)]
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def outcome(inputs: list[Tensor], view: AttentionInputs, cap: float | None = None) -> list[Tensor]:
    """The output and the gradients of all three inputs, for one arbitrary loss."""
    y = attend(*inputs, view, 0.3, cap, 0.0)
    weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y.float() * weight).sum(), inputs)]


@pytest.mark.parametrize("tokens", [6, 10, 23])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 11, 22])
def test_blocks_of_queries_equal_the_mask(tokens: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", SHORT)
    view = view_of(tokens, window)
    assert (len(view.pieces) > 1) == (tokens > window)  # a window that holds the whole text is none
    masked = AttentionInputs(mask=mask_of(tokens, window)[None, None])
    for kv_heads, cap in [(1, None), (4, None), (2, 3.0)]:
        inputs = heads(tokens, kv_heads)
        for ours, plain in zip(outcome(inputs, view, cap), outcome(inputs, masked, cap)):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_length_of_real_blocks(dtype: torch.dtype) -> None:
    inputs, view = heads(LONG, 2, dtype), view_of(LONG, 300)
    assert len(view.pieces) == 3
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for ours, plain in zip(
        outcome(inputs, view), outcome(inputs, AttentionInputs(mask=mask_of(LONG, 300)[None, None]))
    ):
        torch.testing.assert_close(ours, plain, **tolerance)


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_window_off_by_one_is_noticed(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", SHORT)
    inputs = heads(23, 2)
    ours, plain = (
        outcome(inputs, view)[0] for view in (view_of(23, 7 + wrong), AttentionInputs(mask=mask_of(23, 7)[None, None]))
    )
    assert (ours - plain).abs().amax((0, 1, 3))[7:].min() > 1e-3  # at every query whose window is full


def whole(family: str, x: Tensor, **given: Tensor) -> Tensor:
    with torch.no_grad():
        return decoder_of(family)(x, **given)


@pytest.mark.parametrize("family", WITH_WINDOW)
def test_every_family_reads_the_same_in_blocks_of_queries(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows, rows of documents, rows with padding, and a cache that is filled in pieces and token by token."""
    x, padding = ids(), torch.tensor([3, 0])
    documents = torch.arange(40).expand(2, -1) // torch.tensor([[13], [21]])
    attention_mask = torch.arange(40) >= padding[:, None]

    def readings() -> list[Tensor]:
        decoder = decoder_of(family)
        rows = [
            whole(family, x),
            whole(family, x, documents=documents),
            whole(family, x, attention_mask=attention_mask),
        ]
        caches = [in_pieces(decoder, x, pieces) for pieces in ([40], [12, *[1] * 28], [6, 20, 1, 13])]
        return [*rows, *caches]

    in_one = readings()
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", SHORT)
    for one, blocks in zip(in_one, readings()):
        torch.testing.assert_close(blocks, one, rtol=0, atol=1e-5)


def test_masks_of_a_window_grow_with_the_text_and_not_with_its_square() -> None:
    sizes = [sum(p.mask.numel() for p in view_of(blocks * QUERIES_AT_ONCE, 512).pieces) for blocks in (8, 16, 32)]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])
    assert max(p.mask.size(-1) for p in view_of(8 * QUERIES_AT_ONCE, 512).pieces) == QUERIES_AT_ONCE + 511


def test_a_window_needs_fewer_operations() -> None:
    """Those that PyTorch counts are those that are foretold."""
    length = 16 * QUERIES_AT_ONCE
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16}
    decoder = build_decoder(
        SLMConfig(model_type="mistral", **sizes, max_position_embeddings=length, sliding_window=100)
    )
    full = build_decoder(SLMConfig(model_type="mistral", **sizes, max_position_embeddings=length))
    x = torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        decoder.logits(decoder(x))
    foretold = flops_per_token(decoder.architecture, length)
    assert counted.get_total_flops() / length - foretold.matrices == pytest.approx(foretold.attention, rel=0.05)
    assert foretold.attention < flops_per_token(full.architecture, length).attention / 10


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [1, 7, 128, 129, 130, LONG - 1])
def test_a_block_mask_is_the_same_window(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "skips_blocks", lambda device: True)
    blocks, mask = view_of(LONG, window).blocks, mask_of(LONG, window)[None, None]
    assert torch.equal(dense_mask(blocks, torch.device("cpu")), mask)
    inputs = [x.detach() for x in heads(LONG, 2)]
    ours, plain = (
        attend(*inputs, view, 0.3, None, 0.0) for view in (AttentionInputs(blocks=blocks), AttentionInputs(mask=mask))
    )
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    # A compiled kernel visits just these blocks.
    every_element = block_mask(torch.zeros(1, LONG, dtype=torch.long), window)
    assert torch.equal(blocks.to_dense(), every_element.to_dense())
