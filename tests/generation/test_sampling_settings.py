"""Sampling settings: what is refused, and how it is said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmkit.config import UserError, load_settings
from slmkit.generation.sampling_settings import SamplingSettings

RANGES = {  # least and greatest value, and those just outside
    "temperature": (0.0, 1e6, [-1e-9, -1, 1e7]),
    "top_k": (0, 10**9, [-1]),
    "top_p": (1e-9, 1.0, [0, -0.5, 1.0001]),
    "min_p": (0.0, 0.999, [-1e-9, 1]),
    "typical_p": (1e-9, 1.0, [0, 1.0001]),
    "repetition_penalty": (0.01, 100.0, [0, -1, 101, 0.009]),
    "presence_penalty": (-2.0, 2.0, [-2.01, 2.01]),
    "frequency_penalty": (-2.0, 2.0, [-2.01, 2.01]),
    "seed": (0, 2**63 - 1, [-1, 2**63, 10**30]),
}
NUMBERS = [name for name in RANGES if name not in ("top_k", "seed")]


@pytest.mark.parametrize("name", RANGES)
def test_a_value_out_of_range_is_named_with_what_is_expected(name: str) -> None:
    least, greatest, outside = RANGES[name]
    for value in (least, greatest):
        assert getattr(SamplingSettings(**{name: value}), name) == value
    for value in [*outside, math.nan, math.inf, -math.inf, True, False, "1", None, [1.0]]:
        if name == "seed" and value is None:
            continue
        with pytest.raises(UserError, match=rf"{name}: expected") as raised:
            SamplingSettings(**{name: value})
        assert "\n" not in str(raised.value)


@given(st.sampled_from(NUMBERS), st.floats())
def test_a_number_is_kept_or_refused_but_never_changed(name: str, value: float) -> None:
    least, greatest, _ = RANGES[name]
    inside = least <= value <= greatest or (name in ("top_p", "typical_p", "min_p", "temperature") and value > 0)
    try:
        assert getattr(SamplingSettings(**{name: value}), name) == value
        assert math.isfinite(value)
    except UserError:
        assert not inside or not least <= value <= greatest


@pytest.mark.parametrize(
    "bias",
    [
        {3: 100.1}, {3: -101}, {3: math.nan}, {3: math.inf}, {3: True}, {3: "1"}, {3: None}, {-1: 1}, {1.5: 1},
        {"x": 1}, {"-1": 1}, {True: 1}, [3], 3, None, "3",
    ],
    ids=str,
)  # fmt: skip
def test_a_bias_of_another_form_is_refused(bias: Any) -> None:
    with pytest.raises(UserError, match=r"logit_bias[^:]*: "):
        SamplingSettings(logit_bias=bias)


def test_the_keys_of_a_bias_may_be_those_of_json() -> None:
    settings = load_settings(SamplingSettings, {"logit_bias": {"50256": -100, "7": 0.5}})
    assert settings.logit_bias == {50256: -100, 7: 0.5}
    settings.expect_ids_below(50257)
    with pytest.raises(UserError, match="logit_bias: the id 50256 is not below the model's 512 tokens"):
        settings.expect_ids_below(512)
    SamplingSettings().expect_ids_below(1)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("temprature", "temperature"), ("topk", "top_k"), ("typical", "typical_p"),
        ("repeat_penalty", "repetition_penalty"),
        ("presence", "presence_penalty"), ("frequency_penality", "frequency_penalty"), ("logits_bias", "logit_bias"),
    ],
)  # fmt: skip
def test_an_unknown_setting_is_refused_with_the_nearest_name(wrong: str, meant: str) -> None:
    for build in (lambda: SamplingSettings(**{wrong: 1}), lambda: load_settings(SamplingSettings, {wrong: 1})):
        with pytest.raises(UserError, match=f"{wrong}.*did you mean '{meant}'"):
            build()


def test_numbers_of_numpy_and_torch_count_as_numbers() -> None:
    settings = SamplingSettings(temperature=np.float32(0.5), top_k=np.int64(4), seed=torch.tensor(3), do_sample=1)
    assert (settings.temperature, settings.top_k, settings.seed, settings.do_sample) == (0.5, 4, 3, True)


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(99, 9), np.ones((99, 9)), torch.ones(1).to("meta")])
def test_a_tensor_that_is_not_one_number_is_refused_in_one_line(value: Any) -> None:
    for name in ("temperature", "top_k", "seed", "do_sample", "logit_bias"):
        with pytest.raises(UserError, match=rf"{name}: expected .*, found '\w+ of \[[\d, ]+\] values'") as caught:
            SamplingSettings(**{name: value})
        assert "\n" not in str(caught.value)
