"""The layout of a run directory, and how one is made and described."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmkit.config import UserError, to_yaml
from slmkit.device import Device
from slmkit.files import free_path, write_whole
from slmkit.training.checkpoints import checkpoint as checkpoints
from slmkit.training.logging.metrics_log import MetricsLog, environment, read_json, rewind_samples
from slmkit.training.recipe.changes import PROCESSES, Change
from slmkit.training.recipe.recipe import Recipe


class RunDirectory:
    """Paths inside `runs/NAME/`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe = self.root / "recipe.yaml"
        self.environment = self.root / "environment.json"
        self.metrics = MetricsLog(self.root / "metrics.jsonl")
        self.plot = self.root / "loss.png"
        self.shares = self.root / "shares.png"  # shares of right answers or correctly ranked pairs, if any
        self.tasks = self.root / "tasks.png"  # figures of evaluations on tasks, if any
        self.samples = self.root / "samples.md"
        self.records = self.root / "records"
        self.data = self.root / "data"
        self.checkpoints = self.root / "checkpoints"
        self.latest = self.root / "latest"
        self.best = self.root / "best"

    def claim(self, recipe: Recipe) -> None:
        """Write the recipe, so that a run killed during data preparation can be resumed."""
        write_whole(self.recipe, to_yaml(recipe.model_copy(update={"output_dir": str(self.root)})))

    def describe(self, recipe: Recipe, device: Device, data: dict[str, Any]) -> None:
        """Write recipe and environment.json, from which the run can be repeated; it then counts as prepared."""
        content = environment() | device.describe() | {"data": data, "job": job_id(), PROCESSES: device.ranks.world}
        self._write(recipe, content | {"changes": []})

    def described(self) -> dict[str, Any]:
        """Content of environment.json; empty if there is none."""
        return read_json(self.environment)

    def add(self, **facts: Any) -> None:
        """Add facts to the environment.json of a prepared run; does nothing for another."""
        if content := self.described():
            write_whole(self.environment, json.dumps(content | facts, indent=2) + "\n")

    def newest_step(self) -> int:
        """Step of the newest complete checkpoint; 0 if there is none."""
        return max(map(checkpoints.step_of, checkpoints.complete_checkpoints(self.checkpoints)), default=0)

    def change(self, recipe: Recipe, changes: Sequence[Change], step: int) -> None:
        """Replace the recipe for the steps after `step`, and record the changes."""
        content = self.described()
        entries = [{"step": step} | dataclasses.asdict(change) for change in changes]
        self._write(recipe, content | {"changes": content.get("changes", []) + entries})

    def _write(self, recipe: Recipe, content: dict[str, Any]) -> None:
        """Write the recipe first: after a crash in between it counts as edited."""
        write_whole(self.recipe, to_yaml(recipe))
        content = content | {"recipe": recipe.model_dump(mode="json")}
        write_whole(self.environment, json.dumps(content, indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`; those steps will be repeated."""
        self.metrics.rewind(step)
        rewind_samples(self.samples, step)


def new_run_directory(wanted: str | Path) -> RunDirectory:
    """A new directory of the wanted name, numbered if taken. Raises `UserError` if it cannot be made."""
    while True:
        path = free_path(wanted)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:  # made by another process in the meantime
            if path.is_dir():
                continue
            raise UserError(f"{path.parent}: not a folder, so that no run can be made in it") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be made: {error}") from None
        (path / "checkpoints").mkdir()
        return RunDirectory(path)


def run_of_job(wanted: str | Path) -> RunDirectory | None:
    """The run of this name made by the same `torchrun` job before a restart; None if there is none."""
    path, number = Path(wanted), 1
    while job_id() is not None and path.exists():
        run = RunDirectory(path)
        if run.described().get("job") == job_id():
            return run
        number += 1
        path = Path(f"{wanted}-{number}")
    return None


def run_to_resume(output_dir: str, wanted: bool | str | Path | None) -> Path | None:
    """The run that `train` resumes; None for a new one. Raises `UserError` if it does not exist."""
    if wanted is None or wanted is False:
        return None
    named = Path(output_dir if wanted is True else wanted)
    runs = [path for path in (named, *named.parent.glob(f"{named.name}-*")) if (path / "recipe.yaml").is_file()]
    if wanted is not True:
        runs = [path for path in (named, *named.resolve().parents[:2]) if (path / "recipe.yaml").is_file()][:1]
    if not runs:
        raise UserError(f"{named}: no run to resume; expected the directory that an earlier train() made")
    return max(runs, key=lambda path: (path / "recipe.yaml").stat().st_mtime)


def job_id() -> str | None:
    """The job's id as given by `torchrun --rdzv-id`; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name
