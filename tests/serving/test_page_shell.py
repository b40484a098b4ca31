"""The page's shell: files, the content policy, functions, tabs, theme."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from slmkit.config import UserError
from slmkit.serving.app import FILES, add_page
from tests.serving.browser import (
    PHONE,
    WIDE,
    expect_contrast,
    expect_names,
    expect_no_sideways_scroll,
    picture,
    running,
)


def refuse(**body: Any) -> None:
    raise UserError("no such run: <b>x</b>")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = FastAPI()
    add_page(app, {"about": lambda: {"models": {}}, "echo": lambda **body: body, "refuse": refuse})

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny"}]}

    with running(app) as address:
        yield address


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, body, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, dict(answer.headers.items()), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers.items()), error.read()


def test_files(url: str) -> None:
    for path, (content, kind) in FILES.items():
        status, headers, body = ask(url + path)
        assert (status, body) == (200, content)
        assert headers["content-type"] == f"{kind}; charset=utf-8" or kind == "image/svg+xml"
        assert "script-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert ask(url + path, If_None_Match=headers["etag"])[0] == 304


@pytest.mark.parametrize(
    "path", ["/page/page.py", "/page/../page.py", "/page/%2e%2e/app.py", "/page/%2Fetc%2Fpasswd", "/page/"]
)
def test_no_other_file(url: str, path: str) -> None:
    assert ask(url + path)[0] in (404, 405)


def test_functions(url: str) -> None:
    json_type = {"Content_Type": "application/json"}
    status, headers, body = ask(f"{url}/page/echo", b'{"a": [1, null]}', **json_type)
    assert (status, json.loads(body)) == (200, {"a": [1, None]})
    assert "default-src 'none'" in headers["content-security-policy"]
    for name, content, kind, expected in (
        ("refuse", b"{}", json_type, 400), ("nothing", b"{}", json_type, 404), ("echo", b"[]", json_type, 400),
        ("echo", b"{", json_type, 400), ("echo", b"[" * 100_000, json_type, 400), ("echo", b"\xff", json_type, 400),
        ("echo", b"{}", {"Content_Type": "text/plain"}, 415),
    ):  # fmt: skip
        status, headers, body = ask(f"{url}/page/{name}", content, **kind)
        assert status == expected, (name, content)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert "default-src 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_shell(url: str, open_page: Callable[..., Any], width: int, dark: bool) -> None:
    page = open_page(url, width=width, dark=dark)
    expect_contrast(page)
    expect_names(page)
    expect_no_sideways_scroll(page)
    picture(page, "shell")


def test_tabs_by_keyboard_and_address(url: str, open_page: Callable[..., Any]) -> None:
    page = open_page(url, expect="404")  # of the functions of tabs, which this server does not have
    tabs = page.get_by_role("tab")
    assert tabs.all_inner_texts() == ["Chat", "Runs", "Look inside", "Data"]
    page.get_by_role("tab", name="Chat").focus()
    for key, name in (
        ("ArrowRight", "Runs"), ("ArrowRight", "Look inside"), ("End", "Data"), ("ArrowRight", "Chat"),
        ("ArrowLeft", "Data"), ("Home", "Chat"),
    ):  # fmt: skip
        page.keyboard.press(key)
        selected = page.get_by_role("tab", selected=True)
        assert (selected.count(), selected.inner_text()) == (1, name)
        assert selected.evaluate("(node) => node === document.activeElement && node.tabIndex === 0")
        shown = page.locator("[role=tabpanel]:not([hidden])")
        assert (shown.count(), shown.get_attribute("aria-labelledby")) == (1, selected.get_attribute("id"))
        assert page.title() == f"{name} · slmkit"
    assert page.get_by_role("tab").evaluate_all("(tabs) => tabs.map((tab) => tab.tabIndex)") == [0, -1, -1, -1]
    page.goto(f"{url}/#data")
    page.get_by_role("tabpanel", name="Data").wait_for()
    page.reload()
    page.get_by_role("tabpanel", name="Data").wait_for()


def test_the_theme_is_the_systems_until_one_is_chosen(url: str, open_page: Callable[..., Any]) -> None:
    page = open_page(url, dark=True)

    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark = paper()
    page.emulate_media(color_scheme="light")
    light = paper()
    assert light != dark
    button = page.get_by_role("button", name="Theme")
    for theme, colour in (("light", light), ("dark", dark), ("system", light), ("light", light), ("dark", dark)):
        button.click()
        assert button.get_attribute("title") == f"Theme: {theme}"
        assert paper() == colour
    page.reload()
    assert paper() == dark
    assert button.get_attribute("title") == "Theme: dark"


def test_a_server_that_does_not_answer(url: str, open_page: Callable[..., Any]) -> None:
    page = open_page(url, expect="ERR_")
    page.context.route("**/v1/models", lambda route: route.abort())
    page.reload()
    page.get_by_text("The server does not answer.").wait_for()
    page.context.unroute("**/v1/models")
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("textbox", name="Message", exact=True).wait_for()
