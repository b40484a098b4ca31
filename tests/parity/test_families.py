"""Every family computes what its reference implementation computes, whatever its config says within its rights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("transformers")

from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.families import family_of
from slmkit.model.files.directory import save_decoder, stored_names
from tests.long import several
from tests.parity.configurations import DRAW, PER_FAMILY
from tests.parity.twins import BEFORE_5, Twins, text, twins, twins_of

CONFIGURATIONS = [(family, number) for family in DRAW for number in range(several(4, PER_FAMILY))]
every_configuration = pytest.mark.parametrize(("family", "number"), CONFIGURATIONS, ids=lambda value: str(value))
GREEDY = SamplingSettings(do_sample=False)


def logits_of(pair: Twins, ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return pair.ours.logits(pair.ours(ids)), pair.theirs(ids).logits


@every_configuration
def test_logits(family: str, number: int) -> None:
    ours, theirs = logits_of(twins(family, number), text())
    assert (ours - theirs).abs().max() <= 1e-4


@every_configuration
def test_what_we_save_is_what_transformers_loads(family: str, number: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pair = twins(family, number)
    save_decoder(pair.ours, pair.config, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert (again(text()).logits - pair.theirs(text()).logits).abs().max() <= 1e-4


@every_configuration
def test_64_greedy_tokens_through_the_cache(family: str, number: int) -> None:
    pair, prompt = twins(family, number), text(2, 7)
    ours = generate_ids(pair.ours, prompt, max_new_tokens=64, stop_ids=set(), settings=GREEDY, pad_token_id=0)
    assert torch.equal(ours[:, :7], prompt)
    assert ours.shape == (2, 7 + 64)
    # Without the reference's own cache, which with a window of one position does not give what it gives without.
    with torch.no_grad():
        expected = pair.theirs(ours[:, :-1], use_cache=False).logits[:, 6:].argmax(-1)
    assert torch.equal(ours[:, 7:], expected)


@every_configuration
def test_gradients(family: str, number: int) -> None:
    pair, ids = twins(family, number), text()
    for model, logits in ((pair.ours, pair.ours.logits(pair.ours(ids))), (pair.theirs, pair.theirs(ids).logits)):
        model.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    ours = {name: parameter.grad for name, parameter in pair.ours.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    names = stored_names(pair.ours.state_dict(), family_of(family))
    assert names.keys() == theirs.keys()
    for name, parts in names.items():
        gradient = torch.cat([ours[part] for part in parts])
        expected = theirs[name].T if name.endswith(family_of(family).transposed) else theirs[name]
        assert (gradient - expected).norm() <= 1e-3 * expected.norm() + 1e-6, name


# One rotation for all layers, which the reference can stretch (OLMo 2's only since its version 5).
STRETCHED = [
    family
    for family in DRAW
    if family != "gpt2" and not family_of(family).rope_by_kind and not (BEFORE_5 and family == "olmo2")
]
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 100.0},
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("family", STRETCHED)
def test_dynamic_ntk(family: str) -> None:
    """Equal at every length. Cached, only up to the original one: what is cached was computed with the base of then."""
    name, draw = DRAW[family]
    pair = twins_of(name, draw(random.Random(family)) | DYNAMIC)
    for length in (15, 17, 100):
        ours, theirs = logits_of(pair, text(2, length))
        assert (ours - theirs).abs().max() <= 1e-4, length
    prompt = text(2, 7)
    expected = pair.theirs.generate(prompt, do_sample=False, max_new_tokens=9, use_cache=False, pad_token_id=0)
    ours = generate_ids(pair.ours, prompt, max_new_tokens=9, stop_ids=set(), settings=GREEDY, pad_token_id=0)
    assert torch.equal(ours, expected)
