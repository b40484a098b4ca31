"""What an objective makes of a run: what the one loop is fed, what it minimises, and what it is measured by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slmkit.api.hooks import Sample, Validate
from slmkit.api.reporter import Reporter
from slmkit.data.corpus import Corpus
from slmkit.data.feed import make_batches
from slmkit.data.stream import Batches, ChatRows, DocumentRows
from slmkit.device import Device
from slmkit.evaluation.loss import Rows
from slmkit.model import Decoder, SLMConfig
from slmkit.training.distributed import Group
from slmkit.training.loop import Hook
from slmkit.training.objectives import Objective, next_token
from slmkit.training.recipe import Recipe
from slmkit.training.run import RunDirectory


@dataclass(frozen=True)
class Material:
    """A run with all that its recipe names built."""

    run: RunDirectory
    recipe: Recipe
    corpus: Corpus
    model: Decoder
    config: SLMConfig
    device: Device
    group: Group
    length: int  # tokens of a row
    reporter: Reporter

    @property
    def rows_per_step(self) -> int:
        return self.recipe.train.rows_per_step(self.length)


@dataclass(frozen=True)
class Work:
    """The hooks are for all ranks, and due at every evaluation."""

    batches: Batches
    objective: Objective
    validate: Hook
    sample: Hook
    validation_tokens: int


def work_of(material: Material) -> Work:
    """Raises `UserError` for what does not fit together."""
    return WORK[material.recipe.objective](material)


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
    )


WORK: dict[str, Callable[[Material], Work]] = {"pretrain": next_token_work, "sft": next_token_work}
