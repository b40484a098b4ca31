"""The tab Runs in a real browser, over real runs: one that trains meanwhile, and several compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slmkit.config import to_yaml
from slmkit.training.logging.metrics_log import MetricsLog
from tests.serving.browser import (
    PHONE,
    WIDE,
    expect_contrast,
    expect_names,
    expect_no_sideways_scroll,
    picture,
    running,
)
from tests.workflows.page_runs import SIZES, make_runs, page_app, story_recipe

OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("page"), objectives=())


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with running(page_app(folder, {})) as address:
        yield address


def points(page: Any, name: str) -> int:
    """How many points the line of this name in the large chart has; 0 if there is no such line."""
    line = page.locator(f'.chart-plot:not(.small) path[data-name="{name}"]')
    return line.evaluate_all("nodes => Number(nodes[0]?.dataset.points ?? 0)")


def until(page: Any, condition: Callable[[], bool], seconds: float = 120) -> None:
    for _ in range(int(seconds * 10)):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not happen in time")


def test_a_run_that_starts_trains_stops_and_is_deleted_while_one_looks(tmp_path: Path, open_page: OpenPage) -> None:
    runs, recipe = tmp_path / "runs", tmp_path / "recipe.yaml"
    runs.mkdir()
    recipe.write_text(to_yaml(story_recipe(runs / "live", "stories", 100_000, *SIZES, "train.eval_steps=20")))
    with running(page_app(runs, {})) as url:
        page = open_page(url, tab="runs")
        page.get_by_text("No runs yet.").wait_for()
        command = [sys.executable, "-m", "slmkit", "train", str(recipe), "--force"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        training = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            until(page, lambda: points(page, "training") > 0)
            before = points(page, "training")
            assert page.locator(".run .badge").inner_text() == "running"
            until(page, lambda: points(page, "training") > before + 1 and points(page, "validation") > 0)
            assert page.locator(".figure", has_text="left").count() == 1  # the time left
            assert "of 100,000 steps" in page.locator(".run-facts").inner_text()
            picture(page, "runs-live")
        finally:
            training.send_signal(signal.SIGINT)
            said = training.communicate(timeout=120)[1]
        assert b"Traceback" not in said
        page.locator(".run .badge", has_text="stopped").wait_for()
        lines = MetricsLog(runs / "live" / "metrics.jsonl").read()
        until(page, lambda: points(page, "training") == len(lines))
        assert points(page, "validation") == sum("validation_loss" in line for line in lines)

        kept = "".join(json.dumps(line) + "\n" for line in lines[:3])  # as when it is resumed from an earlier step
        (runs / "live" / "metrics.jsonl").write_text(kept)
        until(page, lambda: points(page, "training") == 3)
        shutil.rmtree(runs / "live")
        page.get_by_text("No runs yet.").wait_for()
        assert page.locator(".line").count() == 0 or not page.locator(".line").first.is_visible()


def test_it_asks_only_while_somebody_can_see_it(url: str, open_page: OpenPage) -> None:
    hidden = "Object.defineProperty(document, 'hidden', {get: () => window.isAway === true});"
    page, asked = open_page(url, tab="runs", before=hidden), []
    page.on("request", lambda request: asked.append(request.url))
    began = time.monotonic()
    until(page, lambda: len(asked) >= 4)
    assert len(asked) <= (time.monotonic() - began) / 2 + 2  # every two seconds; finished runs are not read again
    assert {request.rpartition("/")[2] for request in asked} == {"runs"}
    page.evaluate("window.isAway = true; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(1000)  # for what it asked before
    asked.clear()
    page.wait_for_timeout(2500)
    assert asked == []
    page.evaluate("window.isAway = false; document.dispatchEvent(new Event('visibilitychange'))")
    until(page, lambda: len(asked) > 0)
    page.get_by_role("tab", name="Data").click()
    page.locator("#panel-data[aria-busy=false]").wait_for()
    asked.clear()
    page.wait_for_timeout(2500)
    assert asked == []


def test_a_server_that_is_away_is_named_and_found_again(folder: Path, open_page: OpenPage) -> None:
    with running(page_app(folder, {})) as url:
        page = open_page(url, tab="runs", expect="Failed to load resource")
        page.route("**/page/runs", lambda route: route.abort())
        page.get_by_text("The server does not answer").wait_for()
        assert points(page, "training") > 0  # what was read is still there
        page.unroute("**/page/runs")
        page.get_by_text("The server does not answer").wait_for(state="hidden")


def test_two_runs_compared(url: str, folder: Path, open_page: OpenPage) -> None:
    page = open_page(url, tab="runs")
    page.get_by_role("button", name=re.compile("^stories")).click()
    until(page, lambda: points(page, "training") == 6)
    page.get_by_label("chat in the chart").check()
    until(page, lambda: points(page, "chat, training") == 4 and points(page, "stories, training") == 6)
    assert points(page, "chat, validation") == 2
    lines = page.locator(".legend li").all_inner_texts()
    reports = MetricsLog(folder / "chat" / "metrics.jsonl").read()
    best = min(report["validation_loss"] for report in reports if "validation_loss" in report)
    assert len(lines) == 5
    assert lines[4].startswith("a perfect model on stories")
    assert f"{best:.3f}"[:4] in lines[3]
    drawn = page.locator(".chart-plot:not(.small) path[data-name]")
    assert len(set(drawn.evaluate_all("nodes => nodes.map((node) => getComputedStyle(node).stroke)"))) == 2
    dashes = drawn.evaluate_all("nodes => nodes.map((node) => node.getAttribute('stroke-dasharray'))")
    assert len(set(dashes)) == 2  # they differ without colour too

    page.get_by_role("heading", name="Recipe").click()
    page.get_by_label("Only what differs from").select_option("chat")
    rows = {row[0]: row[1:] for row in cells(page, "Recipe")}
    assert rows["objective"] == ["pretrain", "sft"]
    assert rows["train.sequence_length"] == ["128", "512"]
    assert "seed" not in rows
    page.get_by_label("Keys with").fill("sequence")
    assert [row[0] for row in cells(page, "Recipe")] == ["train.sequence_length"]
    page.get_by_label("chat in the chart").uncheck()
    until(page, lambda: points(page, "chat, training") == 0 and points(page, "training") == 6)


def cells(page: Any, table: str) -> list[list[str]]:
    rows = page.get_by_role("region", name=table).locator("tbody tr")
    return rows.evaluate_all("rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))")


def test_the_chart_by_keyboard_and_as_a_table(url: str, folder: Path, open_page: OpenPage) -> None:
    page = open_page(url, tab="runs")
    page.get_by_role("button", name=re.compile("^stories")).click()
    until(page, lambda: points(page, "training") == 6)
    lines = MetricsLog(folder / "stories" / "metrics.jsonl").read()
    plot, readout = page.locator(".chart-plot:not(.small)"), page.locator(".chart-readout").first
    plot.focus()
    page.keyboard.press("End")
    assert readout.inner_text().split("\n")[0] == "6 steps"
    assert f"{lines[-1]['loss']:.5g}".rstrip("0") in readout.inner_text()
    page.keyboard.press("ArrowLeft")
    assert readout.inner_text().split("\n")[0] == "5 steps"
    page.keyboard.press("Escape")
    assert not readout.is_visible()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 100)
    assert readout.inner_text().split("\n")[0] == "6 steps"

    page.get_by_text("Show as a table").click()
    rows = cells(page, "Loss")
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [float(row[1]) for row in rows] == pytest.approx([line["loss"] for line in lines], rel=1e-3)
    assert [bool(row[2]) for row in rows] == ["validation_loss" in line for line in lines]
    page.get_by_text("tokens", exact=True).click(force=True)
    assert cells(page, "Loss")[0][0] == f"{lines[0]['tokens']:,}"
    page.locator(".small-chart", has_text="Learning rate").click()
    page.get_by_role("region", name="Learning rate").wait_for()
    assert page.get_by_role("combobox", name="Curve").input_value() == "learning_rate"
    page.get_by_label("Log scale").check()
    page.reload()  # what was chosen is kept
    page.locator("#panel-runs[aria-busy=false]").wait_for()
    assert page.get_by_label("Log scale").is_checked()
    assert page.get_by_role("combobox", name="Curve").input_value() == "learning_rate"


def test_figures_of_tasks_are_curves_with_points(folder: Path, tmp_path: Path, open_page: OpenPage) -> None:
    shutil.copytree(folder / "stories", tmp_path / "runs" / "stories", symlinks=True)
    log = MetricsLog(tmp_path / "runs" / "stories" / "metrics.jsonl")
    lines = log.read()
    for line, accuracy in zip(lines[1::2], (0.25, 0.5)):
        line |= {"eval/hellaswag/acc_norm": accuracy, "eval/hellaswag/acc_norm_stderr": 0.1}
    log.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with running(page_app(tmp_path / "runs", {})) as url:
        page = open_page(url, tab="runs")
        until(page, lambda: points(page, "training") == 6)
        curves = page.get_by_role("combobox", name="Curve")
        assert [name for name in curves.locator("option").all_inner_texts() if "hellaswag" in name.lower()] == [
            "Eval/hellaswag/acc norm"
        ]
        curves.select_option("eval/hellaswag/acc_norm")
        until(page, lambda: points(page, "validation") == 2)
        assert points(page, "training") == 0
        assert [name.split("\n") for name in page.locator(".legend li").all_inner_texts()] == [["validation", "0.5"]]


def test_samples_from_the_first_to_the_last(runs_with_markup: str, open_page: OpenPage) -> None:
    page = open_page(runs_with_markup, tab="runs")
    page.get_by_role("button", name=re.compile("^<img")).click()
    slider = page.get_by_label("Evaluation", exact=True)
    slider.wait_for()
    sides = page.locator(".sample blockquote")
    assert page.locator(".sample .prompt").inner_text() == "Ask <b>me</b>"
    assert sides.all_inner_texts() == ["first <script>alert(1)</script>", "שלום last"]
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert sides.all_inner_texts() == ["first <script>alert(1)</script>", "second\n\n<img src=x onerror=alert(2)>"]
    assert slider.get_attribute("aria-valuetext") == "step 4"
    assert page.locator("#panels img, #panels script, #panels .sample b").count() == 0


@pytest.fixture
def runs_with_markup(folder: Path, tmp_path: Path) -> Iterator[str]:
    name = "<img src=x onerror=alert(3)>"
    shutil.copytree(folder / "stories", tmp_path / "runs" / name, symlinks=True)
    run = tmp_path / "runs" / name
    recipe = run / "recipe.yaml"
    recipe.write_text(re.sub(r"sample_prompts:\n  - .*", "sample_prompts:\n  - Ask <b>me</b>", recipe.read_text()))
    asked = "> Ask <b>me</b>\n> "
    (run / "samples.md").write_text(
        f"## Step 2\n\n{asked}first <script>alert(1)</script>\n\n"
        f"## Step 4\n\n{asked}second\n> \n> <img src=x onerror=alert(2)>\n\n## Step 6\n\n{asked}שלום last\n\n"
    )
    findings = "- **a <b>finding</b>**\n- note: a <i>note</i>\n"
    (run / "xray.md").write_text((run / "xray.md").read_text().replace("- padding", f"{findings}- padding"))
    with running(page_app(tmp_path / "runs", {})) as url:
        yield url


def test_what_the_x_ray_found(url: str, folder: Path, runs_with_markup: str, open_page: OpenPage) -> None:
    page = open_page(url, tab="runs")
    page.get_by_role("button", name=re.compile("^chat")).click()
    section = page.get_by_role("region", name="What is fed and learned")
    section.locator("mark").nth(1).wait_for()
    learned = section.locator(".fed mark").all_inner_texts()
    text = (folder / "chat" / "xray.md").read_text()
    assert learned
    assert all(part.strip() in text and "⟦" not in part and "<|im_start|>" not in part for part in learned)
    assert section.locator("dt").all_inner_texts()[:2] == ["rows", "learned"]
    section.get_by_text("found nothing wrong").wait_for()

    page = open_page(runs_with_markup, tab="runs")
    section = page.get_by_role("region", name="What is fed and learned")
    assert section.locator(".error").inner_text() == "a <b>finding</b>"
    assert section.locator(".warn").inner_text() == "Note: a <i>note</i>"


def test_functions_of_the_charts(url: str, open_page: OpenPage) -> None:
    page = open_page(url, tab="runs")

    def call(expression: str) -> Any:
        return page.evaluate(f"import('{url}/page/charts.js').then(({{ ticks, short, smoothed }}) => {expression})")

    assert call("ticks(0, 10, 5)") == [0, 2, 4, 6, 8, 10]
    assert call("ticks(1.13, 1.47, 4)") == [1.2, 1.3, 1.4]
    assert call("ticks(-0.3, 0.31, 3)") == [-0.2, 0, 0.2]
    assert call("ticks(0.1, 0.30000001, 2)") == [0.1, 0.2, 0.3]
    assert call("ticks(5, 5, 4)") == [5]
    assert call("ticks(5, 5.000000000000001, 4)") == [5]  # a smoothed constant
    assert call("ticks(0.8, 120, 6, true)") == [1, 2, 5, 10, 20, 50, 100]
    assert call("ticks(1e-9, 1, 3, true)") == [1e-9, 1e-6, 1e-3, 1]
    assert call("ticks(1, 3, 4, true)") == [1, 1.5, 2, 2.5, 3]
    assert call("[0, 0.25, 3, 1500, 12000, 3.4e6, 0.0003, -20000].map(short)") == [
        "0", "0.25", "3", "1500", "12k", "3.4M", "3e-4", "-20k",
    ]  # fmt: skip
    assert call("smoothed([[0, 4], [1, 4], [2, null], [3, 4]], 0.9).map(([, y]) => y)") == [
        pytest.approx(4), pytest.approx(4), None, pytest.approx(4),
    ]  # fmt: skip
    assert call("smoothed([[0, 0], [1, 3]], 0.5)") == [[0, 0], [1, pytest.approx(2)]]


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_by_all(url: str, open_page: OpenPage, width: int, dark: bool) -> None:
    page = open_page(url, tab="runs", width=width, dark=dark)
    page.get_by_label("stories in the chart").check()
    until(page, lambda: points(page, "stories, training") == 6 or points(page, "training") > 0)
    page.locator(".chart-plot:not(.small)").focus()
    page.keyboard.press("End")
    picture(page, "runs")
    page.evaluate("document.querySelectorAll('#panels details').forEach((details) => { details.open = true; })")
    page.wait_for_timeout(300)
    expect_contrast(page)
    expect_names(page)
    expect_no_sideways_scroll(page)
    picture(page, "runs-whole", whole=True)
