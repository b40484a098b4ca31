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

import numpy as np

from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.model.decoder import Decoder
from slmkit.training.objective import Loss
from slmkit.training.objectives.preference import PerAnswer, label_log_probabilities
from slmkit.training.recipe.objective_settings import GrpoSettings

FIGURES = ("answers/right", "answers/reward", "answers/tokens", "groups/without_signal")
SMALLEST_DEVIATION = 1e-4  # least standard deviation of rewards by which advantages are divided


def answer_columns(rewards: np.ndarray, right: np.ndarray, settings: GrpoSettings) -> dict[str, np.ndarray]:
    """Advantage and figures of each answer, float32 [rows] each, as `rewards` and `right` are (1 for right answers)."""
    groups = rewards.reshape(-1, settings.num_generations)  # [questions, num_generations]
    advantages = groups - groups.mean(axis=1, keepdims=True)
    if settings.loss == "grpo":
        advantages = advantages / (groups.std(axis=1, ddof=1, keepdims=True) + SMALLEST_DEVIATION)
    silent = np.repeat((groups == groups[:, :1]).all(axis=1), settings.num_generations)  # [rows]
    return {"advantage": advantages.ravel(), "reward": rewards, "right": right, "silent": silent.astype(np.float32)}


class GroupRelative(PerAnswer):
    """An objective averaged over answers: each token's log-probability times its answer's advantage.

    The loss itself is always near 0. Figures: the share of right answers, the mean reward and length, and the share of
    answers in groups whose rewards are all the same.
    """

    def __init__(self, settings: GrpoSettings) -> None:
        self.settings = settings

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        settings, extra = self.settings, batch.extra
        tokens, counts = (batch.labels != IGNORED).sum(dim=1), self.counts(batch)  # [rows] each
        values = zip(FIGURES, (extra["right"], extra["reward"], tokens, extra["silent"]))
        figures = {name: figure[counts].float().sum() for name, figure in values}
        if not settings.beta:  # answers without an advantage have no gradient; one row stays, to keep ranks in step
            chosen = extra["advantage"] != 0
            chosen[0] |= ~chosen.any()
            batch = batch.only(chosen)
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
