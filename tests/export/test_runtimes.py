"""The comparison of runtimes: equal ones pass, and each check fails where it must."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slmkit.adapt.quantize import round_to, to_quantize
from slmkit.config import UserError
from slmkit.export import runtimes
from slmkit.export.compare import EXACT, Answers, Probe, bounds_of, compare, probe_strings
from slmkit.export.runtimes import Runtime, Slmkit, Transformers
from slmkit.model.decoder import Decoder
from tests.export.small_model import CONTEXT, LLAMA3, ORIGINAL, loaded, small_config, write_small

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def reference(directory: Path) -> Slmkit:
    return Slmkit(*loaded(directory), size=1)


@pytest.fixture(scope="module")
def probe(reference: Slmkit) -> Probe:
    return Probe.of(reference.decoder, reference.tokenizer, strings=400, conversations=12, count=40)


@pytest.fixture(scope="module")
def expected(reference: Slmkit, probe: Probe) -> Answers:
    return Answers.of(reference, probe)


class Changed(Runtime):
    """The reference, but for what a test replaces."""

    name, size = "changed", 1

    def __init__(self, reference: Slmkit, **changes: Callable) -> None:
        for method in ("encode", "encode_chat", "log_probs", "greedy"):
            setattr(self, method, changes.get(method, getattr(reference, method)))


# -- the probe --------------------------------------------------------------------------------------------------------


def test_strings_are_the_same_each_time_and_of_all_scripts() -> None:
    texts = probe_strings(("<|im_end|>", "<think>"), 10_000)
    assert len(texts) == 10_000
    assert texts == probe_strings.__wrapped__(("<|im_end|>", "<think>"), 10_000)
    whole = "".join(texts)
    for some in (
        "кошка", "γάτα", "חתול", "قطة", "बिल्ली", "แมว", "한국어", "日本語", "ねこ", "კატა", "կատու", "ድመት", "ꆀ",
        "0123456789", "٠١٢٣", "🙂🚀", "\u200d\ufe0f", "\t\n\r \u00a0\u3000\u2028\x00", "_{}[]()=;#<>/\\\"'`|~^",
    ):  # fmt: skip
        assert set(some) <= set(whole), some
    for piece in ("<|im_end|>", "<think>", "don't", "\r\n", "👩‍🚀", "for i in range(10):"):
        assert whole.count(piece) > 50


def test_positions_are_also_past_the_original_context_and_past_each_window(tmp_path: Path, probe: Probe) -> None:
    (random_ids, lengths), (start, _) = probe.prompts
    assert set(random_ids) <= set(range(400))
    assert {1, 2, 30, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, ORIGINAL + 40} <= set(lengths)
    assert lengths[-1] == len(random_ids) == CONTEXT - 1 >= ORIGINAL + 64
    assert probe.context <= CONTEXT
    assert probe.start == start
    windowed = write_small(
        tmp_path / "windowed", model_type="mistral", sliding_window=33, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    of_window = Probe.of(*loaded(windowed), strings=1, conversations=1)
    assert {32, 33, 34, 73, 200, 256} <= set(of_window.prompts[0][1])
    assert (of_window.count, max(of_window.prompts[0][1])) == (256, 256)


def test_conversations_hold_no_special_token_but_those_that_are_meant_to(probe: Probe) -> None:
    assert len(probe.conversations) == 12
    roles = {message["role"] for messages in probe.conversations for message in messages}
    assert roles == {"system", "user", "assistant"}
    assert not any("<|im_end|>" in message["content"] for messages in probe.conversations for message in messages)
    assert ["<|im_end|>" in messages[0]["content"] for messages in probe.tagged].count(True) == 1
    as_text, as_tokens = next(readings for readings in probe.readings if readings[0] != readings[1])
    assert len(as_text) > len(as_tokens)


# -- equal runtimes ---------------------------------------------------------------------------------------------------


def test_transformers_is_the_same(directory: Path, reference: Slmkit, probe: Probe, expected: Answers) -> None:
    with Transformers(directory) as other:
        parity = compare(reference, other, probe, EXACT, expected)
    assert parity.passed, parity.failures
    assert parity.checks["token ids"] == {"compared": 400, "different": 0}
    assert parity.checks["chat prompts"] == {"compared": 12, "different": 0}
    assert parity.checks["tags in messages"]["compared"] == len(probe.tagged) > 0
    assert parity.checks["log-probabilities"]["positions"] > 20
    assert parity.checks["log-probabilities"]["max_abs"] < 1e-4
    assert parity.checks["greedy tokens"] == {"compared": 40, "equal": 40, "ties": 0}
    assert parity.size == (directory / "model.safetensors").stat().st_size
    content = json.loads(parity.to_json(date="today"))
    assert (content["passed"], content["date"], content["runtime"]) == (True, "today", "transformers")


def test_what_is_not_finite_is_null_in_the_file(reference: Slmkit, probe: Probe, expected: Answers) -> None:
    parity = compare(reference, Changed(reference), probe, bounds_of("int4"), expected)
    text = replace(parity, tokens_per_second=math.nan).to_json()
    assert json.loads(text, parse_constant=pytest.fail)["bounds"]["log_prob"] is None


# -- each check can fail ----------------------------------------------------------------------------------------------


def once(method: Callable, change: Callable) -> Callable:
    """`method`, whose result is changed at its fifth call."""
    calls = 0

    def changed(*arguments):
        nonlocal calls
        calls += 1
        result = method(*arguments)
        return change(result) if calls == 5 else result

    return changed


def first_number(change: Callable[[np.ndarray], object]) -> Callable:
    def changed(log_probs: np.ndarray) -> np.ndarray:
        log_probs = log_probs.copy()
        change(log_probs)
        return log_probs

    return changed


def put(value: float) -> Callable:
    return first_number(lambda table: table.__setitem__((-1, 7), table[-1, 7] + value))


MUTANTS: dict[str, tuple[str, Callable[[Slmkit], dict[str, Callable]]]] = {
    "one string of 400 has a token less": ("token ids", lambda r: {"encode": once(r.encode, lambda ids: ids[:-1])}),
    "special tokens in text are tokens": (
        "token ids",
        lambda r: {"encode": lambda text: r.tokenizer.encode(text, allow_special=True)},
    ),
    "a beginning is put before text": ("token ids", lambda r: {"encode": lambda text: [0, *r.encode(text)]}),
    "line ends are normalised": ("token ids", lambda r: {"encode": lambda text: r.encode(text.replace("\r\n", "\n"))}),
    "one conversation lacks its last token": (
        "chat prompts",
        lambda r: {"encode_chat": once(r.encode_chat, lambda ids: ids[:-1])},
    ),
    "no generation prompt": (
        "chat prompts",
        lambda r: {"encode_chat": lambda messages: r.tokenizer.encode_chat(messages).ids},
    ),
    "messages are trimmed": (
        "chat prompts",
        lambda r: {"encode_chat": lambda ms: r.encode_chat([m | {"content": m["content"].strip()} for m in ms])},
    ),
    "no chat template": ("chat prompts", lambda r: {"encode_chat": lambda messages: None}),
    "a tag in a message vanishes": (
        "tags in messages",
        lambda r: {
            "encode_chat": lambda ms: r.encode_chat(
                [m | {"content": m["content"].replace("<|im_end|>", "")} for m in ms]
            )
        },
    ),
    "one number is 0.002 off": (
        "log-probabilities",
        lambda r: {"log_probs": lambda *a: put(0.002)(r.log_probs(*a))},
    ),
    "one number is NaN": ("log-probabilities", lambda r: {"log_probs": lambda *a: put(math.nan)(r.log_probs(*a))}),
    "one number is -inf": ("log-probabilities", lambda r: {"log_probs": lambda *a: put(-math.inf)(r.log_probs(*a))}),
    "logits, not log-probabilities": ("log-probabilities", lambda r: {"log_probs": lambda *a: r.log_probs(*a) + 1}),
    "a token less in the vocabulary": (
        "log-probabilities",
        lambda r: {"log_probs": lambda *a: r.log_probs(*a)[:, :-1]},
    ),
    "positions shifted by one": (
        "log-probabilities",
        lambda r: {"log_probs": lambda ids, lengths: r.log_probs(ids, [max(1, n - 1) for n in lengths])},
    ),
    "the last greedy token differs": (
        "greedy tokens",
        lambda r: {"greedy": lambda ids, count: [*r.greedy(ids, count)[:-1], 5]},
    ),
    "generation stops early": ("greedy tokens", lambda r: {"greedy": lambda ids, count: r.greedy(ids, count)[:20]}),
    "generation gives nothing": ("greedy tokens", lambda r: {"greedy": lambda ids, count: []}),
}


def test_nothing_is_compared_from_a_row_without_a_token(reference: Slmkit, probe: Probe, expected: Answers) -> None:
    """llama.cpp never takes such a row; until then its tokens are compared."""
    first = max(
        map(expected.greedy.index, expected.greedy)
    )  # the place of the token that comes last for the first time
    assert first > 1
    hole = expected.greedy[first]
    probe = replace(probe, holes=frozenset({hole}))

    def another(changed: int) -> Callable:
        return lambda ids, count: [*expected.greedy[:changed], *[5 + (hole == 5)] * (count - changed)]

    for changed, passes in ((first, True), (first - 1, False)):
        parity = compare(reference, Changed(reference, greedy=another(changed)), probe, EXACT, expected)
        assert parity.passed is passes
        assert parity.checks["greedy tokens"]["compared"] == first


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_runtime_fails_its_check_alone(name: str, reference: Slmkit, probe: Probe, expected: Answers) -> None:
    check, changes = MUTANTS[name]
    parity = compare(reference, Changed(reference, **changes(reference)), probe, EXACT, expected)
    failed = [failure.partition(":")[0] for failure in parity.failures]
    assert failed[0] == check
    assert set(failed) <= {check, "tags in messages"}  # which are chat prompts too
    assert all("\n" not in failure and len(failure) < 400 for failure in parity.failures)
    assert not json.loads(parity.to_json())["passed"]


def turned(decoder: Decoder, **changes: object) -> Decoder:
    """The same weights under another config."""
    from slmkit.model.architectures import architecture_of

    mutant = Decoder(architecture_of(small_config(**changes))).eval()
    mutant.load_state_dict(decoder.state_dict())
    return mutant


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": LLAMA3 | {"rope_theta": 10_500.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": ORIGINAL + 2}},
        {"rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_a_wrong_reading_of_the_config_fails(changes: dict, reference: Slmkit, probe: Probe, expected: Answers) -> None:
    wrong = Slmkit(turned(reference.decoder, **changes), reference.tokenizer, 1)
    assert "log-probabilities" in compare(reference, wrong, probe, EXACT, expected).failures[0]


def test_a_window_that_is_too_long_by_one_fails(tmp_path: Path) -> None:
    windowed = {"model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    right = Slmkit(*loaded(write_small(tmp_path / "model", **windowed, sliding_window=100)), size=1)
    wrong = Slmkit(turned(right.decoder, **windowed, sliding_window=101), right.tokenizer, 1)
    small = Probe.of(right.decoder, right.tokenizer, strings=1, conversations=1, count=5)
    failures = compare(right, wrong, small, EXACT).failures
    assert [failure.partition(":")[0] for failure in failures] == ["log-probabilities"]


def shift_heads(decoder: Decoder) -> None:
    """Put the value heads in another order."""
    for block in decoder.blocks:
        value = block.attention.value.weight
        value.data = value.data.roll(16, 0)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_rounded_weights_pass_their_bounds_and_wrong_ones_do_not(
    kind: str, bits: int, directory: Path, reference: Slmkit, probe: Probe, expected: Answers
) -> None:
    # Weights of the usual size: of the large ones every rounding error counts.
    decoder = copy.deepcopy(reference.decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(0.5 if parameter.dim() == 2 else 1)
    right = Slmkit(decoder, reference.tokenizer, 1)
    answers = Answers.of(right, probe)
    for is_wrong in (False, True):
        other = copy.deepcopy(decoder)
        if is_wrong:
            shift_heads(other)
        round_to(other, to_quantize(other, kind, 32, "bfloat16"), 32)
        parity = compare(right, Slmkit(other, reference.tokenizer, 1), probe, bounds_of(kind), answers)
        assert parity.passed != is_wrong, parity.checks
        assert parity.checks["log-probabilities"]["max_abs"] > EXACT.log_prob


def test_bounds_are_those_of_the_bits() -> None:
    for kind in ("F32", "fp32", "float32", "f32"):
        assert bounds_of(kind) == EXACT
    for kinds in (
        ("F16", "float16", "bfloat16", "BF16", "fp16"),
        ("Q8_0", "int8"),
        ("Q4_K_M", "int4", "nf4", "IQ4_XS"),
    ):
        bounds = {bounds_of(kind) for kind in kinds}
        assert len(bounds) == 1
        assert not bounds.pop().greedy
    ordered = [bounds_of(kind).kl for kind in ("F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_0", "Q3_K_S", "Q2_K")]
    assert ordered == sorted(set(ordered))


# -- ties -------------------------------------------------------------------------------------------------------------


def tied_at(places: set[int], gap: float, start: int) -> Callable:
    """Log-probabilities of 8 tokens, where the likeliest, 3, leads 4 by `gap` at some numbers of new tokens."""

    def log_probs(ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        logits = np.zeros((len(lengths), 8), np.float32)
        logits[:, 3] = 5
        logits[:, 4] = [5 - gap if length - start in places else 1 for length in lengths]
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    return log_probs


@pytest.mark.parametrize(
    ("gap", "instead", "places", "passes"),
    [
        (5e-4, 4, {3}, True), (5e-4, 4, {3, 9}, True),
        (2e-3, 4, {3}, False),  # the reference is sure
        (5e-4, 5, {3}, False),  # neither of the two likeliest
        (0.0, 4, set(range(18)), False),  # too many to be chance
    ],
)  # fmt: skip
def test_the_first_difference_is_forgiven_only_for_a_tie(
    gap: float, instead: int, places: set[int], passes: bool, reference: Slmkit, probe: Probe
) -> None:
    small = replace(
        probe, strings=[], conversations=[], tagged=[], readings=[], start=[1, 2], count=20, prompts=[([1, 2], [1])]
    )
    log_probs = tied_at(places, gap, 2)
    ours = Changed(reference, log_probs=log_probs, greedy=lambda ids, count: [3] * count)

    def theirs(ids: Sequence[int], count: int) -> list[int]:
        return [instead if len(ids) - 2 + n in places else 3 for n in range(count)]

    parity = compare(ours, Changed(reference, log_probs=log_probs, greedy=theirs), small, EXACT)
    assert parity.passed == passes, parity
    if passes:
        assert parity.checks["greedy tokens"] == {"compared": 20, "equal": 20, "ties": len(places)}


# -- transformers -----------------------------------------------------------------------------------------------------


def test_transformers_refuses_tensors_that_it_misses_or_does_not_know(directory: Path, tmp_path: Path) -> None:
    for name, change in (
        ("missing", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        ("unexpected", lambda tensors: tensors.update(other=torch.zeros(2))),
    ):
        copied = tmp_path / name
        copied.mkdir()
        for path in directory.iterdir():
            (copied / path.name).write_bytes(path.read_bytes())
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{name}_keys") as refused:
            Transformers(copied)
        assert "\n" not in str(refused.value)


def test_without_transformers_one_line_says_how_to_get_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install transformers"):
        Transformers(directory)
