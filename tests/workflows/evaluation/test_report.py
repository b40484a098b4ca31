"""The report of a run in a real Chromium: on a screen, a phone and paper, for runs in all states."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slmkit.config import UserError
from slmkit.evaluation.results import Item, TaskResult
from slmkit.files import write_whole
from slmkit.training.logging.metrics_log import append_samples, mark_running
from slmkit.workflows.evaluation.report import distinguishing, evaluations, page_of, write_report
from slmkit.workflows.evaluation.report_curves import POINTS, charts_of, thinned
from tests.serving.browser import chromium, expect_contrast, expect_names, expect_no_sideways_scroll, picture
from tests.test_life import Silent
from tests.workflows.page_runs import SIZES, story_recipe, train_recipe

__all__ = ["chromium"]  # a fixture
HOSTILE = """</td></script><script>document.title = "taken"</script><img src=https://example.org/x.png onerror=alert(1)>
</pre><iframe src="//example.org"></iframe>{{ 7 * 7 }} {% raw %} &lt;b&gt; \u202eevil\u202c \ud800"""
LINES = {  # a line of metrics.jsonl of each objective
    "pretrain": {"loss": 3.0},
    "sft": {"loss": 2.0},
    "distill": {"loss": 2.5, "cross_entropy": 2.0, "divergence": 0.5},
    "dpo": {"loss": 0.6, "rewards/accuracy": 0.5, "rewards/margin": 0.1},
    "grpo": {"loss": 0.0, "answers/reward": 0.2, "answers/right": 0.1, "answers/tokens": 8.0},
}  # fmt: skip
RESULT = TaskResult(
    "gsm8k", {"shots": 5, "template": "none", "data": {"name": "a.jsonl", "sha256": "0" * 64}},
    {"number": "mean", "bits": "loss", "strict": "mean"},
    tuple(
        Item(str(i), {"number": (float(i % 2), 1.0), "bits": (i + 1.0, 2.0), "strict": (0.0, 1.0)}, {"given": HOSTILE})
        for i in range(8)
    ),
    ("document 9: no room",),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of six steps."""
    root = tmp_path_factory.mktemp("runs") / "stories"
    return train_recipe(story_recipe(root, "stories", 6, *SIZES, "train.eval_steps=2"), Silent()).root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "stories", symlinks=True))


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`opened(path, width=1280, dark=False)` → the file in a page; it fails on console errors and on every request."""
    problems: list[str] = []
    contexts = []

    def open_one(path: Path, width: int = 1280, dark: bool = False) -> Any:
        size = {"width": width, "height": 860}
        contexts.append(chromium.new_context(viewport=size, color_scheme="dark" if dark else "light"))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url == path.as_uri() or problems.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not problems


def rewrite(run: Path, lines: list[dict[str, Any]]) -> None:
    write_whole(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def lines_of(objective: str, count: int = 8) -> list[dict[str, Any]]:
    measured = {
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "tokens_per_second": 100,
        "seconds": 3.0,
        "memory_bytes": 1 << 30,
    }
    return [{"step": i, "tokens": 100 * i, **LINES[objective], **measured} for i in range(1, count + 1)]


def test_a_run_is_shown_whole_and_readable_everywhere(run: Path, tmp_path: Path, opened: Callable[..., Any]) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"results": [{"model": "stories", **RESULT.to_json()}]}))
    path = write_report(run, tmp_path / "report.html", [results])
    for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
        page = opened(path, width, dark)
        expect_no_sideways_scroll(page)
        expect_contrast(page)
        expect_names(page)
        picture(page, "report", whole=True)
    assert page.title() == "stories: report of a training run"
    sections = page.get_by_role("region").all()
    names = ["Curves", "Evaluation", "Samples", "Data", "Time and cost", "Checkpoints", "Configuration", "Environment"]
    headings = [heading.inner_text() for heading in page.get_by_role("heading", level=2).all()]
    assert headings == names
    assert len(sections) >= len(names)
    assert page.get_by_role("main").count() == page.get_by_role("navigation").count() == 1
    links = page.get_by_role("navigation").get_by_role("link").all()
    assert all(page.locator(link.get_attribute("href") or "").count() == 1 for link in links)
    charts = page.get_by_role("img").all()
    assert len(charts) >= 4
    assert all("after" in (chart.get_attribute("aria-label") or "") for chart in charts)
    text = page.locator("body").inner_text()
    for shown in ("0.5000", "± 0.1890", "0.0000 to 0.3244", "document 9: no room", "step 6", "best, latest"):
        assert shown in text
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len({*ids})


def test_paper_is_white_and_shows_what_is_folded(run: Path, tmp_path: Path, opened: Callable[..., Any]) -> None:
    page = opened(write_report(run, tmp_path / "report.html"), 720, dark=True)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 30, 26)"
    assert not page.get_by_role("navigation").is_visible()
    expect_no_sideways_scroll(page)
    assert page.evaluate("[...document.querySelectorAll('details > pre')].every((node) => node.checkVisibility())")
    assert page.pdf().startswith(b"%PDF")


def test_text_of_the_model_is_text(run: Path, tmp_path: Path, opened: Callable[..., Any]) -> None:
    append_samples(run / "samples.md", 6, [("", HOSTILE.encode("utf-8", "replace").decode())])
    described = json.loads((run / "environment.json").read_text())
    described |= {"device_name": HOSTILE, "changes": [{"step": 2, "key": HOSTILE, "was": HOSTILE, "now": 1}]}
    (run / "environment.json").write_text(json.dumps(described))
    rewrite(run, [line | {f"{HOSTILE} key": 1.0, "$x_1$": 2.0} for line in lines_of("pretrain")])
    named = run.rename(run.with_name("<b>bold<b>&amp;"))
    page = opened(write_report(named, tmp_path / "report.html"))
    assert page.title() == "<b>bold<b>&amp;: report of a training run"
    assert page.locator("script, img, iframe, b b, h1 b").count() == 0
    assert "</td></script><script>" in page.locator("#samples").inner_text()
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")


@pytest.mark.parametrize("objective", LINES)
def test_every_objective_has_its_curves(objective: str, run: Path) -> None:
    recipe = (run / "recipe.yaml").read_text().replace("objective: pretrain", f"objective: {objective}")
    (run / "recipe.yaml").write_text(recipe)
    rewrite(run, lines_of(objective))
    page = page_of(run, [])
    shown = {"distill": "divergence from the teacher", "dpo": "Pairs ranked correctly", "grpo": "Reward"}
    assert shown.get(objective, "Loss") in page


def test_states_of_a_run(run: Path) -> None:
    assert 'class="badge finished"' in page_of(run, [])
    with mark_running(run), (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tok')  # a line that is being written
        file.flush()
        assert 'class="badge running"' in page_of(run, [])
    described = json.loads((run / "environment.json").read_text())
    described.pop("finished")
    changes = [{"step": step, "key": "train.learning_rate", "was": 0.1, "now": 0.2} for step in (2, 4)]  # resumed twice
    (run / "environment.json").write_text(json.dumps(described | {"changes": changes}))
    rewrite(run, lines_of("pretrain", 4))
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"steps": 60}))
    page = page_of(run, [])
    assert 'class="badge stopped"' in page
    assert "slm resume" in page
    assert page.count("train.learning_rate") >= 2


def test_a_run_with_nothing_yet(run: Path) -> None:
    for name in ("metrics.jsonl", "samples.md", "environment.json", "plan.json", "xray.md", "best", "latest"):
        (run / name).unlink()
    for name in ("checkpoints", "data"):
        shutil.rmtree(run / name)
    (run / "checkpoints").mkdir()
    page = page_of(run, evaluations(run, []))
    for said in ("No step has been logged yet", "No samples", "None yet", "Not described yet"):
        assert said in page


def test_a_loss_that_is_not_finite(run: Path) -> None:
    lines = lines_of("pretrain")
    lines[3] |= {"loss": None, "grad_norm": None, "validation_loss": None}
    lines[5] |= {"validation_loss": 2.0}
    rewrite(run, lines)
    page = page_of(run, [])
    assert "The loss was not finite in 1 of the logged steps, first in step 4." in page
    rewrite(run, [line | {"loss": None} for line in lines_of("pretrain")])
    assert "not finite in 8 of the logged steps" in page_of(run, [])


def test_long_curves_keep_their_extremes_and_gaps() -> None:
    points = [(float(i), math.sin(i)) for i in range(100_000)]
    points[31_415] = 31_415.0, 9.0
    points[50_000] = 50_000.0, math.nan
    drawn = thinned(points)
    assert len(drawn) <= POINTS + 2
    assert (31_415.0, 9.0) in drawn
    assert sum(math.isnan(y) for _, y in drawn) == 1
    charts, _ = charts_of([{"step": int(x), "tokens": int(x) + 1, "loss": y} for x, y in points], perfect_loss=0.5)
    assert "highest 9 after 31,416" in charts[0].words
    assert "a perfect model: 0.500" in charts[0].words


def test_what_is_no_run_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run: it has no recipe\.yaml"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(run, tmp_path / "absent" / "report.html")
    (run / "recipe.yaml").write_text("objective: [")
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        write_report(run, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_results_of_one_task_are_told_apart_by_what_differs() -> None:
    few, many = (replace(RESULT, recipe={**RESULT.recipe, "limit": limit}) for limit in (20, 1_000))
    other = replace(RESULT, task="arc_easy")
    assert distinguishing([("run", few), ("run", many), ("run", other)]) == ["limit 20", "limit 1000", ""]
