"""Reference loss curves of shipped recipes, from several seeds, and a run's position relative to them.

`benchmarks/reference_curves.py` measures them. A curve holds the mean training loss of each window of trained tokens,
and its band: three standard deviations of one run among the seeds, pooled over neighbouring windows, on either side of
their mean.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmkit.model.config import SLMConfig
    from slmkit.training.loop import Report, State
    from slmkit.training.recipe.recipe import Recipe

CURVES = Path(__file__).with_name("reference_curves.json")
# Settings that do not change what is learned.
WITHOUT_EFFECT = {
    "logging_steps", "eval_steps", "save_steps", "save_total_limit", "sample_prompts", "sample_tokens", "report_to",
    "device", "micro_batch_tokens", "gradient_checkpointing",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """The mean loss, in nats, over the trained tokens from the previous point to `tokens`."""

    tokens: int
    mean: float
    low: float
    high: float


def signature(recipe: Recipe, config: SLMConfig) -> str:
    """Hash of all settings but seed, names and intervals: equal for two runs whose losses should agree."""
    matters = {
        "objective": recipe.objective,
        "data": recipe.data.model_dump(mode="json", exclude_defaults=True, exclude={"validation_documents"}),
        "train": recipe.train.model_dump(mode="json", exclude_defaults=True, exclude=WITHOUT_EFFECT),
        "model": config.model_dump(mode="json", exclude_defaults=True),
        "initialization": recipe.model.initialization if recipe.model.path is None else "trained",
    }
    if recipe.lora is not None:
        matters["lora"] = recipe.lora.model_dump(mode="json")
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()[:16]


def find_curve(recipe: Recipe, config: SLMConfig, path: Path = CURVES) -> list[Point] | None:
    """The reference curve of exactly this recipe and shape; None if there is none."""
    if not path.is_file():
        return None
    wanted = signature(recipe, config)
    curves: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["curves"]
    return next(
        ([Point(*point) for point in curve["points"]] for curve in curves if curve["signature"] == wanted), None
    )


class ReferenceBand:
    """Hook for every step: adds `reference` to the report: `inside`, `above` or `below` the band."""

    def __init__(self, curve: Sequence[Point]) -> None:
        self.curve = curve
        self.number = 0  # index of the window
        self.losses: list[float] = []
        self.is_whole = False  # False if a run was resumed within the window
        self.word: str | None = None

    def update(self, state: State, report: Report) -> None:
        if not self.losses and not self.is_whole:
            self.is_whole = report["step"] == 1
        while self.number < len(self.curve) and report["tokens"] > self.curve[self.number].tokens:
            if self.is_whole and self.losses:
                point, loss = self.curve[self.number], statistics.fmean(self.losses)
                self.word = "above" if loss > point.high else "below" if loss < point.low else "inside"
            self.losses, self.number, self.is_whole = [], self.number + 1, bool(self.losses)
        self.losses.append(report["loss"])
        if self.word is not None:
            report["reference"] = self.word
