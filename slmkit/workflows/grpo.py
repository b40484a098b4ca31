"""GRPO runs: sampling and scoring of answers, and validation on held-out questions."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from slmkit.config import UserError, did_you_mean, kind_of_value
from slmkit.data.rows.answers import Questions
from slmkit.device import Device
from slmkit.files import write_whole
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.compilation import eager
from slmkit.training.estimate.memory_profile import MemoryProfile, meta_model_of, read_answers, write_answers
from slmkit.training.loop import Report, State
from slmkit.training.objectives.grpo import GroupRelative, GrpoSettings, Judged, RewardFunction, Rollouts
from slmkit.training.objectives.preference import rounded_up
from slmkit.training.precision import to_weight_dtype
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import ObjectiveParts, RunContext
from slmkit.workflows.hooks import Sample

REWARD_DIGEST = "reward.sha256"  # in a run's data folder
ROWS_AT_ONCE = 128  # answers sampled in one batch


def grpo_work(m: RunContext) -> ObjectiveParts:
    """Objective parts of GRPO; batches are sampled from the current model. Raises `UserError` for several sources."""
    settings = m.recipe.grpo
    if len(m.corpus.train) > 1:
        raise UserError("grpo reads its questions from one source: name it as data.source")
    train, held_out = (
        Questions(shards, m.length, settings.max_new_tokens) for shards in (m.corpus.train[0], m.corpus.validation)
    )
    for name, questions in (("train", train), ("validation", held_out)):
        for line in questions.report():
            m.reporter.say(f"{name}: {line}")
    m.model.to(m.device.torch_device)
    to_weight_dtype(m.model, m.device)
    judge = judge_of(m.corpus.tokenizer, settings)
    _expect_the_same_reward(m)
    reference = copy.deepcopy(m.model).eval().requires_grad_(False) if settings.beta else None
    return ObjectiveParts(
        batches=Rollouts(train, m.model, reference, judge, settings, m.length, m.recipe.seed, m.group),
        objective=GroupRelative(settings),
        validate=ValidateAnswers(held_out, judge, settings, m),
        sample=Sample(m.run.samples, m.recipe, m.corpus.tokenizer, True, m.group),
        validation_tokens=sum(len(held_out.prompt(index)) + settings.max_new_tokens for index in range(len(held_out))),
        longest=rounded_up(max(train.longest, held_out.longest) + settings.max_new_tokens),
    )


def _expect_the_same_reward(m: RunContext) -> None:
    """Store the digest of the reward's file with the run. Raises `UserError` if the file has changed since."""
    stored, digest = m.run.data / REWARD_DIGEST, reward_digest(m.recipe.grpo.reward)
    if stored.is_file() and stored.read_text().strip() != str(digest):
        raise UserError(
            f"grpo.reward {m.recipe.grpo.reward}: the file has changed since the run began: "
            "restore it, or start a new run"
        )
    if m.group.is_main and not stored.is_file() and digest is not None:
        write_whole(stored, digest)


def grpo_inventory(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> MemoryProfile:
    """Memory profile: a batch of answers is sampled, and with `beta` the reference reads all of a step at once."""
    settings = recipe.grpo
    count, new = settings.num_generations, settings.max_new_tokens
    prompts = min(settings.prompts_per_step, max(1, ROWS_AT_ONCE // count))

    def write(model: Decoder, beside: Decoder | None, length: int) -> None:
        write_answers(model, prompts, count, max(1, length - new), new)

    def read(model: Decoder, beside: Decoder | None, length: int) -> None:
        assert beside is not None
        read_answers(beside, settings.rows_per_step, length)

    if not settings.beta:
        return MemoryProfile(model, readings=(write,))
    reference = meta_model_of(model)
    to_weight_dtype(reference, device)
    return MemoryProfile(model, reference, readings=(write, read))


def judge_of(tokenizer: SLMTokenizer, settings: GrpoSettings) -> RewardFunction:
    """slmkit's generator, and the recipe's reward function. Raises `UserError` if that does not exist."""
    reward = find_reward(settings.reward)

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def judge(prompt: np.ndarray, answer: np.ndarray, known: np.ndarray) -> Judged:
        said, right = text(answer), text(known)
        value = worth(settings.reward, reward, text(prompt), said, right)
        return Judged(value, said.strip() == right.strip())

    return RewardFunction(AnswerSampler(tokenizer, settings.max_new_tokens, settings.temperature), judge)


@dataclass(frozen=True)
class AnswerSampler:
    """Samples `count` answers [new] to each prompt [prompt], of any lengths; answers include their end tokens."""

    tokenizer: SLMTokenizer
    max_new_tokens: int
    temperature: float  # 0: greedy

    def __call__(self, model: Decoder, prompts: Sequence[np.ndarray], count: int, seed: int) -> list[np.ndarray]:
        answers: list[np.ndarray] = []
        at_once = max(1, ROWS_AT_ONCE // count)
        for start in range(0, len(prompts), at_once):
            answers += self._side_by_side(model, prompts[start : start + at_once], count, seed + start)
        return answers

    def _side_by_side(self, model: Decoder, prompts: Sequence[np.ndarray], count: int, seed: int) -> list[np.ndarray]:
        pad_id, stops = self.tokenizer.pad_token_id or 0, self.tokenizer.stop_token_ids
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
        for row, prompt in zip(ids, prompts):
            row[longest - len(prompt) :] = prompt
        device = model.embedding.weight.device
        found = generate_ids(
            model,
            torch.from_numpy(ids).to(device),
            max_new_tokens=self.max_new_tokens,
            stop_ids=stops,
            settings=SamplingSettings(temperature=self.temperature, seed=seed % 2**63),
            pad_token_id=pad_id,
            padding=torch.tensor([longest - len(prompt) for prompt in prompts], device=device),
            num_return_sequences=count,
            known=self.tokenizer.known_ids,
        )
        return [_until_its_end(row, stops) for row in found[:, longest:].cpu().numpy()]


def _until_its_end(ids: np.ndarray, stops: set[int]) -> np.ndarray:
    """The tokens of an answer up to its first end token, inclusive.  [new] → [at most new]"""
    ends = np.flatnonzero(np.isin(ids, [*stops]))
    return ids[: ends[0] + 1] if len(ends) else ids


class ValidateAnswers:
    """Hook for all ranks: accuracy of greedy answers to held-out questions.

    `validation/right` is the share of right answers. `validation_loss` is 1 minus the mean reward, so that the best
    checkpoint is the one with the best answers.
    """

    def __init__(self, questions: Questions, judge: RewardFunction, settings: GrpoSettings, m: RunContext) -> None:
        self.questions, self.judge, self.group = questions, judge, m.group
        self.greedy = AnswerSampler(m.corpus.tokenizer, settings.max_new_tokens, temperature=0.0)

    def __call__(self, state: State, report: Report) -> None:
        group, count = self.group, len(self.questions)
        mine = range(group.rank, count, group.world)
        prompts = [self.questions.prompt(index) for index in mine]
        with group.whole(state.model), eager(state.model):
            answers = self.greedy(state.model, prompts, count=1, seed=0)
        judged = [
            self.judge.judge(prompt, answer, self.questions.known(index))
            for index, prompt, answer in zip(mine, prompts, answers)
        ]
        right, reward, tokens = group.sum(
            sum(each.is_right for each in judged), sum(each.reward for each in judged), sum(map(len, answers))
        )
        report["validation_loss"], report["validation/reward"] = 1 - reward / count, reward / count
        report |= {"validation/right": right / count, "validation/tokens": tokens / count}


# reward(prompt, answer, known) → any finite number, usually 1 for a right answer.
Reward = Callable[[str, str, str], float]
MOST_SHOWN = 160  # characters of an answer, in an error
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(prompt: str, answer: str, known: str) -> float:
    """1 for the known answer, word for word."""
    return float(answer.strip() == known.strip())


def number(prompt: str, answer: str, known: str) -> float:
    """1 if the last number of the answer equals the last number of the known answer, else 0."""
    said, right = (NUMBER.findall(text) for text in (answer, known))
    return float(bool(said and right) and _value(said[-1]) == _value(right[-1]))


def _value(text: str) -> float:
    return float(text.replace(",", ""))


REWARDS: dict[str, Reward] = {"exact": exact, "number": number}


def find_reward(name: str) -> Reward:
    """The function of a name in `REWARDS`, to which a script may add, of `file.py:function` or `module:function`.

    Raises `UserError` if there is no such function, or it does not take three arguments.
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
    except ValueError:  # some built-in functions have no signature
        pass
    return reward


def _load(name: str, module: str) -> ModuleType:
    """The module of that name or file. Raises `UserError` with the reason if it cannot be loaded."""
    path = Path(module)
    if module.endswith(".py") and not path.is_file():
        raise UserError(f"grpo.reward {name}: cannot be found: no such file, here or beside the recipe")
    folder = str(path.resolve().parent) if module.endswith(".py") else str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # a reward function may import modules beside it
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
    """Reward of an answer. Raises `UserError` that names the function if it fails or returns no finite number."""
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
    """sha256 (hex) of a reward function's file; None if it is not given as a file."""
    file = name.rpartition(":")[0]
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file.endswith(".py") else None


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


def _said(error: Exception) -> str:
    """An exception in one line, with the line number in the user's file."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{text} ({Path(last[0].filename).name}, line {last[0].lineno})" if last else text
