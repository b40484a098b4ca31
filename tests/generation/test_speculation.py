"""Speculative decoding: greedy text is the same as without guesses, and sampled text has the same distribution."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slmkit.config import UserError
from slmkit.generation.constraints import Grammar
from slmkit.generation.engine import Engine, Request
from slmkit.generation.sampling import probabilities, sample, seed_of
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.speculation import DraftModel, Guess, PromptLookup, Speculation
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from tests.generation.helpers import TOKENIZER, ScriptedModel, byte_decoder
from tests.generation.test_engine import GREEDY, SETTINGS, alone, numbers, plain, run, tokens_of
from tests.long import several
from tests.model.test_cache import decoder_of, unlike_families
from tests.model.test_decoder import tiny


def pair(noise: float = 0.03) -> tuple[Decoder, Decoder]:
    """A model whose text does not repeat itself, and a draft model that often agrees with it."""
    decoder = build_decoder(tiny(tie_word_embeddings=False), seed=1).eval()
    draft, random = copy.deepcopy(decoder), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight *= 1 + noise * torch.randn(weight.shape, generator=random)
    return decoder, draft


def spoken(
    decoder: Decoder, requests: list[Request], speculation: Speculation | None, **options: object
) -> list[list[int]]:
    engine = Engine(decoder, speculation=speculation, **options)
    for request in requests:
        engine.insert(request)
    events = tokens_of(run(engine))
    return [events[key] for key in sorted(events)]


class Wrong(Speculation):
    """Guesses of which most are wrong, of all lengths."""

    def guess(self, row: Any, room: int) -> Guess:
        return Guess([(7 * len(row.ids) + i) % 97 for i in range(min(room, len(row.ids) % (self.count + 1)))])


class Right(Speculation):
    """Guesses what greedy decoding gives, and something else at the end of some guesses."""

    def __init__(self, count: int, texts: list[list[int]]) -> None:
        super().__init__(count)
        self.texts = texts

    def guess(self, row: Any, room: int) -> Guess:
        text = self.texts[row.handle][len(row.ids) :][: min(self.count, room)]
        return Guess([*text[:-1], 96 - text[-1]] if text and len(row.ids) % 3 == 0 else text)


@unlike_families
def test_greedy_text_is_the_same_for_every_family_and_every_guess(family: str) -> None:
    decoder = decoder_of(family)
    prompts = [numbers(length, length) for length in (3, 19, 11)]
    requests = [Request(prompt, 24 - 5 * place, GREEDY) for place, prompt in enumerate(prompts)]
    if any(rope.depends_on_length for rope in decoder.ropes):
        with pytest.raises(UserError, match="cannot take guesses back"):
            Engine(decoder, speculation=PromptLookup())
        return
    expected = [alone(decoder, request)[0] for request in requests]
    texts = [prompt + text for prompt, text in zip(prompts, expected)]
    draft = build_decoder(tiny(num_hidden_layers=1), seed=3)
    for speculation in (Wrong(5), Right(6, texts), PromptLookup(4), DraftModel(draft, 3), DraftModel(decoder, 4)):
        assert spoken(decoder, requests, speculation) == expected, type(speculation).__name__
        assert 0 <= speculation.accepted <= speculation.guessed
    assert speculation.accepted > 0.9 * speculation.guessed > 0  # its own draft


def test_windows_shorter_than_the_text_are_reread_after_wrong_guesses() -> None:
    decoder = build_decoder(
        tiny(model_type="mistral", tie_word_embeddings=False, sliding_window=4, max_position_embeddings=400), seed=5
    ).eval()
    request = Request(numbers(300, 1), 60, GREEDY)  # more than the 259 positions that its layers store
    expected = alone(decoder, request)
    for count in (3, 20):
        assert spoken(decoder, [request], Wrong(count)) == expected


def test_texts_end_where_they_end_without_guesses() -> None:
    decoder = byte_decoder()
    request = Request(TOKENIZER.encode("once upon"), 60, GREEDY)
    (text,) = alone(decoder, request)
    stop = text[len(text) // 2]
    for changed in (
        Request(request.prompt, 60, GREEDY, stop_ids={stop}),
        Request(request.prompt, 200, GREEDY),
        Request(request.prompt, 1, GREEDY),
        Request(request.prompt, 60, GREEDY, logprobs=3),
    ):
        expected = run_all(Engine(decoder, TOKENIZER, reuse=False), changed)
        for speculation in (DraftModel(decoder, 7), PromptLookup(), DraftModel(byte_decoder(context=32))):
            found = run_all(Engine(decoder, TOKENIZER, speculation=speculation), changed)
            assert [(e.token, e.text, e.finish_reason) for e in found] == [
                (e.token, e.text, e.finish_reason) for e in expected
            ]
            for mine, theirs in zip(found, expected):
                assert [token for token, _ in mine.logprobs] == [token for token, _ in theirs.logprobs]
                assert np.allclose([p for _, p in mine.logprobs], [p for _, p in theirs.logprobs], atol=1e-4)


def run_all(engine: Engine, request: Request) -> list:
    engine.insert(request)
    return run(engine)


def test_a_slot_that_was_guessed_in_is_reused_as_far_as_it_is_text() -> None:
    decoder = byte_decoder()
    engine = Engine(decoder, speculation=DraftModel(byte_decoder(), 5))
    first = run_all(engine, Request(TOKENIZER.encode("once upon"), 20, GREEDY))
    longer = TOKENIZER.encode("once upon") + [event.token for event in first] + TOKENIZER.encode(" and")
    again = Request(longer, 20, GREEDY)
    assert [event.token for event in run_all(engine, again)] == alone(decoder, again)[0]


def test_a_draft_model_guesses_as_if_it_read_the_whole_text_each_time() -> None:
    """Its cache forgets the guesses that did not become text."""
    (decoder, draft), guesses = pair(), 0

    class Compared(DraftModel):
        def guess(self, row: Any, room: int) -> Guess:
            nonlocal guesses
            found = super().guess(row, room)
            assert found.tokens == plain(draft, row.ids, len(found.tokens))
            guesses += 1
            return found

    speculation = Compared(draft, 5)
    spoken(decoder, [Request(numbers(9, 1), 50, SETTINGS[5])], speculation)
    assert guesses > 5
    assert 0.1 < speculation.acceptance < 0.9


def test_a_draft_model_reads_a_long_text_in_pieces_and_guesses_from_then_on() -> None:
    decoder = build_decoder(tiny(max_position_embeddings=2048)).eval()
    read, lengths = Counter[int](), list[int]()

    class Counted(DraftModel):
        def guess(self, row: Any, room: int) -> Guess:
            before = self._caches[row][0].length(0) if row in self._caches else 0
            found = super().guess(row, room)
            read[row.handle] += 1
            lengths.append(self._caches[row][0].length(0) - before)
            assert bool(found.tokens) == (read[row.handle] > (3 if row.handle else 0)), "1000 tokens in pieces of 256"
            return found

    speculation = Counted(copy.deepcopy(decoder), 3)
    engine = Engine(decoder, speculation=speculation)
    talking = engine.insert(Request(numbers(5, 1), 60, GREEDY))
    long = engine.insert(Request(numbers(1000, 2), 20, GREEDY))
    found = tokens_of(run(engine))
    assert max(lengths) == 256
    assert found[long, 0] == alone(decoder, Request(numbers(1000, 2), 20, GREEDY))[0]
    assert found[talking, 0] == alone(decoder, Request(numbers(5, 1), 60, GREEDY))[0]
    assert speculation.acceptance > 0.9, "its own draft"


def test_a_draft_model_stays_in_the_mode_it_was_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmkit.generation.speculation.for_decoding", lambda decoder: decoder)
    decoder, draft = pair()
    modes = []
    draft.blocks[0].register_forward_pre_hook(lambda block, _: modes.append(block.training))
    draft.train()
    request = Request(numbers(9, 1), 10, GREEDY)
    assert spoken(decoder, [request], DraftModel(draft)) == alone(decoder, request)
    assert draft.training
    assert draft.blocks[0].training
    assert set(modes) == {False}, "while it guesses"


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_a_row_with_guesses_is_itself_beside_others(settings: SamplingSettings) -> None:
    decoder, draft = pair()
    requests = [Request(numbers(9, number), 15 + number, settings) for number in range(3)]
    together = spoken(decoder, requests, DraftModel(draft, 3))
    assert together == [spoken(decoder, [request], DraftModel(draft, 3))[0] for request in requests]
    lookups = spoken(decoder, requests, PromptLookup(3))
    assert lookups == [spoken(decoder, [request], PromptLookup(3))[0] for request in requests]
    if settings.is_greedy:
        assert together == lookups == [alone(decoder, request)[0] for request in requests]


def test_continuations_of_one_prompt_differ() -> None:
    decoder, draft = pair()
    request = Request(numbers(9, 1), 20, SamplingSettings(seed=3), n=3)
    texts = spoken(decoder, [request], DraftModel(draft))
    assert len({tuple(text) for text in texts}) == 3


def chi_square(counts: Counter, expected: dict, total: int) -> float:
    """The p-value of the counts, cells of few expected counts together."""
    cells = [(counts.get(cell, 0), share * total) for cell, share in expected.items()]
    small = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if small:
        cells.append((sum(a for a, _ in small), max(sum(b for _, b in small), 1e-9)))
    assert sum(counts.values()) == total
    statistic = sum((found - share) ** 2 / share for found, share in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))


SAMPLED = [
    SamplingSettings(seed=1),
    SamplingSettings(seed=1, temperature=0.6, top_p=0.9),
    SamplingSettings(seed=1, top_k=2, repetition_penalty=1.4, presence_penalty=0.5),
]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("draft", SAMPLED[0]), ("draft", SAMPLED[2]), ("lookup", SAMPLED[1]), ("certain", SAMPLED[2])],
)
def test_sampled_text_has_the_distribution_of_the_model(kind: str, settings: SamplingSettings) -> None:
    """All texts of four tokens of three kinds, against their exact probabilities."""
    decoder = build_decoder(tiny(vocab_size=3, initializer_range=0.25), seed=1).eval()
    draft = build_decoder(tiny(vocab_size=3, initializer_range=0.25, num_hidden_layers=1), seed=4)
    prompt, total = [0, 0, 1, 0, 2, 1, 1, 2, 2, 0], 500  # every pair has been seen
    expected = {}
    with torch.no_grad():
        for text in itertools.product(range(3), repeat=4):
            logits = decoder.logits(decoder(torch.tensor([[*prompt, *text]])))[0, len(prompt) - 1 : -1]
            chance = 1.0
            for place, scores in enumerate(logits.split(1)):
                ids = [*prompt, *text[:place]]
                row = SimpleNamespace(ids=ids, prompt_length=len(prompt), settings=settings, seed=0, allowed=None)
                chance *= float(probabilities(scores, [row])[0, text[place]])
            expected[text] = chance
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-4)
    speculation = {"draft": DraftModel(draft, 3), "lookup": PromptLookup(3), "certain": Fixed(3)}[kind]
    engine = Engine(decoder, max_rows=64, speculation=speculation)
    engine.insert(Request(prompt, 4, settings, n=total))
    counts = Counter(tuple(text) for text in tokens_of(run(engine)).values())
    assert chi_square(counts, expected, total) > 1e-3
    assert 0.01 < speculation.acceptance < 0.95
    assert speculation.guessed > total / 2


class Fixed(Speculation):
    def guess(self, row: Any, room: int) -> Guess:
        return Guess([2, 1, 0][: min(self.count, room)])


@pytest.mark.parametrize("seed", range(several(2, 4)))
def test_one_verdict_has_the_distribution_of_the_model(seed: int) -> None:
    """The first of two guesses, drawn from q by `sample`; p and q have parts that the other lacks."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 8, generator=random) * 2
    guesses = torch.randn(1, 8, generator=random) * 2
    guesses[0, seed], logits[0, 7 - seed] = -torch.inf, -torch.inf
    total, counts, speculation = 2000, Counter[int](), Fixed(2)
    settings = SamplingSettings()
    for number in range(total):
        row = SimpleNamespace(ids=[1], prompt_length=1, settings=settings, seed=seed_of(9, number), allowed=None)
        drawn = int(sample(guesses, [SimpleNamespace(**{**vars(row), "seed": seed_of(10, number)})]))
        guess = Guess([drawn, 0], guesses.softmax(-1).repeat(2, 1))
        counts[next(speculation.verdicts(row, logits, guess))[0]] += 1
    expected = dict(enumerate(logits[0].softmax(-1).tolist()))
    assert chi_square(counts, expected, total) > 1e-3
    overlap = float(torch.minimum(logits[0].softmax(-1), guesses[0].softmax(-1)).sum())
    assert abs(speculation.accepted / total - overlap) < 0.03


def test_lookup_finds_where_the_last_tokens_were_seen_last() -> None:
    def guessed(ids: list[int], room: int = 9) -> list[int]:
        return PromptLookup(count=4, longest=3).guess(SimpleNamespace(ids=ids), room).tokens

    assert guessed([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]) == [4, 5, 6, 7]
    assert guessed([1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3]) == [9, 1, 2, 3]
    assert guessed([1, 2, 3, 8, 7, 2, 3, 9, 0, 2, 3]) == [9, 0, 2, 3]
    assert guessed([1, 2, 3, 8, 1, 2, 3], room=2) == [8, 1]
    assert guessed([4, 4, 4, 4]) == [4]
    assert guessed([1, 2, 3, 4]) == guessed([1]) == guessed([1, 2, 1]) == guessed([1, 2, 3, 8, 1, 2, 3], room=0) == []


def test_guesses_obey_the_grammar() -> None:
    decoder, draft = byte_decoder(), byte_decoder()
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 3, "maxItems": 3}
    grammar = Grammar.json_schema(TOKENIZER, schema)
    for settings in (GREEDY, SamplingSettings(seed=2)):
        request = Request(TOKENIZER.encode("x"), 80, settings, grammar=grammar)
        expected = [event.token for event in run_all(Engine(decoder, TOKENIZER), request)]
        for speculation in (DraftModel(draft, 5), PromptLookup()):
            engine = Engine(decoder, TOKENIZER, speculation=speculation)
            found = [event.token for event in run_all(engine, request)]
            assert json.loads(TOKENIZER.decode(found, skip_special_tokens=True))[0] in ("red", "green")
            assert settings is not GREEDY or found == expected
            assert speculation.accepted > 0


@pytest.mark.parametrize("speculation", [DraftModel(ScriptedModel(260, 8, [65] * 40), 3), PromptLookup(3)])
def test_logits_that_are_not_finite_end_the_row_alone(speculation: Speculation) -> None:
    class Broken(ScriptedModel):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden).masked_fill(hidden == 14, torch.nan)

    engine = Engine(Broken(260, 4, [65] * 40), speculation=speculation)
    first, second = engine.insert(Request([1] * 8, 20, GREEDY)), engine.insert(Request([1] * 4, 9, GREEDY))
    events = run(engine)
    assert [event.token for event in events if event.handle == first] == [65] * 7 + [None]
    assert "not finite" in next(event.error for event in events if event.error)
    assert tokens_of(events)[second, 0] == [65] * 9
    assert speculation.accepted > 3


def test_how_many_tokens_to_guess_is_checked() -> None:
    for count in (0, 256):
        with pytest.raises(UserError, match=f"{count} tokens to guess at once: expected 1 to 255"):
            PromptLookup(count)


def test_logits_that_are_not_finite_leave_an_empty_slot() -> None:
    decoder = build_decoder(tiny(), seed=1).eval()
    engine = Engine(decoder, speculation=PromptLookup())
    prompt = [1, 2, 3, 1, 2]
    engine.insert(Request(prompt, 30, GREEDY))
    engine.step()
    with torch.no_grad():
        kept = decoder.norm.weight.clone()
        decoder.norm.weight.fill_(torch.nan)
        assert run(engine)[0].error
        decoder.norm.weight.copy_(kept)
    assert [event.token for event in run_all(engine, Request(prompt, 8, GREEDY))] == plain(decoder, prompt, 8)
