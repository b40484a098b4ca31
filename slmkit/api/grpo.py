"""Questions with known answers to the work of a run: how answers are sampled and judged, and how held-out ones fare."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slmkit.api.hooks import Sample
from slmkit.api.material import Material, Work
from slmkit.api.rewards import find_reward, reward_digest, worth
from slmkit.config import UserError
from slmkit.data.questions import Questions
from slmkit.device import Device
from slmkit.generation import SamplingSettings, generate_ids
from slmkit.model import Decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.compilation import as_written
from slmkit.training.files import write_whole
from slmkit.training.grpo import GroupRelative, GrpoSettings, Judge, Judged, Rollouts
from slmkit.training.inventory import Inventory, blueprint_of, read_answers, write_answers
from slmkit.training.loop import Report, State
from slmkit.training.precision import to_weight_dtype
from slmkit.training.preference import rounded_up
from slmkit.training.recipe import Recipe

REWARD_DIGEST = "reward.sha256"  # in the data of a run
ROWS_AT_ONCE = 128  # answers that are sampled side by side


def grpo_work(m: Material) -> Work:
    """GRPO: every batch is sampled from the model as it is."""
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
    return Work(
        batches=Rollouts(train, m.model, reference, judge, settings, m.length, m.recipe.seed, m.group),
        objective=GroupRelative(settings),
        validate=ValidateAnswers(held_out, judge, settings, m),
        sample=Sample(m.run.samples, m.recipe, m.corpus.tokenizer, True, m.group),
        validation_tokens=sum(len(held_out.prompt(index)) + settings.max_new_tokens for index in range(len(held_out))),
        longest=rounded_up(max(train.longest, held_out.longest) + settings.max_new_tokens),
    )


def _expect_the_same_reward(m: Material) -> None:
    """Store the digest of the reward's file with the run. Raises `UserError` where it has changed since."""
    stored, digest = m.run.data / REWARD_DIGEST, reward_digest(m.recipe.grpo.reward)
    if stored.is_file() and stored.read_text().strip() != str(digest):
        raise UserError(
            f"grpo.reward {m.recipe.grpo.reward}: the file has changed since the run began: "
            "restore it, or start a new run"
        )
    if m.group.is_main and not stored.is_file() and digest is not None:
        write_whole(stored, digest)


def grpo_inventory(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> Inventory:
    """Answers are sampled side by side, and with `beta` read by the model as it was, all of a step at once."""
    settings = recipe.grpo
    count, new = settings.num_generations, settings.max_new_tokens
    prompts = min(settings.prompts_per_step, max(1, ROWS_AT_ONCE // count))

    def write(model: Decoder, beside: Decoder | None, length: int) -> None:
        write_answers(model, prompts, count, max(1, length - new), new)

    def read(model: Decoder, beside: Decoder | None, length: int) -> None:
        assert beside is not None
        read_answers(beside, settings.rows_per_step, length)

    if not settings.beta:
        return Inventory(model, readings=(write,))
    reference = blueprint_of(model)
    to_weight_dtype(reference, device)
    return Inventory(model, reference, readings=(write, read))


def judge_of(tokenizer: SLMTokenizer, settings: GrpoSettings) -> Judge:
    """The project's own generator, and the reward that the recipe names. Raises `UserError` where there is no such."""
    reward = find_reward(settings.reward)

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def judge(prompt: np.ndarray, answer: np.ndarray, known: np.ndarray) -> Judged:
        said, right = text(answer), text(known)
        value = worth(settings.reward, reward, text(prompt), said, right)
        return Judged(value, said.strip() == right.strip())

    return Judge(AnswerSampler(tokenizer, settings.max_new_tokens, settings.temperature), judge)


@dataclass(frozen=True)
class AnswerSampler:
    """`count` answers to each of some prompts, of any lengths: each with the token that ended it, where one did."""

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
    """The tokens of an answer through the first that ends it."""
    ends = np.flatnonzero(np.isin(ids, [*stops]))
    return ids[: ends[0] + 1] if len(ends) else ids


class ValidateAnswers:
    """A hook for all ranks: how many held-out questions are answered rightly where the likeliest token is taken.

    `validation/right` is their share. `validation_loss` is what their rewards lack of 1 on average, so that the best
    checkpoint is the one with the best answers.
    """

    def __init__(self, questions: Questions, judge: Judge, settings: GrpoSettings, m: Material) -> None:
        self.questions, self.judge, self.group = questions, judge, m.group
        self.greedy = AnswerSampler(m.corpus.tokenizer, settings.max_new_tokens, temperature=0.0)

    def __call__(self, state: State, report: Report) -> None:
        group, count = self.group, len(self.questions)
        mine = range(group.rank, count, group.world)
        prompts = [self.questions.prompt(index) for index in mine]
        with group.whole(state.model), as_written(state.model):
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
