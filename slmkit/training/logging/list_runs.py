"""List of runs and their state, read from their files without loading a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slmkit.config import UserError, read_yaml
from slmkit.training.logging.metrics_log import MetricsLog, is_running, read_json


@dataclass(frozen=True)
class RunOverview:
    """One row of `slm runs`."""

    root: Path
    objective: str
    parameters: int | None  # None before the first checkpoint
    step: int
    steps: int | None  # of the whole run; None without a plan
    tokens: int
    validation_loss: float | None  # the best
    changed: float  # seconds since the epoch
    state: str  # running, finished or stopped


def list_runs(folder: str | Path) -> list[RunOverview]:
    """All runs below `folder`, or `folder` itself, the latest last. Raises `UserError` if it does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; runs are made by `slm train`")
    return sorted(map(read_run, find_runs(folder)), key=lambda run: (run.changed, run.root))


def find_runs(folder: Path) -> Iterator[Path]:
    """The directories of all runs below `folder`, or `folder` itself; links are not followed.

    Runs may be made and deleted meanwhile.
    """
    for root, folders, files in os.walk(folder):
        if "recipe.yaml" in files and "checkpoints" in folders:
            folders.remove("checkpoints")  # that of a long run holds many folders, and no run
            yield Path(root)


def read_run(root: Path) -> RunOverview:
    """State of a run, from its recipe, metrics and plan."""
    recipe = read_yaml(root / "recipe.yaml")
    metrics = root / "metrics.jsonl"
    reports = MetricsLog(metrics).read()
    last = reports[-1] if reports else {"step": 0, "tokens": 0}
    newest = (root / "latest").resolve().name  # may be of a step that was not logged
    step = max(last["step"], int(newest.removeprefix("step-")) if newest.startswith("step-") else 0)
    plan = read_json(root / "plan.json")
    finished = read_json(root / "environment.json").get("finished") or {}
    steps = plan.get("steps") or recipe.get("train", {}).get("max_steps") or finished.get("steps")
    is_whole = step == finished.get("step") or (steps and step >= steps)
    losses = [report["validation_loss"] for report in reports if report.get("validation_loss") is not None]
    return RunOverview(
        root=root,
        objective=recipe.get("objective", "pretrain"),
        parameters=plan.get("parameters") or _parameters(root / "latest" / "model.safetensors"),
        step=step,
        steps=steps,
        tokens=last["tokens"],
        validation_loss=min(losses, default=None),
        changed=(metrics if reports else root / "recipe.yaml").stat().st_mtime,
        state="running" if is_running(root) else "finished" if is_whole else "stopped",
    )


def _parameters(weights: Path) -> int | None:
    """Number of weights in a safetensors file, from its header."""
    from safetensors import safe_open

    if not weights.is_file():
        return None
    with safe_open(weights, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
