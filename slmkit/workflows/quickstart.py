"""The quickstart: three runs on the built-in stories, with a world and a model of a size that suits the time limit."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmkit.config import UserError
from slmkit.data.sources import WORLDS
from slmkit.device import find_device
from slmkit.files import free_path
from slmkit.model.files.directory import empty_decoder
from slmkit.training.estimate.memory import MemoryProfile
from slmkit.training.estimate.probe import probe
from slmkit.training.loop import RunStopped, StopRequested
from slmkit.training.recipe.recipe import Recipe, find_recipe, load_recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.context import Reporter
from slmkit.workflows.train import train_recipe

PRIMER_STEPS = 740  # time of the whole primer, with preparation and validation, in steps
PARTS = {
    "primer": "primer: short scenes with questions, to learn to look back in the text",
    "stories": "pretraining: stories, some of them followed by questions",
    "chat": "fine-tuning: conversations about scenes and stories",
}
RELATIVE_TIMES = {"primer": 1.0, "stories": 4.1, "chat": 2.4}  # the time of each part relative to the primer's
ALL_PARTS = sum(RELATIVE_TIMES.values())
FIXED = 8.0  # seconds for loading and saving, independent of the amount of data
EVALUATION = 0.08  # share of the remaining time for the evaluation
EVALUATIONS = 2.5  # about, in each run: one takes as long as six steps
SMALLEST_SHARE = 0.01
RESERVE = 0.07  # share of the time kept free: the machine may become slower
OVERRUN = 1.25  # a part is stopped after this many times its planned time
MARGIN = 1.25  # of advised minutes: the next measurement may be slower


@dataclass(frozen=True)
class World:
    """A size of the stories' world, and the model for it."""

    name: str
    source: str  # what the names of its sources begin with
    documents: float  # of its whole corpus, relative to the recipes'
    enough: float  # share of its corpus that a model needs to speak well
    model: tuple[str, ...] = ()  # settings of a new model and tokenizer

    @property
    def size(self) -> float:
        """The share of the whole world's words and plots."""
        return WORLDS[f"{self.source}stories"]


# From the largest to the smallest. Nearly every word of each is one token.
SIZES = (
    World("whole", "", documents=2.0, enough=0.7),
    World("medium", "medium-", documents=1.0, enough=0.5, model=("tokenizer.vocab_size=2048",)),
    World(
        "small", "small-", documents=0.5, enough=0.3,
        model=("tokenizer.vocab_size=1024", "model.hidden_size=96", "model.intermediate_size=288"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Quickstart:
    """The runs on stories and conversations, and their shares of the world's corpus."""

    world: World
    stories: RunDirectory
    chat: RunDirectory
    shares: dict[str, float]  # part → share of its documents
    ends: float  # deadline, a time of `time.monotonic`


def train_quickstart(
    output: str | Path, seed: int, minutes: float, reporter: Reporter, started: float | None = None
) -> Quickstart:
    """Train on primer, stories and conversations, in the folder `output`, numbered if taken.

    A few steps measure the machine's speed. It determines which world the stories are about and how much of the
    primer, stories and conversations is read in `minutes` from `started` (`time.monotonic`; default: now), with
    evaluation. Each part is planned with the speed of the one before, and a part that takes much longer than planned
    is stopped with a checkpoint. Raises `UserError` if the time is too short, and as `train_recipe` does.
    """
    ends = 60 * minutes + (time.monotonic() if started is None else started)
    target = ends - 60 * minutes * RESERVE
    root, runs, shares = free_path(output), dict[str, RunDirectory](), dict[str, float]()
    tried = try_worlds(target - time.monotonic() - FIXED)
    _tell_the_plan(minutes, target - time.monotonic(), tried, reporter)
    world, primer = [*tried.items()][-1]  # primer: seconds of all of it
    left = ALL_PARTS
    for number, (part, about) in enumerate(PARTS.items(), start=1):
        reporter.say(f"\n{number}/4  {about}")
        began, length = time.monotonic(), RELATIVE_TIMES[part]
        share = affordable_share(target - began, primer, left)
        if part == "primer":
            share = min(1.0, 2 * share)
        planned = share * length * primer
        if share < 1:
            reporter.say(f"{share:.0%} of it, in about {planned:.0f} seconds")
        values = [f"output_dir={root}/{part}", f"seed={seed}", *_settings(world, part)]
        if runs:
            values.append(f"model.path={[*runs.values()][-1].root}")
        until = min(began + OVERRUN * planned + FIXED, target)
        runs[part] = _train_part(part, values, share * world.documents, until, reporter)
        shares[part], left = share, left - length
        primer = (time.monotonic() - began) / (share * length)  # measured anew: the machine's load may change
    return Quickstart(world, runs["stories"], runs["chat"], shares, ends)


def try_worlds(seconds: float) -> dict[World, float]:
    """Worlds from the largest down to the first of whose corpus enough can be read in `seconds`, or to the smallest.

    The value is the time of the world's whole primer, in seconds.
    """
    tried = dict[World, float]()
    for world in SIZES:
        tried[world] = PRIMER_STEPS * world.documents * _seconds_of_a_step(world)
        if affordable_share(seconds, tried[world], ALL_PARTS) >= world.enough:
            break
    return tried


def _settings(world: World, part: str) -> list[str]:
    """Values of a part's recipe in a world."""
    source = "primer" if part == "primer" else "stories"
    return [f"data.source={world.source}{source}", *(world.model if part == "primer" else ())]


def _train_part(part: str, values: Sequence[str], share: float, until: float, reporter: Reporter) -> RunDirectory:
    """A run of a part's recipe on `share` times its documents, stopped at `until` (`time.monotonic`)."""
    every = max(1, round(share * RELATIVE_TIMES[part] * PRIMER_STEPS / EVALUATIONS))
    recipe = load_recipe(find_recipe(f"quickstart-{part}"), [*values, f"train.eval_steps={every}"])
    stop = StopRequested(until)
    try:
        return train_recipe(_shortened(recipe, share), reporter, stop=stop)
    except RunStopped:
        if stop.is_asked:  # by the user
            raise
        root = recipe.output_dir
        reporter.warn(f"the machine became slower: {root} is stopped early; to finish it: slm resume {root}")
        return RunDirectory(root)


def affordable_share(seconds: float, primer_seconds: float, parts: float) -> float:
    """Share of a work of `parts` times the primer that fits into `seconds`, with evaluation.

    Between `SMALLEST_SHARE` and 1.
    """
    share = seconds * (1 - EVALUATION) / (parts * primer_seconds)
    return min(1.0, max(SMALLEST_SHARE, share))


def _tell_the_plan(minutes: float, seconds: float, tried: dict[World, float], reporter: Reporter) -> None:
    """Print which world suits the time, and how much of its corpus fits into it. Raises `UserError` if too little."""
    world, primer = [*tried.items()][-1]
    share = affordable_share(seconds - FIXED, primer, ALL_PARTS)

    def needed(share: float, primer: float = primer) -> float:
        """Minutes in which this share can be read: the inverse of `affordable_share`, with what has passed already."""
        passed = 60 * minutes * (1 - RESERVE) - seconds
        return (share * ALL_PARTS * primer / (1 - EVALUATION) + FIXED + passed) / (1 - RESERVE) / 60

    if needed(SMALLEST_SHARE) > minutes:
        least = math.ceil(MARGIN * needed(SMALLEST_SHARE))
        raise UserError(f"--minutes {minutes:g}: too short on this machine; it needs at least {least}")
    larger = {one: math.ceil(needed(one.enough, its)) for one, its in tried.items() if one != world}
    if larger:
        times = " and ".join(f"the {one.name} one about {its}" for one, its in larger.items())
        reporter.say(
            f"this model learns a {world.name} world of stories, with {world.size:.0%} of the words and plots; on this "
            f"machine larger worlds need more minutes (--minutes): {times}"
        )
    reporter.say(
        f"in {minutes:g} minutes there is time for about {share:.0%} of its corpus; "
        f"all of it takes about {math.ceil(needed(1))} minutes"
    )
    if share < world.enough:
        reporter.warn(
            "too little time for sentences here; this only shows the steps. For a model that speaks: "
            f"slm quickstart --minutes {math.ceil(MARGIN * needed(world.enough))}"
        )


def _seconds_of_a_step(world: World) -> float:
    """Measured seconds of a training step of a world's primer."""
    recipe = load_recipe(find_recipe("quickstart-primer"), _settings(world, "primer"))
    profile = MemoryProfile(empty_decoder(recipe.model.build_config()))
    return probe(profile, recipe.train, find_device(), steps=6).step_seconds


def _shortened(recipe: Recipe, share: float) -> Recipe:
    """The recipe with `share` times its documents."""
    counts = {name: round(share * getattr(recipe.data, name)) for name in ("documents", "primer_documents")}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=counts)})
