"""The sections of a recipe that belong to one objective. No torch here: recipes are checked without it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from slmkit.config import Settings

BETA = {"dpo": 0.1, "dpo_norm": 5.0, "simpo": 2.0}  # published values: a mean over tokens is far smaller than their sum
Divergence = Literal["forward_kl", "reverse_kl", "js"]


class DistillationSettings(Settings):
    """The teacher, and its weight in the loss; `slmkit.training.objectives.distillation` has the formulas.

    The loss is `alpha` times the cross-entropy of the labels plus `1 - alpha` times temperature² times the divergence
    from the teacher: with 1 the teacher is not used, with 0 the labels are not.
    """

    teacher: str | None = None  # a model or run directory, of the same tokenizer
    cache: str | None = None  # folder that `slm distill-cache` wrote; then the teacher is not in memory
    reads: Literal["text", "conversations"] = "text"  # what is learned: all of a text, or the assistant's turns
    alpha: float = Field(0.5, ge=0, le=1)  # the weight of the labels' cross-entropy
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
    """The loss of a pair. `dpo_norm` is DPO with means over an answer's tokens; `simpo` has no reference."""

    loss: Literal["dpo", "dpo_norm", "simpo"] = "dpo"  # docs/teaching.md has the formulas
    beta: float | None = Field(None, gt=0)  # strength of the preference; None: 0.1 for dpo, 5 for dpo_norm, 2 for simpo
    simpo_gamma: float = Field(0.5, ge=0)  # simpo only: by how much the better answer's reward should be higher
    rpo_alpha: float = Field(0.0, ge=0)  # weight of the better answer's own loss, the mean over its tokens
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)  # the share of pairs assumed to be in the wrong order

    @property
    def strength(self) -> float:
        return BETA[self.loss] if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo"


class KtoSettings(Settings):
    """The loss of a labelled answer. `apo_zero_unpaired` compares rewards with 0 instead of the divergence."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"  # docs/teaching.md has the formulas
    beta: float = Field(0.1, gt=0)  # how strongly the model is kept near its reference
    desirable_weight: float = Field(1.0, gt=0)  # weight of good answers' losses; raise it where they are fewer
    undesirable_weight: float = Field(1.0, gt=0)  # weight of bad answers' losses


class GrpoSettings(Settings):
    """The questions and answers of an update, how answers are sampled, and their reward."""

    prompts_per_step: int = Field(16, gt=0)  # questions of a step
    num_generations: int = Field(8, ge=2)  # answers to each question (a group)
    max_new_tokens: int = Field(48, gt=0)  # tokens of the longest answer
    temperature: float = Field(1.0, gt=0)  # temperature of sampling
    reward: str = "exact"  # `number`, one that a script added to REWARDS, or `file.py:function`
    loss: Literal["dr_grpo", "grpo"] = "dr_grpo"  # docs/teaching.md says how they differ
    # weight of the divergence from the starting model; above 0 a copy of it is kept in memory
    beta: float = Field(0.0, ge=0)

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * self.num_generations
