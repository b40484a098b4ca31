"""The quickstart: three runs on the built-in stories, as long as the time that is given allows on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from slmkit.api.runs import Reporter, train_recipe
from slmkit.training.find import free_path
from slmkit.training.recipe import Recipe, find_recipe, load_recipe
from slmkit.training.run import RunDirectory

# What the parts take beside the primer, whatever the machine: tokenizing, training and validation together.
TRAINING_PER_PRIMER, EVALUATION_PER_PRIMER = 5.9, 0.45
SMALLEST_SHARE = 0.2  # less than this of the stories teaches nothing worth looking at


@dataclass(frozen=True)
class Quickstart:
    """The runs on stories and on conversations, and which share of the recipes' documents there was time for."""

    stories: RunDirectory
    chat: RunDirectory
    share: float


def train_quickstart(output: str | Path, seed: int, minutes: float, reporter: Reporter) -> Quickstart:
    """Primer, stories and conversations, one model after another, below a folder that is named `output` or numbered.

    The primer is read as its recipe says; how long it takes tells how much of the other two there is time for before
    `minutes` are over, an evaluation included. Raises `UserError` as `train_recipe` does.
    """
    started = time.monotonic()
    root = free_path(output)

    def run(part: str, share: float = 1.0, base: RunDirectory | None = None) -> RunDirectory:
        values = [f"output_dir={root}/{part}", f"seed={seed}"] + ([f"model.path={base.root}"] if base else [])
        return train_recipe(_shortened(load_recipe(find_recipe(f"quickstart-{part}"), values), share), reporter)

    reporter.say("\n1/4  the primer: learning to look back at what was said")
    reader = run("primer")
    share = affordable_share(time.monotonic() - started, 60 * minutes)
    if share < 1:
        reporter.say(f"{minutes:g} minutes are enough for {share:.0%} of the stories on this machine, as busy as it is")
    reporter.say("\n2/4  pretraining: learning to tell stories")
    stories = run("stories", share, reader)
    reporter.say("\n3/4  fine-tuning: learning to talk about them")
    return Quickstart(stories, run("chat", share, stories), share)


def affordable_share(primer_seconds: float, seconds: float) -> float:
    """How much of the two later parts fits in what the primer has left of `seconds`: from `SMALLEST_SHARE` to 1."""
    left = seconds - primer_seconds * (1 + EVALUATION_PER_PRIMER)
    return min(1.0, max(SMALLEST_SHARE, left / (TRAINING_PER_PRIMER * primer_seconds)))


def _shortened(recipe: Recipe, share: float) -> Recipe:
    """The recipe with this share of its training documents."""
    counts = {name: round(share * getattr(recipe.data, name)) for name in ("documents", "primer_documents")}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=counts)})
