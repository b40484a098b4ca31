"""Reference loss curves of the quickstart's three recipes, from several seeds.

    python benchmarks/reference_curves.py --seeds 0 1 2

Each seed lives the quickstart's life once (some five minutes on two idle cores). What the seeds gave is kept in
`benchmarks/results/reference_curves.json`, so that seeds can be added one by one; with two or more of a recipe, the
band is written into the package, where a run of the same recipe and shape is compared with it as it goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from slmkit.cli.show import TerminalReporter
from slmkit.device import find_device
from slmkit.model.config import SLMConfig
from slmkit.training.logging.metrics_log import MetricsLog, environment
from slmkit.training.logging.reference_curves import CURVES, Point, signature
from slmkit.training.loop import Report
from slmkit.training.recipe.recipe import find_recipe, load_recipe
from slmkit.workflows.train import train_recipe

RESULTS = Path(__file__).parent / "results" / "reference_curves.json"
PARTS = ("primer", "stories", "chat")
POINTS = 40  # windows of a run
DEVIATIONS, NEIGHBOURS, NARROWEST = 3.0, 3, 0.02  # the last in nats: with few seeds some windows agree by chance


def live(seed: int, folder: Path, parts: int, few: list[str]) -> dict[str, dict[str, Any]]:
    """The first `parts` of the quickstart's runs, and what each logged. `few` are overrides, for a trial."""
    found, base = {}, None
    for part in PARTS[:parts]:
        name = f"quickstart-{part}"
        values = [f"output_dir={folder}/{part}", f"seed={seed}", "train.logging_steps=1", "train.sample_tokens=1"]
        recipe = load_recipe(find_recipe(name), [*values, *few, *([f"model.path={base}"] if base else [])])
        base = train_recipe(recipe, TerminalReporter()).root
        reports = MetricsLog(base / "metrics.jsonl").read()
        config = SLMConfig.from_pretrained(base / "latest")
        found[name] = {
            "signature": signature(recipe, config),
            "losses": [[report["tokens"], round(report["loss"], 4)] for report in reports],
        }
    return found


def curves(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Bands of all recipes that have two seeds."""
    found = []
    for name, recipe in results["recipes"].items():
        runs = [[{"tokens": tokens, "loss": loss} for tokens, loss in seed] for seed in recipe["seeds"].values()]
        if len(runs) < 2:
            continue
        total = min(run[-1]["tokens"] for run in runs)
        ends = [total * (number + 1) // POINTS for number in range(POINTS)]
        points = band(ends, [stretches(run, ends) for run in runs])
        found.append(
            {
                "recipe": name,
                "signature": recipe["signature"],
                "seeds": sorted(map(int, recipe["seeds"])),
                "points": [[point.tokens, point.mean, point.low, point.high] for point in points],
            }
        )
    return found


def stretches(reports: Sequence[Report], ends: Sequence[int]) -> list[float]:
    """Mean losses, in nats, between consecutive `ends` (trained tokens) of a run that logged every step."""
    sums, counts, number = [0.0] * len(ends), [0] * len(ends), 0
    for report in reports:
        while number < len(ends) and report["tokens"] > ends[number]:
            number += 1
        if number == len(ends):
            break
        sums[number] += report["loss"]
        counts[number] += 1
    return [total / count for total, count in zip(sums, counts) if count]


def band(ends: Sequence[int], seeds: Sequence[Sequence[float]]) -> list[Point]:
    """Points of a curve from the window means of at least two seeds."""
    columns = list(zip(*seeds))
    variances = [statistics.variance(column) for column in columns]
    points = []
    for number, (end, column) in enumerate(zip(ends, columns)):
        near = variances[max(0, number - NEIGHBOURS) : number + NEIGHBOURS + 1]
        mean = statistics.fmean(column)
        half = max(NARROWEST, DEVIATIONS * (statistics.fmean(near) * (1 + 1 / len(seeds))) ** 0.5)
        points.append(Point(end, round(mean, 4), round(mean - half, 4), round(mean + half, 4)))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--parts", type=int, default=len(PARTS), help="only the first so many of its three runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("overrides", nargs="*", help="of all three recipes, such as train.max_steps=20, for a trial")
    arguments = parser.parse_args()
    content = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"recipes": {}}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, run in live(seed, Path(folder), arguments.parts, arguments.overrides).items():
                kept = content["recipes"].get(name, {})
                if kept.get("signature") != run["signature"]:  # the recipe has changed: its old seeds say nothing
                    kept = {"signature": run["signature"], "seeds": {}}
                kept["seeds"][str(seed)] = run["losses"]
                content["recipes"][name] = kept
        content |= {"date": date.today().isoformat(), **environment(), **find_device().describe()}
        arguments.results.write_text(json.dumps(content) + "\n")
    described = {"date": content["date"], "curves": curves(content)}
    arguments.curves.write_text(json.dumps(described, indent=None) + "\n")
    for curve in described["curves"]:
        print(curve["recipe"], curve["seeds"], "last point:", curve["points"][-1])


if __name__ == "__main__":
    main()
