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
from slmkit.serving.page import FILES, add_page
from tests.serving.browser import (
    PHONE,
    WIDE,
    expect_contrast,
    expect_names,
    expect_no_sideways_scroll,
    picture,
    running,
)


def refuse(body: dict[str, Any]) -> None:
    raise UserError("no such run: <b>x</b>")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = FastAPI()
    add_page(app, {"about": lambda body: {"models": {}}, "echo": lambda body: body, "refuse": refuse})

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
