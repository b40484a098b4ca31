"""Parts of each objective (batches, loss, validation hooks), and its memory profile."""

from __future__ import annotations

from collections.abc import Callable

from slmkit.data.make_batches import make_batches
from slmkit.data.stream import ChatRows, DocumentRows
from slmkit.device import Device
from slmkit.evaluation.loss import Rows
from slmkit.model.decoder import Decoder
from slmkit.training.estimate.memory import MemoryProfile
from slmkit.training.objective import Objective, next_token
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import ObjectiveParts, RecipeContext
from slmkit.workflows.distill import distill_batches, distill_inventory
from slmkit.workflows.grpo import grpo_inventory, grpo_work
from slmkit.workflows.hooks import Validate
from slmkit.workflows.preference import kto_work, preference_inventory, preference_work


def work_of(material: RecipeContext) -> ObjectiveParts:
    """The parts of the recipe's objective. Raises `UserError` if its settings, model or data do not fit together."""
    return WORK[material.recipe.objective](material)


def inventory_of(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> MemoryProfile:
    """The memory profile of a run of `model`, on the meta device; `tokens`: size of the tokenizer."""
    return INVENTORIES[recipe.objective](recipe, model, tokens, device)


def text_work(m: RecipeContext) -> ObjectiveParts:
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
    )


def next_token_inventory(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> MemoryProfile:
    return MemoryProfile(model)


WORK: dict[str, Callable[[RecipeContext], ObjectiveParts]] = {
    "pretrain": text_work,
    "sft": text_work,
    "distill": text_work,
    "dpo": preference_work,
    "kto": kto_work,
    "grpo": grpo_work,
}
INVENTORIES: dict[str, Callable[[Recipe, Decoder, int, Device], MemoryProfile]] = {
    "pretrain": next_token_inventory,
    "sft": next_token_inventory,
    "distill": distill_inventory,
    "dpo": preference_inventory,
    "kto": preference_inventory,
    "grpo": grpo_inventory,
}
