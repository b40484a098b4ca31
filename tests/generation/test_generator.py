"""Generation equals the reference, token for token, and ends where it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slmkit.config import UserError
from slmkit.generation import SamplingSettings, generate_ids
from slmkit.generation.generator import token_steps
from slmkit.model import build_decoder, save_decoder
from slmkit.model.decoder import Decoder
from tests.model.test_decoder import ids, tiny

GREEDY = SamplingSettings(do_sample=False)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return build_decoder(tiny(), seed=4).eval()


def generate(
    decoder: Decoder, prompt: torch.Tensor, count: int, stop_ids: set[int] = frozenset(), **kw
) -> torch.Tensor:
    settings = kw.pop("settings", GREEDY)
    return generate_ids(decoder, prompt, max_new_tokens=count, stop_ids=stop_ids, settings=settings, pad_token_id=96)


@pytest.mark.parametrize("length", [1, 5, 30])
def test_greedy_tokens_equal_transformers(decoder: Decoder, length: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_decoder(decoder, tiny(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = ids(3, length)
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, pad_token_id=96
    )
    assert torch.equal(generate(decoder, prompt, 24), expected)


def test_with_the_cache_or_without_the_tokens_are_the_same(decoder: Decoder) -> None:
    x = ids(2, 4)
    with torch.no_grad():
        for _ in range(20):
            x = torch.cat((x, decoder.logits(decoder(x)[:, -1]).argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(decoder, ids(2, 4), 20), x)


def test_a_row_in_a_batch_is_the_row_alone(decoder: Decoder) -> None:
    together = generate(decoder, ids(4, 6), 16)
    for row in range(4):
        assert torch.equal(generate(decoder, ids(4, 6)[row : row + 1], 16)[0], together[row])


def test_a_row_that_has_ended_is_padded_and_keeps_its_end_token(decoder: Decoder) -> None:
    free = generate(decoder, ids(3, 5), 20)
    stop = int(free[0, 8])
    stopped = generate(decoder, ids(3, 5), 20, stop_ids={stop})
    first = free[0, 5:].tolist().index(stop) + 5
    assert torch.equal(stopped[0, : first + 1], free[0, : first + 1])
    assert (stopped[0, first + 1 :] == 96).all()


def test_it_ends_at_once_when_all_rows_have_ended(decoder: Decoder) -> None:
    assert generate(decoder, ids(2, 5), 20, stop_ids=set(range(97))).shape == (2, 6)


def test_it_ends_where_the_context_is_full(decoder: Decoder) -> None:
    assert generate(decoder, ids(1, 60), 100).shape == (1, 64)


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(decoder: Decoder) -> None:
    first, again, other = (generate(decoder, ids(2, 5), 20, settings=SamplingSettings(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_prompt_of_no_tokens_is_refused(decoder: Decoder) -> None:
    with pytest.raises(UserError, match="no tokens"):
        generate(decoder, ids(1, 5)[:, :0], 3)


@pytest.mark.parametrize("length", [64, 90])
def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(decoder: Decoder, length: int) -> None:
    with pytest.raises(UserError, match=rf"{length} tokens .* context of 64"):
        generate(decoder, ids(1, length), 3)


def test_the_model_is_left_in_the_mode_it_was_in_even_when_broken_off() -> None:
    decoder = build_decoder(tiny(hidden_dropout=0.5)).train()
    steps = token_steps(decoder, ids(1, 3), 10, GREEDY)
    next(steps)
    assert not decoder.training
    steps.close()
    assert decoder.training
