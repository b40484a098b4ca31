"""Generation equals the reference, token for token, and ends where it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slmkit.config import UserError
from slmkit.generation.engine import Engine, Event, Request
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from tests.model.test_decoder import ids, tiny

GREEDY = SamplingSettings(do_sample=False)
PAD = 96


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return build_decoder(tiny(), seed=4).eval()


@pytest.fixture(scope="module")
def reference(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory):
    transformers = pytest.importorskip("transformers")
    directory: Path = tmp_path_factory.mktemp("model")
    save_decoder(decoder, tiny(), directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def generate(
    decoder: Decoder, prompt: torch.Tensor, count: int, stop_ids: set[int] = frozenset(), settings=GREEDY
) -> torch.Tensor:
    return generate_ids(decoder, prompt, max_new_tokens=count, stop_ids=stop_ids, settings=settings, pad_token_id=PAD)


def events(
    decoder: Decoder, prompt: torch.Tensor, count: int, stop_ids: set[int] = frozenset(), settings=GREEDY
) -> Iterator[Event]:
    """What the engine says of one request, as it is asked for the next step."""
    engine = Engine(decoder)
    engine.insert(Request(prompt[0].tolist(), count, settings, stop_ids))
    return (event for _ in range(count) if engine.is_busy for event in engine.step())


def stream(decoder: Decoder, prompt: torch.Tensor, count: int, settings=GREEDY) -> Iterator[int]:
    return (event.token for event in events(decoder, prompt, count, settings=settings))


@pytest.mark.parametrize("length", [1, 5, 30])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_tokens_equal_transformers(decoder: Decoder, reference, length: int, penalty: float) -> None:
    prompt = ids(3, length)
    expected = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, pad_token_id=PAD,
        repetition_penalty=penalty,
    )  # fmt: skip
    settings = SamplingSettings(do_sample=False, repetition_penalty=penalty)
    assert torch.equal(generate(decoder, prompt, 24, settings=settings), expected)


def test_rows_end_and_are_padded_as_in_transformers(decoder: Decoder, reference) -> None:
    prompt = ids(4, 5)
    free = generate(decoder, prompt, 24)
    stops = {int(free[0, 9]), int(free[2, 20])}
    expected = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, pad_token_id=PAD,
        eos_token_id=sorted(stops),
    )  # fmt: skip
    ours = generate(decoder, prompt, 24, stops)
    assert (ours[0, -3:] == PAD).all()
    assert torch.equal(ours, expected)


def test_with_the_cache_or_without_every_token_is_the_same(decoder: Decoder) -> None:
    x = ids(2, 4)
    with torch.no_grad():
        for _ in range(60):
            x = torch.cat((x, decoder.logits(decoder(x)[:, -1]).argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(decoder, ids(2, 4), 60), x)


def test_a_row_in_a_batch_is_the_row_alone(decoder: Decoder) -> None:
    together = generate(decoder, ids(4, 6), 16)
    for row in range(4):
        assert torch.equal(generate(decoder, ids(4, 6)[row : row + 1], 16)[0], together[row])


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(temperature=0.8, top_p=0.9, seed=7)])
def test_a_stream_gives_what_a_batch_of_one_gives(decoder: Decoder, settings: SamplingSettings) -> None:
    whole = generate(decoder, ids(1, 6), 30, settings=settings)
    assert list(stream(decoder, ids(1, 6), 30, settings)) == whole[0, 6:].tolist()


@pytest.mark.parametrize("padding", [None, torch.tensor([2, 0])], ids=["as long", "padded"])
def test_several_texts_of_a_prompt_are_those_of_the_prompt_said_several_times(
    decoder: Decoder, padding: torch.Tensor | None
) -> None:
    prompt, settings = ids(2, 6), SamplingSettings(repetition_penalty=1.3, seed=5)
    asked = {"max_new_tokens": 12, "stop_ids": {3}, "settings": settings, "pad_token_id": PAD}
    found = generate_ids(decoder, prompt, num_return_sequences=3, padding=padding, **asked)
    repeated = None if padding is None else padding.repeat_interleave(3)
    expected = generate_ids(decoder, prompt.repeat_interleave(3, dim=0), padding=repeated, **asked)
    assert torch.equal(found, expected)
    assert not torch.equal(found[0], found[1])
    with pytest.raises(UserError, match="num_return_sequences 0: expected 1 or more"):
        generate_ids(decoder, prompt, num_return_sequences=0, **asked)


def test_it_ends_at_once_when_all_rows_have_ended(decoder: Decoder) -> None:
    assert generate(decoder, ids(2, 5), 20, stop_ids=set(range(97))).shape == (2, 6)


def test_it_ends_where_the_context_is_full(decoder: Decoder) -> None:
    assert generate(decoder, ids(1, 60), 100).shape == (1, 64)


@pytest.mark.parametrize(("count", "reason", "tokens"), [(3, "length", 3), (4, "length", 4), (5, "context", 4)])
def test_a_stream_says_whether_length_or_context_ended_it(
    decoder: Decoder, count: int, reason: str, tokens: int
) -> None:
    said = list(events(decoder, ids(1, 60), count))
    assert [event.finish_reason for event in said] == [*[None] * (tokens - 1), reason]


def test_a_stream_ends_with_the_stop_token_and_says_so(decoder: Decoder) -> None:
    free = list(stream(decoder, ids(1, 5), 20))
    stopped = list(events(decoder, ids(1, 5), 20, stop_ids={free[6]}))
    assert [event.token for event in stopped] == free[: free.index(free[6]) + 1]
    assert stopped[-1].finish_reason == "stop"


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(decoder: Decoder) -> None:
    first, again, other = (generate(decoder, ids(2, 5), 20, settings=SamplingSettings(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_prompt_of_no_tokens_is_refused(decoder: Decoder) -> None:
    for make in (generate, stream):
        with pytest.raises(UserError, match="an empty prompt: give at least one token"):
            make(decoder, ids(1, 5)[:, :0], 3)


@pytest.mark.parametrize("length", [64, 90])
def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(decoder: Decoder, length: int) -> None:
    for make in (generate, stream):
        with pytest.raises(UserError, match=rf"{length} tokens .* context of 64"):
            make(decoder, ids(1, length), 3)


def test_no_new_tokens_at_all_is_refused(decoder: Decoder) -> None:
    with pytest.raises(UserError, match="max_new_tokens 0: expected 1 or more"):
        generate(decoder, ids(1, 5), 0)


def test_between_two_tokens_model_and_gradients_are_as_the_caller_left_them() -> None:
    decoder = build_decoder(tiny(hidden_dropout=0.5), seed=4).train()
    tokens = stream(decoder, ids(1, 3), 10)
    said = [next(tokens)]
    assert all(module.training for module in decoder.modules())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    decoder.logits(decoder(ids(1, 3))).sum().backward()  # as training between two tokens would
    said += tokens
    assert said == list(stream(decoder.eval(), ids(1, 3), 10))  # without dropout


def test_a_step_keeps_no_gradients(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmkit.generation.engine.for_decoding", lambda same: same)  # `forward` for every token
    seen, forward = [], decoder.forward
    monkeypatch.setattr(
        decoder, "forward", lambda x, cache: seen.append(torch.is_inference_mode_enabled()) or forward(x, cache)
    )
    generate(decoder, ids(1, 3), 4)
    assert seen == [True] * 4


def test_a_step_that_fails_leaves_the_model_in_the_mode_it_was_in(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = build_decoder(tiny()).train()
    monkeypatch.setattr(decoder.blocks[1], "forward", lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(stream(decoder, ids(1, 3), 3))
    assert decoder.training
    assert not torch.is_inference_mode_enabled()


def test_streams_of_one_model_do_not_disturb_each_other(decoder: Decoder) -> None:
    first, second = stream(decoder, ids(1, 5), 8), stream(decoder, ids(1, 9), 12)
    taken: tuple[list[int], list[int]] = ([], [])
    for _ in range(8):
        taken[0].append(next(first))
        taken[1].append(next(second))
    assert next(first, None) is None
    taken[1].extend(second)
    assert taken[0] == generate(decoder, ids(1, 5), 8)[0, 5:].tolist()
    assert taken[1] == generate(decoder, ids(1, 9), 12)[0, 9:].tolist()


def test_what_is_generated_can_be_trained_on(decoder: Decoder) -> None:
    generated = generate(decoder, ids(2, 4), 6)
    decoder.logits(decoder(generated)).sum().backward()
    assert decoder.embedding.weight.grad is not None
    decoder.zero_grad(set_to_none=True)
