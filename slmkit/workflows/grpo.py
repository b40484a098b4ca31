"""GRPO runs: sampling and scoring of answers, and validation on held-out questions."""

from __future__ import annotations

import copy
import importlib
import math
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from slmkit.config import UserError, did_you_mean, kind_of_value
from slmkit.data.batch import Batch
from slmkit.data.order import mixed_seed
from slmkit.data.packing import IGNORED, padded, row_of_labels
from slmkit.data.rows.answers import Questions
from slmkit.data.stream import Batches, share_of_rank, shuffled
from slmkit.device import Device
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.compilation import eager
from slmkit.training.distributed import Group
from slmkit.training.estimate.memory import MemoryProfile, meta_model_of, read_answers, write_answers
from slmkit.training.loop import Report, State, random_seed
from slmkit.training.objectives.grpo import GroupRelative, answer_columns
from slmkit.training.objectives.preference import label_log_probabilities, rounded_up
from slmkit.training.precision import to_weight_dtype
from slmkit.training.recipe.objective_settings import GrpoSettings
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import ObjectiveParts, RecipeContext

ROWS_AT_ONCE = 128  # answers sampled in one batch


def grpo_parts(m: RecipeContext) -> ObjectiveParts:
    """Objective parts of GRPO; batches are sampled from the current model. Raises `UserError` for several sources."""
    settings = m.recipe.grpo
    if len(m.corpus.train) > 1:
        raise UserError("grpo reads its questions from one source: name it as data.source")
    train, held_out = (
        Questions(shards, m.length, settings.max_new_tokens) for shards in (m.corpus.train[0], m.corpus.validation)
    )
    for line in held_out.report():
        m.reporter.say(f"validation: {line}")
    m.model.to(m.device.torch_device)
    to_weight_dtype(m.model, m.device)
    score = reward_function(m.corpus.tokenizer, settings.reward)
    sample = AnswerSampler(m.corpus.tokenizer, settings.max_new_tokens, settings.temperature)
    reference = copy.deepcopy(m.model).eval().requires_grad_(False) if settings.beta else None
    return ObjectiveParts(
        batches=Rollouts(train, m.model, reference, sample, score, settings, m.length, m.recipe.seed, m.group),
        objective=GroupRelative(settings),
        validate=ValidateAnswers(held_out, replace(sample, temperature=0.0), score, m.group),
        measures={"validation_loss": False, "validation/reward": True, "validation/right": True},
        validation_tokens=sum(len(held_out.prompt(index)) + settings.max_new_tokens for index in range(len(held_out))),
        longest=rounded_up(max(train.longest, held_out.longest) + settings.max_new_tokens),
    )


def grpo_memory(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> MemoryProfile:
    """Memory profile: a batch of answers is sampled, and with `beta` the reference reads all of a step at once."""
    settings = recipe.grpo
    count, new = settings.num_generations, settings.max_new_tokens
    prompts = min(settings.prompts_per_step, max(1, ROWS_AT_ONCE // count))

    def write(model: Decoder, frozen: Decoder | None, length: int) -> None:
        write_answers(model, prompts, count, max(1, length - new), new)

    def read(model: Decoder, frozen: Decoder | None, length: int) -> None:
        assert frozen is not None
        read_answers(frozen, settings.rows_per_step, length)

    if not settings.beta:
        return MemoryProfile(model, readings=(write,))
    reference = meta_model_of(model)
    to_weight_dtype(reference, device)
    return MemoryProfile(model, reference, readings=(write, read))


# -- sampled answers --------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """Reward of an answer, and whether it is the known one."""

    reward: float
    is_right: bool


# Model, prompts, answers per prompt, seed → answers, those to one prompt adjacent.
SampleAnswers = Callable[[Decoder, Sequence[np.ndarray], int, int], list[np.ndarray]]
RewardFunction = Callable[[np.ndarray, np.ndarray, np.ndarray], Score]  # prompt, answer, known answer


@dataclass(eq=False)
class Rollouts(Batches):
    """Batches of answers to shuffled questions, sampled from the model at that step.

    Every random number follows from (seed, step, rank), so that weights and step determine a batch.
    """

    questions: Questions
    model: Decoder
    reference: Decoder | None  # required if `settings.beta` is above 0
    sample: SampleAnswers
    score: RewardFunction
    settings: GrpoSettings
    length: int  # tokens of a row
    seed: int
    group: Group

    def __post_init__(self) -> None:
        self.pad_id = self.questions.shards.header.pad_token_id or 0
        self.rows_per_step = self.settings.rows_per_step
        self.rows_in_epoch = len(self.questions) * self.settings.num_generations

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """`[questions * num_generations, length]`, the answers to one question adjacent."""
        count, size = self.settings.prompts_per_step, self.settings.num_generations
        places = np.arange(count, dtype=np.int64)[share_of_rank(count, rank, world)]
        # Questions of similar length together: little padding.
        indices = sorted(shuffled(step * count + places, len(self.questions), self.seed), key=self.questions.length)
        asking = [self.questions.prompt(index) for index in indices]
        seed = random_seed(mixed_seed(self.seed, "answers"), step, rank)
        with self.group.whole(self.model), eager(self.model):
            answers = self.sample(self.model, asking, size, seed)
        prompts = [prompt for prompt in asking for _ in range(size)]
        known = [self.questions.known(index) for index in indices for _ in range(size)]
        scores = [self.score(*each) for each in zip(prompts, answers, known, strict=True)]
        rewards, right = np.array(scores, dtype=np.float32).T.copy()  # [rows] each, contiguous
        ids, labels = zip(*map(self._row, prompts, answers))
        batch = Batch.of(np.stack(ids), np.stack(labels), extra=answer_columns(rewards, right, self.settings))
        return batch if self.reference is None else self._referred(batch, self.reference)

    def report(self) -> list[str]:
        return self.questions.report()

    def _row(self, prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels [length]; only the answer is learned."""
        tokens = np.concatenate([prompt, answer])
        labels = row_of_labels(tokens, np.arange(len(tokens)) >= len(prompt))
        return padded([tokens], self.length, self.pad_id), padded([labels], self.length, IGNORED)

    @torch.no_grad()
    def _referred(self, batch: Batch, reference: Decoder) -> Batch:
        """The batch with the reference model's log-probabilities of its labels: [rows, length]."""
        ids, labels = (tensor.to(reference.embedding.weight.device) for tensor in (batch.ids, batch.labels))
        each = label_log_probabilities(reference, ids, labels, self.settings.temperature).float().cpu()  # [rows, used]
        return batch.with_extra(reference=F.pad(each, (0, batch.labels.size(1) - each.size(1))))


@dataclass(frozen=True)
class AnswerSampler:
    """Samples `count` answers [new] to each prompt [prompt], of any lengths; answers include their end tokens."""

    tokenizer: SLMTokenizer
    max_new_tokens: int
    temperature: float  # 0: greedy

    def __call__(self, model: Decoder, prompts: Sequence[np.ndarray], count: int, seed: int) -> list[np.ndarray]:
        pad_id, stops = self.tokenizer.pad_token_id or 0, self.tokenizer.stop_token_ids
        device, at_once = model.embedding.weight.device, max(1, ROWS_AT_ONCE // count)
        answers: list[np.ndarray] = []
        for start in range(0, len(prompts), at_once):
            chosen = prompts[start : start + at_once]
            longest = max(map(len, chosen))
            padding = [longest - len(prompt) for prompt in chosen]
            ids = np.stack([np.pad(prompt, (left, 0), constant_values=pad_id) for prompt, left in zip(chosen, padding)])
            found = generate_ids(
                model,
                torch.from_numpy(ids).to(device),
                max_new_tokens=self.max_new_tokens,
                stop_ids=stops,
                settings=SamplingSettings(temperature=self.temperature, seed=(seed + start) % 2**63),
                pad_token_id=pad_id,
                padding=torch.tensor(padding, device=device),
                num_return_sequences=count,
                known=self.tokenizer.known_ids,
            )
            for answer in found[:, longest:].cpu().numpy():  # [new]
                ends = np.flatnonzero(np.isin(answer, [*stops]))
                answers.append(answer[: ends[0] + 1] if len(ends) else answer)
        return answers


def reward_function(tokenizer: SLMTokenizer, name: str) -> RewardFunction:
    """Scores answers by the recipe's reward function. Raises `UserError` if that does not exist."""
    reward = find_reward(name)

    def score(*ids: np.ndarray) -> Score:
        prompt, answer, known = (tokenizer.decode(each.tolist(), skip_special_tokens=True) for each in ids)
        return Score(checked_reward(name, reward, prompt, answer, known), answer.strip() == known.strip())

    return score


class ValidateAnswers:
    """Hook for all ranks: accuracy of greedy answers to held-out questions.

    `validation/right` is the share of right answers. `validation_loss` is 1 minus the mean reward, so that the best
    checkpoint is the one with the best answers.
    """

    def __init__(self, questions: Questions, greedy: SampleAnswers, score: RewardFunction, group: Group) -> None:
        self.questions, self.greedy, self.score, self.group = questions, greedy, score, group

    def __call__(self, state: State, report: Report) -> None:
        group, count = self.group, len(self.questions)
        mine = range(group.rank, count, group.world)
        prompts = [self.questions.prompt(index) for index in mine]
        with group.whole(state.model), eager(state.model):
            answers = self.greedy(state.model, prompts, 1, 0)
        scores = [self.score(*each) for each in zip(prompts, answers, map(self.questions.known, mine))]
        right, reward, tokens = group.sum(
            sum(each.is_right for each in scores), sum(each.reward for each in scores), sum(map(len, answers))
        )
        report["validation_loss"], report["validation/reward"] = 1 - reward / count, reward / count
        report |= {"validation/right": right / count, "validation/tokens": tokens / count}


# -- rewards ----------------------------------------------------------------------------------------------------------

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
    return float(bool(said and right) and float(said[-1].replace(",", "")) == float(right[-1].replace(",", "")))


REWARDS: dict[str, Reward] = {"exact": exact, "number": number}


def find_reward(name: str) -> Reward:
    """The function of a name in `REWARDS`, to which a script may add, of `file.py:function` or `module:function`.

    Raises `UserError` if it cannot be loaded.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.rpartition(":")
    if not colon:
        raise UserError(f"grpo.reward {name!r}: {did_you_mean(name, REWARDS)} Name your own as `file.py:function`")
    is_file = module.endswith(".py")
    if is_file and not Path(module).is_file():
        raise UserError(f"grpo.reward {name}: cannot be found: no such file, here or beside the recipe")
    folder = str(Path(module).resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # a reward function may import modules beside it
    try:
        loaded = runpy.run_path(module, run_name="slmkit_reward") if is_file else vars(importlib.import_module(module))
    except Exception as error:
        raise UserError(f"grpo.reward {name}: cannot be loaded: {_said(error)}") from error
    if not callable(loaded.get(function)):
        known = [key for key, value in loaded.items() if callable(value) and not key.startswith("_")]
        raise UserError(f"grpo.reward {name}: no function {function!r}; {did_you_mean(function, known)}")
    return loaded[function]


def checked_reward(name: str, reward: Reward, prompt: str, answer: str, known: str) -> float:
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


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


def _said(error: Exception) -> str:
    """An exception in one line, with the line number in the user's file."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{text} ({Path(last[0].filename).name}, line {last[0].lineno})" if last else text
