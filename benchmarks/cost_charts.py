"""Charts of `benchmarks/cost.py`: what was measured, and what the package calculates of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from slmkit.training.estimate.forecast import HELD  # of a byte in use, since glibc keeps freed blocks

Points = dict[str, dict[str, Any]]
BLUE, ORANGE, GREEN, GREY = "#4c86c6", "#e0913a", "#58a36b", "#9a9a9a"  # light, and apart in grey print as well
AXES = {  # of each sweep: what varies, and its label
    "batch": ("rows", "rows of 256 tokens in a step"),
    "width": ("hidden_size", "width"),
    "depth": ("num_hidden_layers", "layers"),
    "vocabulary": ("vocab_size", "tokens in the vocabulary"),
}


def draw(points: Points, folder: Path) -> None:
    """`cost-NAME.png` in `folder` for every sweep that has points."""
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for key, point in points.items():
        sweeps.setdefault(key.partition(":")[0], []).append(point)
    if "length" in sweeps:
        _picture(folder / "cost-length.png", sweeps["length"], _by_length)
    for name, axis in AXES.items():
        if name in sweeps:
            found = sorted(sweeps[name], key=lambda point, axis=axis: point[axis[0]])
            _picture(folder / f"cost-{name}.png", found, functools.partial(_lines, axis=axis))
    if "processes" in sweeps:
        _picture(folder / "cost-processes.png", sweeps["processes"], _by_processes)


def _picture(
    path: Path, points: list[dict[str, Any]], fill: Callable[[Axes, Axes, list[dict[str, Any]]], None]
) -> None:
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=110, layout="constrained")
    fill(speed, memory, points)
    for axes, title in ((speed, "thousand tokens per second"), (memory, "memory of a step, MiB")):
        axes.set_title(title, fontsize=10)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, which="both")
        if axes.get_yscale() == "log":
            for of in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                of(lambda value, place: f"{value:,.4g}" if f"{value:e}"[0] in "125" else "")
        else:
            axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def rate(point: dict[str, Any]) -> float:
    """Thousand tokens per second."""
    return point["tokens"] / point["seconds"] / 1e3


def reached(point: dict[str, Any]) -> float:
    """FLOP/s of the products that the formula counts."""
    return point["flops_per_token"] * point["tokens"] / point["seconds"]


def foretold(points: list[dict[str, Any]]) -> list[float]:
    """Thousand tokens per second by the formula: as many FLOP/s at each point as at the best one."""
    best = max(map(reached, points))
    return [best / point["flops_per_token"] / 1e3 for point in points]


def _lines(speed: Axes, memory: Axes, points: list[dict[str, Any]], axis: tuple[str, str]) -> None:
    varied, label = axis
    sizes = [point[varied] for point in points]
    speed.plot(sizes, [rate(point) for point in points], "o-", color=BLUE, label="measured, one thread")
    speed.plot(sizes, foretold(points), "--", color=GREY, label="by FLOPs, at the best point's rate")
    memory.plot(sizes, [point["memory_bytes"] / 2**20 for point in points], "o-", color=BLUE, label="measured")
    memory.plot(
        sizes,
        [point["predicted_memory_bytes"] * HELD / 2**20 for point in points],
        "--",
        color=GREY,
        label="calculated",
    )
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        axes.set_xlabel(label, fontsize=9)


def _by_length(speed: Axes, memory: Axes, points: list[dict[str, Any]]) -> None:
    for window, color, label in ((0, BLUE, "full attention"), (512, ORANGE, "windows of 512")):
        of = sorted((point for point in points if point["window"] == window), key=lambda point: point["length"])
        lengths = [point["length"] for point in of]
        speed.plot(lengths, [rate(point) for point in of], "o-", color=color, label=label)
        speed.plot(lengths, foretold(of), "--", color=color, alpha=0.6, label=f"{label}, by FLOPs")
        memory.plot(lengths, [point["memory_bytes"] / 2**20 for point in of], "o-", color=color, label=label)
        said = [point["predicted_memory_bytes"] * HELD / 2**20 for point in of]
        memory.plot(lengths, said, "--", color=color, alpha=0.6, label=f"{label}, calculated")
    lengths = sorted({point["length"] for point in points})
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        axes.set_xlabel("tokens of the row", fontsize=9)


def _by_processes(speed: Axes, memory: Axes, points: list[dict[str, Any]]) -> None:
    of = sorted(points, key=lambda point: (point["world"], point["parallel"]))
    names = [f"{point['world']} {point['parallel'].upper()}" if point["world"] > 1 else "1" for point in of]
    colors = [{"ddp": GREEN, "fsdp": ORANGE}[point["parallel"]] if point["world"] > 1 else BLUE for point in of]
    speed.bar(names, [rate(point) for point in of], color=colors, width=0.6, label="all processes together")
    memory.bar(names, [point["memory_bytes"] / 2**20 for point in of], color=colors, width=0.6, label="of each process")
    said = [point["predicted_memory_bytes"] * HELD / 2**20 for point in of]
    memory.plot(names, said, "_", color="#404040", markersize=24, label="calculated")
