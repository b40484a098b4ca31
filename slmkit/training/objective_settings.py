"""The sections of a recipe that belong to one objective. No torch here: recipes are checked without it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from slmkit.config import Settings

BETA = {"dpo": 0.1, "dpo_norm": 5.0, "simpo": 2.0}  # as published: a mean over tokens is far smaller than their sum
Divergence = Literal["forward_kl", "reverse_kl", "js"]


class DistillationSettings(Settings):
    """Whom to learn from, and how much; `slmkit.training.distillation` has the formulas.

    The loss is `alpha` times the cross-entropy of the labels plus `1 - alpha` times temperature² times the divergence
    from the teacher: 1 is learning without a teacher, 0 from the teacher alone.
    """

    teacher: str | None = None  # a model or run directory, of the same tokenizer
    cache: str | None = None  # what `slm distill-cache` stored of it: no teacher is in memory then
    reads: Literal["text", "conversations"] = "text"  # what is learned: all of a text, or the assistant's turns
    alpha: float = Field(0.5, ge=0, le=1)  # the share of the labels
    temperature: float = Field(3.0, gt=0)  # temperature of both distributions in the divergence
    divergence: Divergence = "forward_kl"  # how student and teacher are compared
    top_k: int = Field(64, gt=0)  # how many of the teacher's likeliest tokens a cache stores at each position
    hidden_weight: float = Field(0.0, ge=0)  # weight of the distance between hidden states, layer by layer; 0: not used

    @model_validator(mode="after")
    def _is_taught(self) -> DistillationSettings:
        if self.teacher is None and self.cache is None:
            raise ValueError(
                "no teacher: set teacher to a model directory, or cache to what `slm distill-cache` stored"
            )
        if self.cache is not None and self.hidden_weight:
            raise ValueError(
                "hidden_weight needs the teacher's hidden states, which a cache does not have: drop one of them"
            )
        return self


class PreferenceSettings(Settings):
    """What is made of a pair. `dpo_norm` is DPO by the mean over an answer's tokens; `simpo` has no reference."""

    loss: Literal["dpo", "dpo_norm", "simpo"] = "dpo"  # docs/teaching.md has the formulas
    beta: float | None = Field(None, gt=0)  # strength of the preference; None: 0.1 for dpo, 5 for dpo_norm, 2 for simpo
    simpo_gamma: float = Field(0.5, ge=0)  # simpo only: by how much the better answer's reward should be higher
    rpo_alpha: float = Field(0.0, ge=0)  # weight of the better answer's own loss, the mean over its tokens
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)  # the share of pairs that are taken to be the wrong way round

    @property
    def strength(self) -> float:
        return BETA[self.loss] if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo"


class KtoSettings(Settings):
    """What is made of an answer with a label. `apo_zero_unpaired` is measured from 0 instead of from the divergence."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"  # docs/teaching.md has the formulas
    beta: float = Field(0.1, gt=0)  # strength of the labels
    desirable_weight: float = Field(1.0, gt=0)  # weight of good answers' losses; raise it where they are fewer
    undesirable_weight: float = Field(1.0, gt=0)  # weight of bad answers' losses


class GrpoSettings(Settings):
    """How many answers to how many questions make an update, how they are sampled, and what they are worth."""

    prompts_per_step: int = Field(16, gt=0)  # questions of a step
    num_generations: int = Field(8, ge=2)  # answers to each question: the group
    max_new_tokens: int = Field(48, gt=0)  # the longest answer
    temperature: float = Field(1.0, gt=0)  # temperature of sampling
    reward: str = "exact"  # `number`, one that a script added to REWARDS, or `file.py:function`
    loss: Literal["dr_grpo", "grpo"] = "dr_grpo"  # docs/teaching.md says how they differ
    beta: float = Field(0.0, ge=0)  # weight of the divergence from the starting model, a copy of which is then kept

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * self.num_generations
