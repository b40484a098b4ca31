"""On a GPU in bfloat16, ours is as near the truth (float32 on the CPU) as the reference is."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from slmkit.model import attend
from tests.parity.configurations import DRAW
from tests.parity.test_wrong_readings import GEMMA3
from tests.parity.twins import text, twins, twins_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("family", DRAW)
@pytest.mark.parametrize("number", range(3))
def test_logits_in_bfloat16(family: str, number: int) -> None:
    pair, ids = twins(family, number), text()
    ours, theirs = (copy.deepcopy(model).to("cuda", torch.bfloat16) for model in (pair.ours, pair.theirs))
    with torch.no_grad():
        truth = pair.theirs(ids).logits
        error = (ours.logits(ours(ids.cuda())).float().cpu() - truth).norm() / truth.norm()
        errors_of_reference = (theirs(ids.cuda()).logits.float().cpu() - truth).norm() / truth.norm()
    assert error < 2 * errors_of_reference + 0.01


@pytest.mark.parametrize("with_documents", [False, True])
def test_a_window_in_blocks_is_the_window_on_a_cpu(with_documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a block of queries, forward and backward, with FlexAttention and by blocks of queries."""
    settings = GEMMA3[1] | {"head_dim": 16, "sliding_window": 150, "max_position_embeddings": 600}
    ours, ids = twins_of("Gemma3", settings).ours, text(2, 600)
    documents = (torch.arange(600) // 170).expand(2, -1) if with_documents else None
    expected = ours(ids, documents=documents)
    expected.square().mean().backward()
    for in_blocks in (True, False):
        on_gpu = copy.deepcopy(ours).cuda()
        on_gpu.zero_grad()
        monkeypatch.setattr(attend, "skips_blocks", lambda device, answer=in_blocks: answer)
        found = on_gpu(ids.cuda(), documents=None if documents is None else documents.cuda())
        found.square().mean().backward()
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)  # products in TF32
        for (name, theirs), parameter in zip(ours.blocks.named_parameters(), on_gpu.blocks.parameters(), strict=True):
            error = (parameter.grad.cpu() - theirs.grad).norm() / theirs.grad.norm()
            assert error < 0.02, (name, in_blocks)
