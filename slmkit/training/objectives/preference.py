"""Preference losses: better answers become likelier than worse ones, relative to a reference model.

DPO (Rafailov et al. 2023, arXiv:2305.18290), its length-normalised form (Tülu 3, Lambert et al. 2024,
arXiv:2411.15124), and SimPO, which needs no reference (Meng et al. 2024, arXiv:2405.14734). The reference is the model
that training starts from. It is frozen: its log-probabilities are computed once, before the first step, and only one
model is in memory.

KTO learns from single answers that were labelled good or bad (Ethayarajh et al. 2024, arXiv:2402.01306); APO-zero, as
`apo_zero_unpaired`, needs no estimated divergence (D'Oosterlinck et al. 2024, arXiv:2408.06266).

A loss of pairs also falls when both answers become less likely, the worse one more so. To prevent that, `rpo_alpha`
adds the better answer's negative log-likelihood (Pang et al. 2024, arXiv:2404.19733).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.data.rows.answers import JudgedRows, PairRows
from slmkit.device import Device
from slmkit.model.decoder import Decoder
from slmkit.training.losses import token_log_probabilities
from slmkit.training.objective import MEAN_OF_STEP, Loss, Objective
from slmkit.training.recipe.objective_settings import KtoSettings, PreferenceSettings

REFERENCE_KEY = "reference"  # key in `Batch.extra`: [pairs, 2]
FIGURES = ("rewards/accuracy", "rewards/margin", "log_probability/chosen", "log_probability/rejected")
ROUNDED_TO = 32  # padding columns are dropped in multiples of this, so that shapes repeat


class PerAnswer(Objective):
    """Averaged over rows, a pair of answers or one each; rows without learned tokens only keep ranks in step."""

    def weight(self, batch: Batch) -> int:
        return int(self.counts(batch).sum())

    def counts(self, batch: Batch) -> Tensor:
        """Whether something is learned of each answer of a row: bool [rows]."""
        return (batch.labels != IGNORED).any(dim=-1).reshape(len(batch.ids), -1).all(dim=1)


class Preference(PerAnswer):
    """An objective averaged over pairs. Rows are [2, length]: the better answer, then the worse one.

    Figures: how often the better answer has the higher reward, the margin, and the log-probability of each answer.
    """

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings, self.beta = settings, settings.strength

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        sums = label_log_probabilities(model, batch.ids, batch.labels).sum(dim=-1)  # [pairs, 2]
        tokens = (batch.labels != IGNORED).sum(dim=-1)  # [pairs, 2]
        rewards = self.rewards(sums, tokens, batch.extra.get(REFERENCE_KEY))  # [pairs, 2]
        losses = self.losses(rewards)  # [pairs]
        counts = self.counts(batch)  # [pairs]
        chosen, rejected = rewards.detach().unbind(dim=1)
        figures = ((chosen > rejected).float(), chosen - rejected, *sums.detach().unbind(dim=1))
        totals = {name: figure[counts].sum() for name, figure in zip(FIGURES, figures)}
        if self.settings.rpo_alpha:
            totals["preference_loss"] = losses.detach()[counts].sum()
            losses = losses - self.settings.rpo_alpha * (sums / tokens.clamp(min=1))[:, 0]
        return Loss(losses[counts].sum(), totals)

    def rewards(self, sums: Tensor, tokens: Tensor, reference: Tensor | None) -> Tensor:
        """The implicit reward of each answer: beta log(p / p of the reference).  all [pairs, 2]"""
        relative = sums - reference if self.settings.needs_reference and reference is not None else sums
        return self.beta * (relative if self.settings.loss == "dpo" else relative / tokens.clamp(min=1))

    def losses(self, rewards: Tensor) -> Tensor:
        """-log sigmoid(chosen - rejected), with label smoothing.  [pairs, 2] → [pairs]"""
        margin = rewards[:, 0] - rewards[:, 1]
        if self.settings.loss == "simpo":
            margin = margin - self.settings.simpo_gamma
        wrong = self.settings.label_smoothing
        return -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)


class Kto(PerAnswer):
    """An objective averaged over answers, each labelled good or bad.

    A good answer's reward should be above the divergence of the model from its reference, and a bad one's below. The
    divergence is estimated over the whole step, from prompts with answers of other rows, and has no gradient.

    Figures: the mean reward of good and of bad answers, the divergence in nats, and the share of good answers.
    """

    def __init__(self, settings: KtoSettings) -> None:
        self.settings = settings
        if settings.loss == "kto":
            self.survey = self._of_other_answers

    def __call__(self, model: Decoder, batch: Batch) -> Loss:
        settings, good, counts = self.settings, batch.extra["desirable"], self.counts(batch)
        sums = label_log_probabilities(model, batch.ids, batch.labels).sum(dim=-1)  # [rows]
        rewards = settings.beta * (sums - batch.extra[REFERENCE_KEY][:, 0])  # [rows]
        divergence = batch.extra.get(MEAN_OF_STEP, torch.zeros_like(rewards)).clamp(min=0)  # [rows]
        above = rewards - settings.beta * divergence
        losses = torch.where(
            good, settings.desirable_weight * (-above).sigmoid(), settings.undesirable_weight * above.sigmoid()
        )
        figures = {
            f"rewards/{name}": torch.stack([rewards.detach()[chosen].sum(), chosen.sum().to(rewards)])
            for name, chosen in (("chosen", counts & good), ("rejected", counts & ~good))
        }
        figures |= {"divergence": divergence[counts].sum(), "desirable": (counts & good).sum()}
        return Loss(losses[counts].sum(), figures)

    def _of_other_answers(self, model: Decoder, batch: Batch) -> Tensor:
        """Sum [] of log(p / p of the reference) of the other rows' answers."""
        sums = label_log_probabilities(model, batch.extra["other_ids"], batch.extra["other_labels"]).sum(dim=-1)
        return (sums - batch.extra[REFERENCE_KEY][:, 1])[self.counts(batch)].sum()


def both_answers(batch: Batch) -> tuple[Tensor, Tensor]:
    """Ids and labels that the reference reads: both sides of a pair, or a row's answer and the other row's.

    [rows, 2, length] each.
    """
    if batch.ids.dim() == 3:
        return batch.ids, batch.labels
    ids, labels = [batch.ids, batch.extra["other_ids"]], [batch.labels, batch.extra["other_labels"]]
    return torch.stack(ids, dim=1), torch.stack(labels, dim=1)


def label_log_probabilities(model: Decoder, ids: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability, in nats, of every learned label, 0 elsewhere.  [..., length] → [..., used]

    `used` is the number of columns up to the last learned one, rounded up: a causal model needs no others.
    """
    answers = labels.shape[:-1]
    ids, labels = ids.flatten(0, -2), labels.flatten(0, -2)  # [rows, length] each
    columns = (labels != IGNORED).any(dim=0).nonzero()
    used = rounded_up(int(columns[-1]) + 1 if len(columns) else 1)
    ids, labels = ids[:, :used], labels[:, :used]
    hidden = model(ids)  # [rows, used, width]
    learned = labels != IGNORED
    cap = model.architecture.logit_cap
    found = token_log_probabilities(hidden[learned], model.head_weight, labels[learned], cap, temperature)
    return torch.zeros(labels.shape, device=found.device).masked_scatter(learned, found).unflatten(0, answers)


def rounded_up(columns: int) -> int:
    """`columns` rounded up to a multiple of `ROUNDED_TO`."""
    return -(-columns // ROUNDED_TO) * ROUNDED_TO


@torch.no_grad()
def reference_log_probabilities(
    model: Decoder, rows: PairRows | JudgedRows, device: Device, rows_at_once: int, progress: Callable[[int, int], None]
) -> np.ndarray:
    """Log-probabilities, in nats, of both answers of every row under the current `model`: float32 [rows, 2].

    `progress` is called with the number of rows just done and of their learned tokens.
    """
    found = np.empty((rows.rows_in_epoch, 2), dtype=np.float32)
    was_training = model.training
    model.eval()
    order = rows.longest_first()  # rows of similar length together: little padding
    for start in range(0, len(order), rows_at_once):
        indices = order[start : start + rows_at_once]
        batch = rows.batch(indices).to(device.torch_device)
        with device.autocast():
            sums = label_log_probabilities(model, *both_answers(batch)).sum(dim=-1)  # [rows, 2]
        found[indices] = sums.float().cpu().numpy()
        progress(len(indices), batch.weight)
    model.train(was_training)
    return found
