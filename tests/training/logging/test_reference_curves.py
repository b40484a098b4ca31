"""Whether a run is inside the band of its recipe, and that only its own recipe's is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.reference_curves import band, stretches
from slmkit.training.logging.metrics_log import MetricsLog
from slmkit.training.logging.reference_curves import (
    CURVES,
    Point,
    ReferenceBand,
    find_curve,
    signature,
)
from slmkit.training.loop import Every
from slmkit.training.recipe.recipe import Recipe, find_recipe, load_recipe
from tests.training.helpers import config, run, settings

PRIMER = find_recipe("quickstart-primer")


def test_only_what_changes_the_losses_changes_the_signature() -> None:
    shape = config()
    base = signature(load_recipe(PRIMER), shape)
    for same in ("seed=5", "output_dir=runs/x", "train.logging_steps=1", "train.eval_steps=7", "train.device=cpu"):
        assert signature(load_recipe(PRIMER, [same]), shape) == base, same
    for other in ("train.learning_rate=1e-3", "data.documents=100", "objective=sft", "train.sequence_length=128"):
        assert signature(load_recipe(PRIMER, [other]), shape) != base, other
    assert signature(load_recipe(PRIMER), config(hidden_size=64)) != base


def test_a_curve_is_found_by_its_signature_alone(tmp_path: Path) -> None:
    recipe, shape = Recipe(train=settings()), config()
    curve = {"recipe": "x", "signature": signature(recipe, shape), "points": [[100, 2.0, 1.9, 2.1]]}
    path = tmp_path / "curves.json"
    path.write_text(json.dumps({"curves": [curve]}))
    assert find_curve(recipe, shape, path) == [Point(100, 2.0, 1.9, 2.1)]
    assert find_curve(recipe, config(hidden_size=64), path) is None
    assert find_curve(recipe, shape, tmp_path / "none.json") is None


def test_a_band_holds_its_seeds_and_is_wider_where_they_differ_more() -> None:
    seeds = [[3.0, 2.0, 1.0], [3.1, 2.05, 1.0], [2.9, 1.95, 1.0]]
    points = band([10, 20, 30], seeds)
    for point, column in zip(points, zip(*seeds)):
        assert point.low < min(column)
        assert max(column) < point.high
    assert [point.mean for point in points] == [3.0, 2.0, 1.0]
    (narrow,) = band([10], [[1.0], [1.0001]])
    assert narrow.high - narrow.low == pytest.approx(0.04, abs=1e-3)


def test_stretches_are_means_between_their_ends() -> None:
    reports = [
        {"tokens": tokens, "loss": loss} for tokens, loss in ((5, 4.0), (10, 2.0), (15, 1.0), (20, 3.0), (25, 9.0))
    ]
    assert stretches(reports, [10, 20]) == [3.0, 2.0]


@pytest.mark.parametrize(("shift", "word"), [(0.0, "inside"), (0.5, "below"), (-0.5, "above")])
def test_a_run_is_told_where_it_is(tmp_path: Path, shift: float, word: str) -> None:
    run(tmp_path / "first")
    lines = MetricsLog(tmp_path / "first" / "metrics.jsonl").read()
    ends = [lines[3]["tokens"], lines[7]["tokens"], lines[11]["tokens"]]
    losses = [loss + shift for loss in stretches(lines, ends)]
    curve = [Point(end, loss, loss - 0.1, loss + 0.1) for end, loss in zip(ends, losses)]
    run(tmp_path / "second", hooks=(Every(1, ReferenceBand(curve).update),))
    words = [line.get("reference") for line in MetricsLog(tmp_path / "second" / "metrics.jsonl").read()]
    assert words == [None] * 4 + [word] * 8  # the last stretch ends with the run: nothing comes after it


def test_a_resumed_run_judges_no_stretch_of_which_it_saw_a_part(tmp_path: Path) -> None:
    run(tmp_path, max_steps=12)
    tokens = [line["tokens"] for line in MetricsLog(tmp_path / "metrics.jsonl").read()]
    ends = [tokens[9], round(tokens[11] * 1.5), tokens[11] * 2]
    beside = ReferenceBand([Point(end, 0.0, -0.1, 0.1) for end in ends])
    run(tmp_path, resume=True, max_steps=30, hooks=(Every(1, beside.update),))
    lines = MetricsLog(tmp_path / "metrics.jsonl").read()
    judged = [line["step"] for line in lines if "reference" in line]
    assert min(judged) == next(line["step"] for line in lines if line["tokens"] > ends[2])


def test_the_curves_that_come_along_are_of_shipped_recipes() -> None:
    if not CURVES.is_file():
        pytest.skip("no curves have been measured")
    for curve in json.loads(CURVES.read_text())["curves"]:
        assert find_recipe(curve["recipe"]).is_file()
        assert len(curve["seeds"]) >= 2
        points = [Point(*point) for point in curve["points"]]
        assert all(point.low < point.mean < point.high for point in points)
        assert [point.tokens for point in points] == sorted(point.tokens for point in points)
        assert points[-1].mean < points[0].mean
