"""On a GPU in bfloat16, ours is as near the truth (float32 on the CPU) as the reference is."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from tests.parity.configurations import DRAW
from tests.parity.twins import text, twins

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
