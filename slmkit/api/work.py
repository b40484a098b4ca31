"""What an objective makes of a run: what the one loop is fed, what it minimises, and what it is measured by."""

from __future__ import annotations

from collections.abc import Callable

from slmkit.api.distill import distill_work
from slmkit.api.grpo import grpo_work
from slmkit.api.hooks import Sample, Validate
from slmkit.api.material import Material, Work
from slmkit.api.preference import preference_work
from slmkit.config import UserError
from slmkit.data.feed import make_batches
from slmkit.data.stream import ChatRows, DocumentRows
from slmkit.evaluation.loss import Rows
from slmkit.training.objectives import next_token
from slmkit.training.recipe import Recipe


def work_of(material: Material) -> Work:
    """Raises `UserError` for what does not fit together."""
    return WORK[material.recipe.objective](material)


def expect_a_model(recipe: Recipe) -> None:
    """Raises `UserError` where a model is refined, and the recipe names none.

    No check of `Recipe` itself: a recipe such as own-preferences is a form, and valid before its model is filled in.
    """
    if recipe.model.path is not None:
        return
    if recipe.objective in ("dpo", "grpo"):
        raise UserError(
            f"objective {recipe.objective} goes on from a model that talks: name a run or model directory as model.path"
        )
    if recipe.lora is not None:
        raise UserError("lora: an adapter is for a finished model: name that in model.path, or drop lora")


def next_token_work(m: Material) -> Work:
    """Pretraining on text, fine-tuning on conversations."""
    recipe, talks = m.recipe, m.recipe.reads == "conversations"
    batches = make_batches(recipe.reads, recipe.data, m.corpus, m.length, m.rows_per_step, recipe.seed)
    rows: Rows = (ChatRows if talks else DocumentRows)(m.corpus.validation, m.length)
    return Work(
        batches=batches,
        objective=next_token,
        validate=Validate(rows, m.device, batches.separate, m.group),
        sample=Sample(m.run.samples, recipe, m.corpus.tokenizer, talks, m.group),
        validation_tokens=rows.rows_in_epoch * m.length,
        report=batches.report,
    )


WORK: dict[str, Callable[[Material], Work]] = {
    "pretrain": next_token_work,
    "sft": next_token_work,
    "distill": distill_work,
    "dpo": preference_work,
    "grpo": grpo_work,
}
