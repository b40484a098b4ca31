"""What a run leaves to read: `metrics.jsonl`, `loss.png`, `samples.md`, `environment.json`."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.training.files import sync, write_whole
from slmkit.training.loop import Report

# What the clock and the machine say: everything else in a line is the same, bit for bit, however often a run is killed.
MEASURED = ("tokens_per_second",)


class MetricsLog:
    """`metrics.jsonl`: one line a logged step, appended; a resumed run first drops what it is about to repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, report: Report) -> None:
        """Add a line. Raises `UserError` when the disk is full."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error}); free some space, then `slm resume {self.path.parent}`"
            ) from None

    def read(self) -> list[Report]:
        """All whole lines, up to where a crash left something else."""
        if not self.path.exists():
            return []
        reports = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                reports.append(json.loads(line))
            except ValueError:
                break
        return reports

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`."""
        kept = [report for report in self.read() if report["step"] <= step]
        write_whole(self.path, "".join(json.dumps(report) + "\n" for report in kept))

    def sync(self) -> None:
        """See the lines onto the disk."""
        if self.path.exists():
            sync(self.path)

    def comparable(self) -> list[Report]:
        """The lines without what is `MEASURED`: those of a run that was killed equal those of one that was not."""
        return [{key: value for key, value in report.items() if key not in MEASURED} for report in self.read()]


def plot_losses(reports: list[Report], path: Path, title: str, perfect_loss: float | None = None) -> None:
    """Draw training and validation loss over tokens, and the loss of a perfect model where the corpus knows it."""
    try:
        from matplotlib.figure import Figure  # no global state and no window system, unlike pyplot
    except ImportError:
        return  # an optional extra: the figures are in metrics.jsonl all the same
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    trained = [(r["tokens"], r["loss"]) for r in reports]
    validated = [(r["tokens"], r["validation_loss"]) for r in reports if "validation_loss" in r]
    if trained:
        axes.plot(*zip(*trained), color="tab:blue", alpha=0.45, linewidth=1, label="training")
    if validated:
        axes.plot(*zip(*validated), color="tab:orange", marker="o", markersize=4, label="validation")
        tokens, loss = validated[-1]
        axes.annotate(f"{loss:.3f}", (tokens, loss), xytext=(0, 9), textcoords="offset points", ha="right")
    if perfect_loss is not None:
        axes.axhline(perfect_loss, color="tab:green", linestyle="--", label=f"a perfect model: {perfect_loss:.3f}")
    axes.set(xlabel="trained tokens", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if trained or validated:
        axes.legend(frameon=False)
    fresh = path.with_suffix(".tmp.png")
    figure.savefig(fresh, dpi=120)
    os.replace(fresh, path)


def append_samples(path: Path, step: int, samples: list[tuple[str, str]]) -> None:
    """Add what the model wrote for each fixed prompt at this step."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"## Step {step:,}\n\n")
        for prompt, text in samples:
            quoted = (prompt + text).strip().replace("\n", "\n> ")
            file.write(f"> {quoted}\n\n")


def environment() -> dict[str, Any]:
    """Versions, machine and revision: what somebody who repeats the run has to know."""
    packages = ("slmkit", "torch", "numpy", "tokenizers", "safetensors")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    """The commit of the folder one works in, `-dirty` where it has changes; None outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
