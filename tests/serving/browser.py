"""The page in a real Chromium: fixtures that fail on console errors, on what the content policy stops, and on requests
to other hosts.

    def test_something(open_page):
        with served({"tiny": model}, page) as url:
            page = open_page(url, tab="runs", width=390, dark=True)   # a playwright Page
            page.get_by_role("button", name="…").click()
            picture(page, "runs")                                     # runs-390-dark.png in $SLMKIT_SCREENSHOTS

Without playwright or Chromium these tests are skipped, with the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slmkit.serving.app import create_app
from slmkit.serving.doors import Limits
from slmkit.serving.worker import Worker
from tests.serving.servers import running

# The shell without a window of its own takes half the processor time.
CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDE, PHONE = 1280, 390
HEIGHT = {WIDE: 860, PHONE: 844}
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--process-per-site",  # for `shared_context`
]  # fmt: skip
CONTEXT: dict[str, Any] = {"reduced_motion": "reduce", "permissions": ["clipboard-read", "clipboard-write"]}


def chromium_path() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


@pytest.fixture(scope="module")  # not longer: while it is there, `asyncio.run` is refused in this thread
def chromium() -> Iterator[Any]:
    """A playwright `Browser`."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = chromium_path()
    if path is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is on the PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared_context(chromium: Any) -> Iterator[Any]:
    """A playwright `BrowserContext` with a page of the servers' site, so that the process which draws that site stays:
    a page in a process of its own takes twice the processor time.
    """
    context = chromium.new_context(**CONTEXT)
    page = context.new_page()
    page.route("**/*", lambda route: route.fulfill(body="", content_type="text/html"))
    page.goto("http://127.0.0.1/")
    yield context
    context.close()


@pytest.fixture
def open_page(chromium: Any, shared_context: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(url, tab="chat", width=1280, dark=False, expect="")` → a page on which that tab is shown.

    `expect`: a regular expression of console errors that the test causes, as by a request that is refused.
    `before`: a script that runs before those of the page. `wait`: until the tab is shown. Other options are those of
    playwright's `new_context`. The first page is in the shared context, unless it has such options; what it has stored
    is gone at the end.
    """
    opened, own_contexts, stored = list[Any](), list[Any](), list[str]()

    def open_one(
        url: str,
        tab: str = "chat",
        width: int = WIDE,
        dark: bool = False,
        expect: str = "",
        before: str = "",
        wait: bool = True,
        **options: Any,
    ) -> Any:
        if opened or options:
            context = chromium.new_context(**CONTEXT, **options)
            own_contexts.append(context)
        else:
            context = shared_context
            stored.append(url)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.set_viewport_size({"width": width, "height": HEIGHT.get(width, 860)})
        page.emulate_media(color_scheme="dark" if dark else "light", reduced_motion="reduce")
        if before:
            page.add_init_script(before)
        problems: list[str] = []
        page.problems = problems

        def note(message: str) -> None:
            if not (expect and re.search(expect, message)):
                problems.append(message)

        page.on("console", lambda message: message.type == "error" and note(f"console: {message.text}"))
        page.on("pageerror", lambda error: note(f"error: {error}"))
        page.on(
            "request",
            lambda request: request.url.startswith((url, "data:")) or note(f"request to another host: {request.url}"),
        )
        opened.append(page)
        page.goto(f"{url}/#{tab}")
        if wait:
            page.locator(f"#panel-{tab}[aria-busy=false]").wait_for()
        return page

    yield open_one
    found = [problem for page in opened for problem in page.problems]
    for page in opened:
        page.close()
    for context in own_contexts:
        context.close()
    storage = shared_context.new_cdp_session(shared_context.pages[0])
    for url in stored:
        storage.send("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
    storage.detach()
    assert not found, "\n".join(found)


def picture(page: Any, name: str, whole: bool = False) -> None:
    """A screenshot `NAME-WIDTH-THEME.png` in the folder $SLMKIT_SCREENSHOTS, if that is set."""
    if folder := os.environ.get("SLMKIT_SCREENSHOTS"):
        theme = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'")
        theme = page.evaluate("document.documentElement.dataset.theme") or theme
        file = f"{name}-{page.viewport_size['width']}-{theme}.png"
        page.screenshot(path=Path(folder) / file, full_page=whole, animations="disabled")


def expect_no_sideways_scroll(page: Any) -> None:
    wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider <= 0, f"the page is {wider} pixels wider than the window"


CHECKS = (Path(__file__).parent / "page_checks.js").read_text(encoding="utf-8")


def evaluate(page: Any, name: str, argument: Any = None) -> Any:
    """What a function of `page_checks.js` returns."""
    return page.evaluate(f"(argument) => {CHECKS}.{name}(argument)", argument)


def until(page: Any, expression: str, seconds: float = 120) -> None:
    """Wait until an expression of JavaScript is true. (Playwright's own `wait_for_function` needs `unsafe-eval`.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def expect_contrast(page: Any) -> None:
    """Each text that is shown has a contrast of 4.5 : 1 or more (WCAG 2, AA)."""
    low = evaluate(page, "lowContrast")
    assert not low, "\n".join(low)


def expect_names(page: Any) -> None:
    """Each control that is shown has a name for screen readers."""
    unnamed = evaluate(page, "unnamed")
    assert not unnamed, "\n".join(unnamed)


@contextmanager
def served(models: Mapping[str, Any], page: Mapping[str, Any] | None = None, keys: Sequence[str] = ()) -> Iterator[str]:
    """The real server with these `ServedModel`s and functions of the page beside `about`; gives its address."""
    limits, worker = Limits(keys=[*keys]), Worker([*models.values()])
    about = {name: {"context": model.decoder.max_positions, "chat": True} for name, model in models.items()}
    app = create_app(worker, models, {"about": lambda: {"models": about}, **(page or {})})
    worker.start()
    try:
        with running(app, limits, worker) as url:
            yield url
    finally:
        worker.stop()
