"""What a run leaves to read: `metrics.jsonl`, `loss.png`, `samples.md`, `environment.json`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from slmkit.training.loop import Report


class MetricsLog:
    """`metrics.jsonl`: one line a logged step, appended; a resumed run first drops what it is about to repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, report: Report) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")

    def read(self) -> list[Report]:
        """All whole lines; one that a crash cut short is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is empty or cut short

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`."""
        kept = [report for report in self.read() if report["step"] <= step]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(report) + "\n" for report in kept), encoding="utf-8")
        os.replace(fresh, self.path)


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
