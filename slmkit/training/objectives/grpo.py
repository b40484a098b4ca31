"""GRPO: answers are sampled in groups, one group per question, and scored; the better ones become likelier.

GRPO (Shao et al. 2024, arXiv:2402.03300): an answer's advantage is its reward minus the mean of its group, so that no
value model is needed. Answers are sampled anew for every update with the current weights: the importance ratio is 1,
and nothing is clipped.

By default as Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): token sums are divided by a constant, and rewards are not
divided by their group's standard deviation; dividing by an answer's own length would penalise long wrong answers less,
and by the deviation would favour questions that are nearly always or nearly never answered. `loss: grpo` has both, as
published first. DAPO's mean over a step's tokens (arXiv:2503.14476) differs from the default by one factor per step,
which Adam's scaling largely cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slmkit.data.batch import Batch, stacked
from slmkit.data.order import mixed_seed
from slmkit.data.packing import IGNORED, padded, row_of_labels
from slmkit.data.rows.answers import Questions
from slmkit.data.stream import share_of_rank, shuffled
from slmkit.model.decoder import Decoder
from slmkit.training.compilation import eager
from slmkit.training.distributed import Group
from slmkit.training.loop import random_seed
from slmkit.training.objective import Loss
from slmkit.training.objectives.preference import label_log_probabilities
from slmkit.training.recipe.objective_settings import GrpoSettings

SMALLEST_DEVIATION = 1e-4  # least standard deviation of rewards by which advantages are divided


class Judged(NamedTuple):
    """Reward of an answer, and whether it is the known one."""

    reward: float
    is_right: bool


@dataclass(frozen=True)
class RewardFunction:
    """Functions that sample and score answers; both use the tokenizer, which this module does not know."""

    # Model, prompts, answers per prompt, seed → answers, those to one prompt adjacent.
    sample: Callable[[Decoder, Sequence[np.ndarray], int, int], list[np.ndarray]]
    judge: Callable[[np.ndarray, np.ndarray, np.ndarray], Judged]  # prompt, answer, known answer


class Rollouts:
    """Batches of answers to shuffled questions, sampled from the model at that step. Implements `Batches`.

    Every random number follows from (seed, step, rank), so that weights and step determine a batch.
    """

    separate = False
    total_rows: int | None = None

    def __init__(
        self,
        questions: Questions,
        model: Decoder,
        reference: Decoder | None,
        judge: RewardFunction,
        settings: GrpoSettings,
        length: int,
        seed: int,
        group: Group,
    ) -> None:
        """`reference`: required if `settings.beta` is above 0. Rows have `length` tokens."""
        self.questions, self.model, self.reference, self.judge = questions, model, reference, judge
        self.settings, self.length, self.seed, self.group = settings, length, seed, group
        self.pad_id = questions.shards.header.pad_token_id or 0
        self.rows_per_step = settings.rows_per_step
        self.rows_in_epoch: int | None = len(questions) * settings.num_generations

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """`[questions * num_generations, length]`, the answers to one question adjacent."""
        asked, size = self.settings.prompts_per_step, self.settings.num_generations
        places = np.arange(asked, dtype=np.int64)[share_of_rank(asked, rank, world)]
        # Questions of similar length together: little padding.
        indices = sorted(shuffled(step * asked + places, len(self.questions), self.seed), key=self.questions.length)
        asking = [self.questions.prompt(index) for index in indices]
        seed = random_seed(mixed_seed(self.seed, "answers"), step, rank)
        with self.group.whole(self.model), eager(self.model):
            answers = self.judge.sample(self.model, asking, size, seed)
        prompts = [prompt for prompt in asking for _ in range(size)]
        extras: list[dict[str, np.ndarray]] = []
        for number, index in enumerate(indices):
            group = slice(number * size, (number + 1) * size)
            known = self.questions.known(index)
            extras += self._worth(
                [self.judge.judge(*each, known) for each in zip(prompts[group], answers[group], strict=True)]
            )
        batch = Batch.of(*self._rows(prompts, answers), extra=stacked(extras))
        return batch if self.reference is None else self._referred(batch, self.reference)

    def has(self, step: int) -> bool:
        return True

    def shares(self, step: int) -> dict[str, float]:
        return {}

    def position(self) -> dict[str, Any]:
        return {}

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Does nothing: a batch follows from its step and the weights."""

    def _worth(self, group: Sequence[Judged]) -> list[dict[str, np.ndarray]]:
        """Extra values of each answer of a group: its advantage and its figures."""
        rewards = np.array([each.reward for each in group], dtype=np.float32)
        advantages = rewards - rewards.mean()
        if self.settings.loss == "grpo":
            advantages = advantages / (rewards.std(ddof=1) + SMALLEST_DEVIATION)
        is_silent = bool((rewards == rewards[0]).all())
        columns = (advantages, rewards, [each.is_right for each in group], [is_silent] * len(group))
        names = ("advantage", "reward", "right", "silent")
        return [
            {name: np.float32(value) for name, value in zip(names, values)}  # type: ignore[misc]
            for values in zip(*columns, strict=True)
        ]

    def _rows(self, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels [rows, length]; only the answers are learned."""
        ids, labels = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = np.concatenate([prompt, answer])
            ids.append(padded([tokens], self.length, self.pad_id))
            labels.append(padded([row_of_labels(tokens, np.arange(len(tokens)) >= len(prompt))], self.length, IGNORED))
        return np.stack(ids), np.stack(labels)

    @torch.no_grad()
    def _referred(self, batch: Batch, reference: Decoder) -> Batch:
        """The batch with the reference model's log-probabilities of its labels: [rows, length]."""
        device = next(reference.parameters()).device
        found = torch.zeros(batch.labels.shape)
        each = label_log_probabilities(
            reference, batch.ids.to(device), batch.labels.to(device), self.settings.temperature
        )
        found[:, : each.size(1)] = each.float().cpu()
        return Batch(batch.ids, batch.labels, batch.weight, None, {**batch.extra, "reference": found})


class GroupRelative:
    """An objective averaged over answers: each token's log-probability times its answer's advantage.

    The loss itself is always near 0. Figures: the share of right answers, the mean reward and length, and the share of
    answers in groups whose rewards are all the same.
    """

    def __init__(self, settings: GrpoSettings) -> None:
        self.settings = settings

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        settings, figures = self.settings, _told_of(batch)
        if not settings.beta:
            batch = _with_signal(batch)
        extra = batch.extra
        found = label_log_probabilities(model, batch.ids, batch.labels, settings.temperature)  # [rows, used]
        learned = (batch.labels != IGNORED)[:, : found.size(1)]
        tokens = learned.sum(dim=1).clamp(min=1)  # [rows]
        # The sampling policy is the updated one: the ratio is 1, and has the gradient of the log-probability.
        losses = -(found - found.detach()).exp() * extra["advantage"][:, None]
        if settings.beta:
            away = extra["reference"][:, : found.size(1)] - found
            divergence = (away.exp() - away - 1) * learned  # of the policy from the reference, arXiv:2402.03300 (4)
            losses = losses + settings.beta * divergence
            figures["divergence"] = (divergence.detach().sum(dim=1) / tokens).sum()
        over = tokens if settings.loss == "grpo" else settings.max_new_tokens
        return Loss(((losses * learned).sum(dim=1) / over).sum(), figures)

    def weight(self, batch: Batch) -> int:
        return int((batch.labels != IGNORED).any(dim=-1).sum())


def _told_of(batch: Batch) -> dict[str, Tensor]:
    """Figures [] summed over answers. Rows without learned tokens, which keep ranks in step, do not count."""
    tokens = (batch.labels != IGNORED).sum(dim=1)  # [rows]
    told = {"answers/right": batch.extra["right"], "answers/reward": batch.extra["reward"], "answers/tokens": tokens}
    told["groups/without_signal"] = batch.extra["silent"]
    return {name: figure[tokens > 0].float().sum() for name, figure in told.items()}


def _with_signal(batch: Batch) -> Batch:
    """The answers with an advantage other than 0, or else one answer: the others have no gradient."""
    chosen = batch.extra["advantage"] != 0
    chosen[0] |= ~chosen.any()
    return batch.only(chosen)
