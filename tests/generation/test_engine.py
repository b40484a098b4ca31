"""The engine: a request gets the same beside others as alone; slots are shared, copied and freed."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from slmkit.config import UserError
from slmkit.generation.constraints import Grammar
from slmkit.generation.engine import Engine, Event, Request
from slmkit.generation.ensemble import Ensemble, LanguageModel
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from tests.generation.helpers import TOKENIZER, ByteTokens, ScriptedModel, byte_decoder
from tests.long import several
from tests.model.test_cache import config, decoder_of, unlike_families
from tests.model.test_decoder import tiny

GREEDY = SamplingSettings(do_sample=False)
# Requests of one model with every kind of setting, as a chat, a script and a tool may send them at the same time.
SETTINGS = [
    SamplingSettings(seed=1),
    SamplingSettings(seed=2, repetition_penalty=1.3),
    SamplingSettings(seed=3, presence_penalty=0.8),
    SamplingSettings(seed=4, logit_bias={5: 100.0}),
    SamplingSettings(seed=5, logit_bias={7: -100.0, 8: -100.0}),
    SamplingSettings(seed=6, top_k=1),
    SamplingSettings(seed=7, min_p=0.1),
    SamplingSettings(seed=8, typical_p=0.8, temperature=0.7),
    SamplingSettings(seed=9, top_p=0.9, frequency_penalty=0.5),
    GREEDY,
    SamplingSettings(do_sample=False, repetition_penalty=1.2),
    SamplingSettings(seed=10, temperature=2.0),
]


def numbers(count: int, seed: int, vocab_size: int = 97) -> list[int]:
    return np.random.default_rng(seed).integers(vocab_size, size=count).tolist()


def run(engine: Engine, events: list[Event] | None = None) -> list[Event]:
    found = [] if events is None else events
    while engine.is_busy:
        found += engine.step()
    return found


def tokens_of(events: Sequence[Event]) -> dict[tuple[int, int], list[int]]:
    """(handle, index) → the row's new ids."""
    found = defaultdict(list)
    for event in events:
        found[event.handle, event.index].append(event.token)
    return dict(found)


def alone(decoder: LanguageModel, request: Request, tokenizer: object = None) -> list[list[int]]:
    events = tokens_of(run_request(decoder, request, tokenizer))
    return [events[key] for key in sorted(events)]


def run_request(decoder: LanguageModel, request: Request, tokenizer: object = None) -> list[Event]:
    engine = Engine(decoder, tokenizer, reuse=False)
    engine.insert(request)
    return run(engine)


def plain(decoder: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens, each from the whole text without a cache."""
    x = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            x = torch.cat((x, decoder.logits(decoder(x)[:, -1]).argmax(-1, keepdim=True)), dim=1)
    return x[0, len(prompt) :].tolist()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read three tokens at a time."""
    for module in ("engine", "slots"):
        monkeypatch.setattr(f"slmkit.generation.{module}.AT_ONCE", 3)


@unlike_families
@pytest.mark.usefixtures("small_pieces")
def test_every_family_says_what_it_says_without_cache_batch_or_pieces(family: str) -> None:
    """Windows are shorter than the texts; prompts are read in pieces; rows join while others run."""
    decoder = decoder_of(family).double()
    prompts = [numbers(length, length) for length in (1, 20, 5, 11, 2)]
    engine, events = Engine(decoder, max_rows=3), []
    for prompt in prompts:
        engine.insert(Request(prompt, 18, GREEDY))
        events += engine.step()
    found = tokens_of(run(engine, events))
    for handle, prompt in enumerate(prompts):
        assert found[handle, 0] == plain(decoder, prompt, 18), handle


@unlike_families
@pytest.mark.usefixtures("small_pieces")
def test_every_family_goes_on_from_what_another_text_has_read(family: str) -> None:
    decoder, shared = decoder_of(family).double(), numbers(17, 3)
    engine = Engine(decoder, max_rows=2)
    for more in ([], numbers(4, 1), numbers(9, 2)):
        engine.insert(Request(shared + more, 15, GREEDY))
        found = tokens_of(run(engine))
        assert list(found.values()) == [plain(decoder, shared + more, 15)]


def requests(count: int = 12, vocab_size: int = 97) -> list[Request]:
    """Different prompts, settings, lengths, end tokens, and one with two continuations."""
    made = []
    for number in range(count):
        settings = SETTINGS[number % len(SETTINGS)]
        stop_ids = {5, 6} if number % 4 == 1 else set()
        prompt = numbers(1 + 3 * number, number // 2, vocab_size)
        made.append(
            Request(prompt, 2 + number // 4, settings, stop_ids, n=2 if number == 7 else 1, logprobs=number % 3)
        )
    return made


def with_text() -> list[Request]:
    """The same with stop strings and grammars."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    extra: list[dict[str, object]] = [{} for _ in range(12)]
    extra[0] = {"stop": ["a", "\N{REPLACEMENT CHARACTER}"]}
    extra[3] = {"grammar": Grammar.regex(TOKENIZER, "[ab]{3}c*"), "max_new_tokens": 9}
    extra[6] = {"grammar": Grammar.json_schema(TOKENIZER, schema), "max_new_tokens": 9}
    extra[9] = {"grammar": Grammar.choices(TOKENIZER, ["yes", "no", "\N{GRINNING FACE}"]), "max_new_tokens": 9}
    return [replace(request, **more) for request, more in zip(requests(vocab_size=250), extra)]


@pytest.fixture(scope="module")
def exact() -> Decoder:
    """In double precision, where a batch of another size rounds too little to matter."""
    return exact_decoder()


def exact_decoder(vocab_size: int = 97) -> Decoder:
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    small = config("gemma3_text").model_copy(update=layers | {"vocab_size": vocab_size})
    return build_decoder(small, seed=3).eval().double()


@pytest.mark.slow
def test_many_rounds_of_twelve_mixed_requests_in_any_order() -> None:
    asked, model = with_text(), exact_decoder(260)
    expected = [alone(model, request, TOKENIZER) for request in asked]
    assert "".join(event.text for event in run_request(model, asked[3], TOKENIZER))[:3].strip("ab") == ""
    shuffled = random.Random(5)
    engine = Engine(model, TOKENIZER, max_rows=5)  # goes on with the slots, and what they hold, of the rounds before
    for _ in range(several(30, 200)):
        handles, order, events = {}, shuffled.sample(range(12), 12), []
        for number in order:
            handles[engine.insert(asked[number])] = number
            for _ in range(shuffled.randint(0, 2)):
                events += engine.step()
        found = tokens_of(run(engine, events))
        for handle, number in handles.items():
            assert [found[handle, index] for index in range(asked[number].n)] == expected[number], SETTINGS[number]


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    decoder = decoder_of("llama")
    plain_ids = alone(decoder, Request([1, 2, 3], 4, GREEDY, {9}))
    for prompt in (np.array([1, 2, 3]), torch.tensor([1, 2, 3])):
        assert alone(decoder, Request(prompt, np.int64(4), GREEDY, {np.int64(9)})) == plain_ids


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"max_rows": True}, {"max_rows": 1.5}, {"memory": float("nan")}])
def test_an_engine_that_could_never_run_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} .*: expected"):
        Engine(decoder_of("llama"), **options)


@pytest.mark.parametrize("failing", ["before", "after"])
def test_a_step_that_fails_may_be_made_again(exact: Decoder, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C: rows that run, are read and wait go on as if nothing had happened."""
    engine = Engine(exact, max_rows=3)
    asked = [Request(numbers(length, length), 8, GREEDY) for length in (5, 12, 40, 3)]
    handles, events = [engine.insert(request) for request in asked], []
    name = "_decode" if failing == "before" else "_choose"
    original = getattr(engine, name)
    failures = iter([True, False, True, True, False, True])

    def fail(*inputs: object) -> object:
        if failing == "after":
            raise KeyboardInterrupt
        original(*inputs)
        raise KeyboardInterrupt

    while engine.is_busy:
        with monkeypatch.context() as patch:
            if next(failures, False):
                patch.setattr(engine, name, fail)
                with pytest.raises(KeyboardInterrupt):
                    engine.step()
        events += engine.step()
    found = tokens_of(events)
    assert [found[handle, 0] for handle in handles] == [alone(exact, request)[0] for request in asked]


def test_a_grammar_that_leaves_no_token_ends_its_row_alone() -> None:
    known = np.ones(260, bool)
    known[TOKENIZER.encode("ab")] = False
    engine = Engine(byte_decoder(), TOKENIZER, known=known)
    stuck = engine.insert(Request([72], 5, GREEDY, grammar=Grammar.regex(TOKENIZER, "[ab]+")))
    other = engine.insert(Request([72], 5, GREEDY))
    events = run(engine)
    assert [(event.finish_reason, "no token is left" in event.error) for event in events if event.handle == stuck] == [
        ("error", True)
    ]
    assert len(tokens_of(events)[other, 0]) == 5


def test_a_grammar_that_outgrows_its_limits_ends_its_row_alone() -> None:
    # The mask allows `{`, after which any of the optional keys may come: more than the parser's items in a row.
    schema = {
        "type": "object",
        "properties": {f"p{number}": {"type": "integer"} for number in range(1500)},
        "additionalProperties": False,
    }
    engine = Engine(byte_decoder(), TOKENIZER)
    large = engine.insert(Request([72], 5, GREEDY, grammar=Grammar.json_schema(TOKENIZER, schema)))
    other = engine.insert(Request([72], 5, GREEDY))
    events = run(engine)
    assert [(event.finish_reason, "max is 2000" in event.error) for event in events if event.handle == large] == [
        ("error", True)
    ]
    assert len(tokens_of(events)[other, 0]) == 5


def test_an_ensemble_runs_as_a_model_does() -> None:
    members = [decoder_of("llama").double(), decoder_of("gemma3_text").double()]
    both, asked = Ensemble(members), requests(6)
    engine = Engine(both, max_rows=4)
    handles = [engine.insert(request) for request in asked]
    found = tokens_of(run(engine))
    assert [found[handle, 0] for handle in handles] == [alone(both, request)[0] for request in asked]


def test_continuations_differ_and_are_the_same_again(exact: Decoder) -> None:
    request = Request(numbers(9, 1), 12, SamplingSettings(seed=7), n=3)
    first, again = alone(exact, request), alone(exact, request)
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == 3
    assert first[0] == alone(exact, Request(numbers(9, 1), 12, SamplingSettings(seed=7)))[0]
    unseeded = alone(exact, Request(numbers(9, 1), 12, n=3))
    assert len({tuple(tokens) for tokens in unseeded}) == 3


# -- life of a row ----------------------------------------------------------------------------------------------------


def test_a_removed_row_says_nothing_more_and_its_slot_goes_to_the_next_at_once(exact: Decoder) -> None:
    engine = Engine(exact, max_rows=2)
    first, second, third = (engine.insert(Request(numbers(5, seed), 40, GREEDY)) for seed in range(3))
    assert {event.handle for event in engine.step()} == {first, second}
    engine.remove(first)
    assert {event.handle for event in engine.step()} == {second, third}
    engine.remove(third)
    engine.remove(third)
    rest = tokens_of(run(engine))
    assert set(rest) == {(second, 0)}
    assert rest[second, 0] == plain(exact, numbers(5, 1), 40)[2:]


def test_a_row_removed_while_it_waits_or_is_read_never_starts(exact: Decoder) -> None:
    engine = Engine(build_decoder(tiny(max_position_embeddings=2048)).eval(), max_rows=1)
    reading, waiting = (engine.insert(Request(numbers(1000, seed), 4, GREEDY)) for seed in range(2))
    assert engine.step() == []
    engine.remove(waiting)
    engine.remove(reading)
    assert not engine.is_busy
    assert engine.step() == []


def test_a_long_prompt_stalls_nobody() -> None:
    decoder = build_decoder(tiny(max_position_embeddings=4096)).eval()
    engine = Engine(decoder)
    talking = engine.insert(Request(numbers(5, 1), 100, GREEDY))
    engine.step()
    long = engine.insert(Request(numbers(3000, 2), 5, GREEDY))
    for _ in range(3000 // 256):
        assert [event.handle for event in engine.step()] == [talking]
    assert [event.handle for event in engine.step()] == [talking, long]


def test_a_row_without_finite_logits_ends_alone() -> None:
    class Broken(ScriptedModel):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden).masked_fill(hidden == 9, torch.nan)

    model = Broken(260, 4, [65] * 40)
    engine = Engine(model)
    first, second = engine.insert(Request([1] * 8, 3, GREEDY)), engine.insert(Request([1] * 4, 3, GREEDY))
    events = run(engine)
    (fault,) = [event for event in events if event.error]
    assert (fault.handle, fault.finish_reason, fault.token) == (first, "error", None)
    assert "not finite" in fault.error
    assert tokens_of(events)[second, 0] == [65, 65, 65]


def test_ids_without_a_token_are_never_drawn() -> None:
    known = np.zeros(60, bool)
    known[[3, 4, 50]] = True
    engine = Engine(decoder_of("llama"), known=known)
    for seed in range(5):
        engine.insert(Request([1, 2], 10, SamplingSettings(seed=seed, temperature=5.0)))
    assert {event.token for event in run(engine)} == {3, 4, 50}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 3), "an empty prompt"),
        (Request([1] * 64, 3), "a prompt of 64 tokens fills the model's context of 64"),
        (Request([1], 0), "max_new_tokens 0: expected 1 or more"),
        (Request([1], 3, n=0), "n 0: expected a whole number from 1 to 65,536"),
        (Request([1], 3, n=True), "n True: expected a whole number"),
        (Request([1], -3), "max_new_tokens -3: expected a whole number from 0"),
        (Request([1], 3.0), "max_new_tokens 3.0: expected a whole number"),
        (Request([1], 3, logprobs=-1), "logprobs -1: expected a whole number from 0 to 97"),
        (Request([1], 3, prompt_logprobs=98), "prompt_logprobs 98: expected a whole number from 0 to 97"),
        (Request([1, 97], 3), "token 97 of the prompt: the model has 97 tokens"),
        (Request([-1], 3), "token -1 of the prompt"),
        (Request([1], 3, n=10**9), "n 1000000000: expected a whole number from 1 to 65,536"),
        (Request([1], float("nan")), "max_new_tokens nan: expected a whole number"),
        (Request("abc", 3), "prompt: expected a list of token ids, found 'abc'"),
        (Request(None, 3), "prompt: expected a list of token ids, found None"),
        (Request([1.0, 2.0], 3), "prompt: expected a list of token ids"),
        (Request([[1]], 3), "prompt: expected a list of token ids"),
        (Request([1], 3, stop_ids=5), "stop_ids: expected a list of token ids, found 5"),
        (Request([1], 3, None), "settings: expected SamplingSettings, found None"),
        (Request([1], 3, grammar="a*"), "grammar: expected a constraints.Grammar"),
        (Request([1], 3, SamplingSettings(logit_bias={97: 1.0})), "logit_bias: the id 97 is not below"),
        (Request([1], 3, stop=["x"]), "stop strings and grammars need a tokenizer"),
    ],
)
def test_what_cannot_be_done_is_refused(request_: Request, message: str) -> None:
    engine = Engine(decoder_of("llama"))
    with pytest.raises(UserError, match=message):
        engine.insert(request_)
    assert not engine.is_busy


@pytest.mark.parametrize(
    ("prompt", "count", "said", "reason"), [(62, 9, 2, "context"), (63, 1, 1, "length"), (60, 4, 4, "length")]
)
def test_a_text_ends_where_the_context_does(prompt: int, count: int, said: int, reason: str) -> None:
    events = run_request(decoder_of("llama"), Request(numbers(prompt, 1), count, GREEDY))
    assert (len(events), events[-1].finish_reason) == (said, reason)


def test_a_continuation_that_ends_does_not_stop_the_others(exact: Decoder) -> None:
    request = Request(numbers(9, 1), 20, SamplingSettings(seed=7), n=3)
    free = alone(exact, request)
    end = next(token for token in free[1][3:10] if token not in free[0] + free[2])
    engine = Engine(exact, max_rows=2)
    engine.insert(replace(request, stop_ids=frozenset({end})))
    ended = tokens_of(run(engine))
    assert [ended[0, index] for index in range(3)] == [free[0], free[1][: free[1].index(end) + 1], free[2]]


# -- memory -----------------------------------------------------------------------------------------------------------


def test_rows_wait_in_order_for_memory_and_a_short_text_does_not_overtake() -> None:
    decoder = build_decoder(tiny(max_position_embeddings=2048)).eval()
    one = decoder.cache_bytes(1, 2048, 256)
    engine = Engine(decoder, memory=int(1.5 * one))
    long, longer, short = (engine.insert(Request([1] * length, 5, GREEDY)) for length in (600, 1100, 3))
    order = list(dict.fromkeys(event.handle for event in run(engine)))
    assert order == [long, longer, short]
    for handle, length in ((long, 600), (longer, 1100), (short, 3)):
        engine.insert(Request([1] * length, 5, GREEDY))
        assert len(run(engine)) == 5, handle


def test_more_than_the_memory_is_refused_with_both_numbers() -> None:
    decoder = build_decoder(tiny(max_position_embeddings=2048)).eval()
    engine = Engine(decoder, memory=decoder.cache_bytes(1, 64, 256))
    with pytest.raises(UserError, match=r"1005 tokens need 0\.\d MiB of KV cache, more than the allowed 0\.\d MiB"):
        engine.insert(Request([1] * 1000, 5, GREEDY))


def test_the_caches_never_take_more_than_their_memory(exact: Decoder) -> None:
    decoder = build_decoder(tiny(max_position_embeddings=2048)).eval()
    limit = decoder.cache_bytes(5, 512, 256)
    engine, pick = Engine(decoder, memory=limit), random.Random(3)
    expected = {}
    for _ in range(30):
        request = Request(numbers(pick.choice([2, 40, 300, 500, 900]), pick.randrange(9)), pick.randint(1, 9), GREEDY)
        expected[engine.insert(request)] = alone(decoder, request)[0]
    events = []
    while engine.is_busy:
        events += engine.step()
        held = [tensor for pool in engine.pools if pool.cache for tensor in (*pool.cache.keys, *pool.cache.values)]
        assert sum(tensor.nbytes for tensor in held) <= limit
    assert {handle: said for (handle, _), said in tokens_of(events).items()} == expected


# -- prefixes ---------------------------------------------------------------------------------------------------------


def test_sixty_conversations_with_one_beginning_are_answered_as_without_reuse(exact: Decoder) -> None:
    """Edited turns, answers asked again, one token longer or shorter, eight at a time."""
    pick, system = random.Random(1), numbers(12, 0)
    talks = [system + numbers(pick.randint(1, 14), seed % 7) for seed in range(20)]
    talks += [talk[:-1] or system for talk in talks] + [[*talk, pick.randrange(97)] for talk in talks]
    pick.shuffle(talks)
    engine = Engine(exact, max_rows=8)
    handles = {engine.insert(Request(talk, 10, GREEDY)): talk for talk in talks}
    found = tokens_of(run(engine))
    for handle, talk in handles.items():
        assert found[handle, 0] == plain(exact, talk, 10)


def test_what_another_text_has_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, read = decoder_of("llama"), []
    forward = decoder.forward
    monkeypatch.setattr("slmkit.generation.engine.for_decoding", lambda decoder: decoder)  # every pass is `forward`
    monkeypatch.setattr(decoder, "forward", lambda ids, cache: read.append(ids.numel()) or forward(ids, cache))
    engine, prompt = Engine(decoder), numbers(40, 1)
    engine.insert(Request(prompt, 1, GREEDY, n=3))
    run(engine)
    assert read == [40, 1, 1]
    read.clear()
    engine.insert(Request([*prompt[:20], 1, 2, 3], 1, GREEDY))
    run(engine)
    assert read == [3]


def cached_tokens(events: Sequence[Event]) -> dict[tuple[int, int], list[int]]:
    found = defaultdict(list)
    for event in events:
        found[event.handle, event.index].append(event.cached_tokens)
    return dict(found)


def test_the_first_event_of_a_row_tells_how_much_of_its_prompt_was_known(exact: Decoder) -> None:
    engine, prompt = Engine(exact), numbers(40, 1)
    first = engine.insert(Request(prompt, 3, GREEDY, n=3))
    assert cached_tokens(run(engine)) == {(first, 0): [0, 0, 0], (first, 1): [39, 0, 0], (first, 2): [39, 0, 0]}
    other = (prompt[20] + 1) % 97
    for again, known in ((prompt, 39), ([*prompt[:20], other, 2, 3], 20), (numbers(9, 5), 0), ([*prompt, 1], 40)):
        handle = engine.insert(Request(again, 2, GREEDY))
        assert cached_tokens(run(engine)) == {(handle, 0): [known, 0]}
    scored = engine.insert(Request(prompt, 0, GREEDY, prompt_logprobs=0))  # reads all of it
    assert cached_tokens(run(engine)) == {(scored, 0): [0]}
    assert all(event.cached_tokens == 0 for event in run_request(exact, Request(prompt, 2, GREEDY, n=2)))


def test_beginnings_are_reused_within_a_group_alone(exact: Decoder) -> None:
    engine, prompt = Engine(exact), numbers(40, 1)
    asked = [Request(prompt, 2, GREEDY, prefix_group=group) for group in ("a", "b", "", "b", "a", "c")]
    known = []
    for request in asked:
        engine.insert(request)
        events = run(engine)
        assert [event.token for event in events] == plain(exact, prompt, 2)
        known.append(events[0].cached_tokens)
    assert known == [0, 0, 0, 39, 39, 0]
    handles = [engine.insert(replace(request, prompt=[3, *prompt])) for request in asked]  # at the same time
    found = cached_tokens(run(engine))
    assert [found[handle, 0][0] for handle in handles] == [0, 0, 0, 40, 40, 0]
    with pytest.raises(UserError, match="prefix_group"):
        engine.insert(Request(prompt, 2, GREEDY, prefix_group=None))


def test_a_slot_that_another_group_takes_over_is_read_anew(exact: Decoder) -> None:
    engine, prompt = Engine(exact, max_rows=1), numbers(40, 1)
    for group in ("a", "b", "a", "a"):
        engine.insert(Request(prompt, 2, GREEDY, prefix_group=group))
    assert [event.cached_tokens for event in run(engine)][::2] == [0, 0, 0, 39]


def test_a_prompt_known_almost_to_the_end_of_the_context_is_read_beside_a_short_one(exact: Decoder) -> None:
    engine, long = Engine(exact), numbers(60, 1)
    engine.insert(Request(long, 1, GREEDY))
    run(engine)
    first, second = engine.insert(Request([*long, 5], 2, GREEDY)), engine.insert(Request(numbers(30, 2), 2, GREEDY))
    found = tokens_of(run(engine))
    assert found == {(first, 0): plain(exact, [*long, 5], 2), (second, 0): plain(exact, numbers(30, 2), 2)}


def windowed(dtype: torch.dtype = torch.float64) -> Decoder:
    """A window much shorter than its context, so that the rings of its cache turn."""
    wide = config("gemma3_text").model_copy(
        update={"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
                "max_position_embeddings": 1024}
    )  # fmt: skip
    return build_decoder(wide, seed=3).eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["exact", "compiled"])
def test_a_beginning_that_a_window_has_lost_is_read_again(dtype: torch.dtype) -> None:
    model, base = windowed(dtype), numbers(400, 1)
    engine = Engine(model, max_rows=3)
    for beginning, more in ((400, 0), (200, 5), (50, 3), (200, 10), (200, 100), (40, 2), (390, 7)):
        request = Request(base[:beginning] + numbers(more, beginning + more), 12, GREEDY)
        engine.insert(request)
        assert [event.token for event in run(engine)] == alone(model, request)[0], (beginning, more)


def test_random_texts_that_begin_alike_and_turn_the_rings_are_answered_as_alone() -> None:
    model, pick, base = windowed(), random.Random(4), numbers(700, 1)
    engine, asked = Engine(model, max_rows=4), {}
    for seed in range(40):
        prompt = base[: pick.randint(1, 600)] + numbers(pick.choice([0, 1, 30, 280]), seed)
        request = Request(prompt or [1], pick.choice([1, 5, 20]), GREEDY)
        asked[engine.insert(request)] = request
    found = tokens_of(run(engine))
    for handle, request in asked.items():
        assert found[handle, 0] == alone(model, request)[0], len(request.prompt)


def test_a_conversation_that_grows_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, read = build_decoder(tiny(max_position_embeddings=1024)).eval(), []
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda ids, cache: read.append(ids.numel()) or forward(ids, cache))
    engine, text = Engine(decoder, max_rows=1), numbers(600, 1)
    for length in (50, 60, 80, 200, 300, 600):
        engine.insert(Request(text[:length], 1, GREEDY))
        run(engine)
    assert read == [50, 10, 20, 120, 100, 256, 44]


def test_logits_that_are_not_finite_leave_nothing_in_their_slot() -> None:
    decoder = decoder_of("llama").double()
    engine = Engine(decoder, max_rows=2)
    with torch.no_grad():
        kept = decoder.embedding.weight[5].clone()
        decoder.embedding.weight[5] = torch.nan
        engine.insert(Request([1, 2, 3, 5, 5, 5, 5, 5], 3, GREEDY))
        assert run(engine)[0].error
        decoder.embedding.weight[5] = kept
    asked = [Request([1, 2], 3, GREEDY), Request(numbers(20, 1), 3, GREEDY)]
    handles = [engine.insert(request) for request in asked]
    found = tokens_of(run(engine))
    assert [found[handle, 0] for handle in handles] == [alone(decoder, request)[0] for request in asked]


# -- text -------------------------------------------------------------------------------------------------------------


def cut_anywhere(text: str, pick: random.Random) -> list[bytes]:
    """The bytes of a text in random tokens, some within a character."""
    data = text.encode()
    places = (
        sorted(pick.sample(range(1, len(data)), min(len(data) - 1, pick.randint(0, len(data)))))
        if len(data) > 1
        else []
    )
    return [data[a:b] for a, b in itertools.pairwise([0, *places, len(data)])]


def said(pieces: list[bytes], stop: Sequence[str], n: int = 1, count: int | None = None) -> list[list[Event]]:
    """The events of each continuation of a model that says these tokens."""
    tokenizer = ByteTokens([b"?", *dict.fromkeys(pieces)])
    ids = [tokenizer.tokens.index(piece, 1) for piece in pieces]
    engine = Engine(ScriptedModel(len(tokenizer.tokens), 1, ids), tokenizer)
    engine.insert(Request([0], count or len(ids), GREEDY, stop=stop, n=n))
    events = run(engine)
    return [[event for event in events if event.index == index] for index in range(n)]


def until_a_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string that is complete first."""
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one and one in text]
    return text[: min(ends)[1]] if ends else text


def test_stop_strings_in_any_tokens_end_the_text_before_them() -> None:
    pick = random.Random(2)
    for _ in range(several(400, 2000)):
        text = "".join(pick.choice(["a", "b", "ab", "\n", "O P", "é", "😀", " "]) for _ in range(pick.randint(1, 14)))
        stop = [
            "".join(pick.choice("ab\n OPé😀") for _ in range(pick.randint(1, 4))) for _ in range(pick.randint(0, 3))
        ]
        for events in said(cut_anywhere(text, pick), stop, n=pick.randint(1, 2)):
            assert "".join(event.text for event in events) == until_a_stop(text, stop)
            stopped = any(one in text for one in stop)
            assert events[-1].finish_reason == ("stop" if stopped else "length"), (text, stop)


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        ([" A", " B", " O", " P", " Q", " R"], ["O P Q"], " A B "),
        (["yes", "?\n", "no"], ["\n"], "yes?"),
        ([" Alice", "!"], ["\n", "Alice:"], " Alice!"),
    ],
)
def test_stop_strings_that_others_missed(pieces: list[str], stop: list[str], text: str) -> None:
    assert "".join(event.text for event in said([piece.encode() for piece in pieces], stop)[0]) == text


def test_characters_in_several_tokens_come_whole() -> None:
    text = "a😀b👩‍👩‍👧 नमस्ते é\N{REPLACEMENT CHARACTER}z"
    pieces = [bytes([byte]) for byte in text.encode()]
    deltas = [event.text for event in said(pieces, [])[0]]
    assert deltas == [
        "a", "", "", "", "😀", "b", "", "", "", "👩", "", "", "\N{ZERO WIDTH JOINER}", "", "", "", "👩",
        "", "", "\N{ZERO WIDTH JOINER}", "", "", "", "👧", " ", "", "", "न", "", "", "म", "", "", "स",
        "", "", "\N{DEVANAGARI SIGN VIRAMA}", "", "", "त", "", "", "\N{DEVANAGARI VOWEL SIGN E}", " ",
        "", "é", "", "", "", "\N{REPLACEMENT CHARACTER}z",
    ]  # fmt: skip
    assert [delta for delta in deltas if "\N{REPLACEMENT CHARACTER}" in delta] == deltas[-1:], "where the text has it"
    cut = said(pieces, [], count=3)[0]  # in the middle of the second character
    assert [event.text for event in cut] == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_end_tokens_end_a_text_and_are_not_shown() -> None:
    decoder = byte_decoder()
    free = run_request(decoder, Request([72, 101], 30, GREEDY), TOKENIZER)
    end = free[9].token
    first = next(place for place, event in enumerate(free) if event.token == end)
    ended = run_request(decoder, Request([72, 101], 30, GREEDY, frozenset({end, 300})), TOKENIZER)
    assert [event.token for event in ended] == [event.token for event in free[: first + 1]]
    assert ended[-1].finish_reason == "stop"


# -- log-probabilities ------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_direct_scoring(exact: Decoder) -> None:
    prompt, settings = numbers(20, 4), SamplingSettings(seed=3, temperature=0.5, repetition_penalty=1.5)
    events = run_request(exact, Request(prompt, 8, settings, logprobs=5, prompt_logprobs=3))
    text = prompt + [event.token for event in events]
    with torch.no_grad():
        direct = exact.logits(exact(torch.tensor([text]))[0]).log_softmax(-1)  # [text, vocab_size]
    found = [*events[0].prompt_logprobs, *(event.logprobs for event in events)]
    assert len(found) == len(text) - 1
    for place, each in enumerate(found):
        (token, logprob), *top = each
        assert token == text[place + 1]
        assert logprob == pytest.approx(float(direct[place, token]), abs=1e-4)
        likeliest = direct[place].topk(3 if place < 19 else 5)
        assert [token for token, _ in top] == likeliest.indices.tolist()
        assert [logprob for _, logprob in top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
    assert all(not event.prompt_logprobs for event in events[1:])


def test_a_prompt_is_scored_without_a_new_token_even_if_it_fills_the_context(exact: Decoder) -> None:
    for length in (1, 30, 64):
        (event,) = run_request(exact, Request(numbers(length, 1), 0, GREEDY, prompt_logprobs=0))
        assert (event.token, event.finish_reason, len(event.prompt_logprobs)) == (None, "length", length - 1)
