"""FlexAttention inside documents is the masked attention: on this machine as it is, on a GPU compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slmkit.model import attend as module
from slmkit.model.attend import AttentionInputs, _starts, attend, block_mask, dense_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

TOKENS = 200


def documents() -> Tensor:
    """Rows of short documents, of one that fills the row, and of one-token documents."""
    draw = torch.Generator().manual_seed(0)
    short = (torch.rand(TOKENS, generator=draw) < 0.05).cumsum(0)
    return torch.stack([short, torch.zeros(TOKENS, dtype=torch.int64), torch.arange(TOKENS)])


def heads(kv_heads: int, device: str = "cpu") -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(3, 4, TOKENS, 32), (3, kv_heads, TOKENS, 32), (3, kv_heads, TOKENS, 16)]
    return [torch.randn(shape, generator=draw).to(device) for shape in shapes]


def views(window: int | None, device: str = "cpu") -> tuple[AttentionInputs, AttentionInputs]:
    """With a block mask, and with the mask written out here."""
    numbers = documents().to(device)
    columns = torch.arange(TOKENS, device=device)
    starts = _starts(numbers, columns)
    q, k = columns[:, None], columns[None]
    mask = (k <= q) & (numbers[:, :, None] == numbers[:, None, :])
    if window is not None:
        mask = mask & (k > q - window)
    blocks = AttentionInputs(None, None, None, None, False, block_mask(starts, window))
    return blocks, AttentionInputs(None, None, None, mask[:, None], False)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_blocks_equal_the_mask(window: int | None, cap: float | None, kv_heads: int) -> None:
    blocks, masked = views(window)
    ours, plain = (attend(*heads(kv_heads), view, 0.2, cap, 0.0) for view in (blocks, masked))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    assert torch.equal(dense_mask(blocks.blocks, torch.device("cpu")), masked.mask)


def test_dropout_and_small_heads_take_the_mask() -> None:
    blocks, masked = views(None)
    outcomes = []
    for view in (blocks, masked):
        torch.manual_seed(0)
        outcomes.append(attend(*heads(4), view, 0.2, None, 0.5))
    torch.testing.assert_close(*outcomes, atol=1e-5, rtol=0)
    small = [x[..., :8] for x in heads(4)]
    torch.testing.assert_close(attend(*small, blocks, 0.2, None, 0.0), attend(*small, masked, 0.2, None, 0.0))


@pytest.mark.parametrize("preset", ["gpt2", "gemma-3-270m"])
def test_a_whole_decoder_gives_the_same_either_way(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from slmkit.model.config import SLMConfig
    from slmkit.model.initialization import build_decoder

    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    windows = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
    config = SLMConfig.from_preset(preset, **sizes, **more, **({} if preset == "gpt2" else windows))
    decoder = build_decoder(config, seed=0).eval()
    ids = torch.randint(50, (3, TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        masked = decoder(ids, documents=documents())
        monkeypatch.setattr(module, "skips_blocks", lambda device: True)
        blocks = decoder(ids, documents=documents())
        torch.testing.assert_close(blocks, masked, atol=1e-5, rtol=0)
        assert not torch.allclose(blocks, decoder(ids), atol=1e-3)  # the documents matter


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 7])
def test_compiled_on_a_gpu_with_gradients(window: int | None) -> None:
    blocks, masked = views(window, "cuda")
    found = []
    for view in (blocks, masked):
        inputs = [x.requires_grad_() for x in heads(2, "cuda")]
        y = attend(*inputs, view, 0.2, None, 0.0)
        weight = torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape)
        found.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, atol=5e-3, rtol=5e-3)  # products in TF32
