"""What answers are worth: plain functions of the question, the answer and the known answer, found by name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import ModuleType

import numpy as np

from slmkit.config import UserError, did_you_mean, kind_of_value

# reward(prompt, answer, known) → any number; 1 is what a right answer is usually worth.
Reward = Callable[[str, str, str], float]
MOST_SHOWN = 160  # characters of an answer, in an error
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
    """One of `REWARDS`, to which a script may add, or `file.py:function` or `module:function`.

    Raises `UserError` where there is no such function, or it does not take three arguments.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.rpartition(":")
    if not colon:
        raise UserError(f"grpo.reward {name!r}: {did_you_mean(name, REWARDS)} Name your own as `file.py:function`")
    loaded = _load(name, module)
    if not callable(reward := getattr(loaded, function, None)):
        known = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"grpo.reward {name}: cannot be found: no function {function!r}; {did_you_mean(function, known)}"
        )
    try:
        inspect.signature(reward).bind("", "", "")
    except TypeError:
        taken = inspect.signature(reward)
        raise UserError(
            f"grpo.reward {name}: takes {taken}; expected a function of three texts: prompt, answer and known answer"
        ) from None
    except ValueError:  # some built-in functions do not say what they take
        pass
    return reward


def _load(name: str, module: str) -> ModuleType:
    """The module of that name, or of that file. Raises `UserError` with what went wrong in it."""
    path = Path(module)
    if module.endswith(".py") and not path.is_file():
        raise UserError(f"grpo.reward {name}: cannot be found: no such file, here or beside the recipe")
    folder = str(path.resolve().parent) if module.endswith(".py") else str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # what a reward function imports may lie beside it
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        spec = importlib.util.spec_from_file_location(f"slmkit_reward_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    except ModuleNotFoundError as error:
        raise UserError(f"grpo.reward {name}: cannot be found: {error}") from error
    except Exception as error:
        raise UserError(f"grpo.reward {name}: cannot be loaded: {_said(error)}") from error


def worth(name: str, reward: Reward, prompt: str, answer: str, known: str) -> float:
    """What an answer is worth. Raises `UserError` that names it where the function fails or returns no number."""
    try:
        value = reward(prompt, answer, known)
    except Exception as error:
        raise UserError(f"grpo.reward {name}: {_said(error)}, for the answer {_short(answer)}") from error
    is_number = isinstance(value, Real | np.number) or (getattr(value, "shape", None) == () and hasattr(value, "item"))
    if not is_number or not math.isfinite(value):
        raise UserError(
            f"grpo.reward {name}: returned {_short(value)} ({kind_of_value(value)}) for the answer {_short(answer)}; "
            "expected one finite number"
        )
    return float(value)


def reward_digest(name: str) -> str | None:
    """sha256 (hex) of the file that a reward function is in; None for one that is not in a file of its own."""
    file = name.rpartition(":")[0]
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file.endswith(".py") else None


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


def _said(error: Exception) -> str:
    """An exception in one line, with the line of the user's own file where it arose."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{text} ({Path(last[0].filename).name}, line {last[0].lineno})" if last else text
