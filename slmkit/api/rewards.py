"""What answers are worth: plain functions of the question, the answer and the known answer, found by name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

from slmkit.config import UserError, did_you_mean

# reward(prompt, answer, known) → any number; 1 is what a right answer is usually worth.
Reward = Callable[[str, str, str], float]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(prompt: str, answer: str, known: str) -> float:
    """1 for the known answer, word for word."""
    return float(answer.strip() == known.strip())


def number(prompt: str, answer: str, known: str) -> float:
    """1 where the last number of the answer is the last one of the known answer, whatever stands around it."""
    said, right = (NUMBER.findall(text) for text in (answer, known))
    return float(bool(said and right) and _value(said[-1]) == _value(right[-1]))


def _value(text: str) -> float:
    return float(text.replace(",", ""))


REWARDS: dict[str, Reward] = {"exact": exact, "number": number}


def find_reward(name: str) -> Reward:
    """One of `REWARDS`, to which a script may add, or `module:function`. Raises `UserError` for neither."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"grpo.reward {name!r}: {did_you_mean(name, REWARDS)} One of yours is `module:function`")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"grpo.reward {name!r}: cannot be found: {error}") from None
