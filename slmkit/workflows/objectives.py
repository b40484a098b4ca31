"""Parts of each objective (batches, loss, validation hooks), and its memory profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from slmkit.data.make_batches import make_batches
from slmkit.data.stream import ChatRows, DocumentRows
from slmkit.device import Device
from slmkit.evaluation.loss import Rows
from slmkit.model.decoder import Decoder
from slmkit.training.estimate.memory import MemoryProfile
from slmkit.training.objective import Objective, next_token
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import ObjectiveParts, RecipeContext
from slmkit.workflows.distill import distill_batches, distill_memory
from slmkit.workflows.grpo import grpo_memory, grpo_parts
from slmkit.workflows.hooks import Validate
from slmkit.workflows.preference import preference_memory, preference_parts


def text_parts(m: RecipeContext) -> ObjectiveParts:
    """Text or conversations, with a teacher or without; validation is the labels' cross-entropy."""
    recipe = m.recipe
    objective: Objective = next_token
    if recipe.objective == "distill":
        batches, objective = distill_batches(m)
    else:
        batches = make_batches(recipe.reads, recipe.data, m.corpus, m.length, m.rows_per_step, recipe.seed)
    rows: Rows = (ChatRows if recipe.reads == "conversations" else DocumentRows)(m.corpus.validation, m.length)
    return ObjectiveParts(
        batches=batches,
        objective=objective,
        validate=Validate(rows, m.device, batches.separate, m.group, m.text_bytes),
        validation_tokens=rows.rows_in_epoch * m.length,
        measures={"validation_loss": False} | ({"validation_bits_per_byte": False} if m.text_bytes else {}),
    )


def text_memory(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> MemoryProfile:
    return MemoryProfile(model)


class Builders(NamedTuple):
    """What an objective consists of.

    `parts`: its batches, loss and validation in a run. Raises `UserError` if settings, model or data do not fit
    together. `memory`: the memory profile of a run of a model on the meta device, from the size of the tokenizer.
    """

    parts: Callable[[RecipeContext], ObjectiveParts]
    memory: Callable[[Recipe, Decoder, int, Device], MemoryProfile]


OBJECTIVES = {
    "pretrain": Builders(text_parts, text_memory),
    "sft": Builders(text_parts, text_memory),
    "distill": Builders(text_parts, distill_memory),
    "dpo": Builders(preference_parts, preference_memory),
    "kto": Builders(preference_parts, preference_memory),
    "grpo": Builders(grpo_parts, grpo_memory),
}
