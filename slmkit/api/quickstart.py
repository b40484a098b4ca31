"""The quickstart: three runs on the built-in stories, as long as the time that is given allows on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from slmkit.api.reporter import Reporter
from slmkit.api.runs import train_recipe
from slmkit.training.find import free_path
from slmkit.training.recipe import Recipe, find_recipe, load_recipe
from slmkit.training.run import RunDirectory

# What each part takes beside the primer, whatever the machine: preparing, training and validation together.
STORIES, CHAT, EVALUATION = 3.3, 2.9, 0.2
SMALLEST_SHARE = 0.2  # less than this of a part teaches nothing worth looking at


@dataclass(frozen=True)
class Quickstart:
    """The runs on stories and on conversations."""

    stories: RunDirectory
    chat: RunDirectory


def train_quickstart(output: str | Path, seed: int, minutes: float, reporter: Reporter) -> Quickstart:
    """Primer, stories and conversations, one model after another, below a folder that is named `output` or numbered.

    The primer is read as its recipe says; how long it takes tells how much of the stories there is time for, and how
    long those take, how many conversations, before `minutes` are over. Raises `UserError` as `train_recipe` does.
    """
    started = time.monotonic()
    root = free_path(output)

    def seconds() -> float:
        return time.monotonic() - started

    def run(part: str, share: float = 1.0, base: RunDirectory | None = None) -> RunDirectory:
        if share < 1:
            reporter.say(f"there is time for {share:.0%} of them before {minutes:g} minutes are over on this machine")
        values = [f"output_dir={root}/{part}", f"seed={seed}"] + ([f"model.path={base.root}"] if base else [])
        return train_recipe(_shortened(load_recipe(find_recipe(f"quickstart-{part}"), values), share), reporter)

    reporter.say("\n1/4  the primer: learning to look back at what was said")
    reader = run("primer")
    reporter.say("\n2/4  pretraining: learning to tell stories")
    primer = seconds()
    share = affordable_share(60 * minutes - primer, primer, STORIES + CHAT)
    stories = run("stories", share, reader)
    reporter.say("\n3/4  fine-tuning: learning to talk about them")
    primer = (seconds() - primer) / (share * STORIES)  # what it would take now: a machine may be busier than before
    return Quickstart(stories, run("chat", affordable_share(60 * minutes - seconds(), primer, CHAT), stories))


def affordable_share(seconds: float, primer_seconds: float, parts: float) -> float:
    """How much of what takes `parts` times the primer can be done in `seconds`, evaluation included.

    Between `SMALLEST_SHARE` and 1.
    """
    share = (seconds - EVALUATION * primer_seconds) / (parts * primer_seconds)
    return min(1.0, max(SMALLEST_SHARE, share))


def _shortened(recipe: Recipe, share: float) -> Recipe:
    """The recipe with this share of its training documents."""
    counts = {name: round(share * getattr(recipe.data, name)) for name in ("documents", "primer_documents")}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=counts)})
