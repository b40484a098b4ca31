"""The web page: static files of the package, and the functions that its tabs call.

GET /                  index.html
GET /page/FILE         a file of `serving/page`: read once, at the start; no path of a request is ever opened
POST /page/NAME        a function of `Page` with the JSON body as its argument → JSON
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from slmkit.config import UserError

Page = Mapping[str, Callable[[dict[str, Any]], Any]]

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {
    "/" if path.name == "index.html" else f"/page/{path.name}": (path.read_bytes(), TYPES[path.suffix])
    for path in sorted((Path(__file__).parent / "page").iterdir())
    if path.suffix in TYPES
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_page(app: FastAPI, page: Page) -> None:
    """Serve the page at `/`, and the functions of `page` at `/page/NAME`. The files need no key, the functions do."""
    for path, (content, kind) in FILES.items():
        app.add_api_route(path, _file(content, kind), methods=["GET", "HEAD"], include_in_schema=False)

    @app.post("/page/{name}", include_in_schema=False)
    async def call(name: str, request: Request) -> Response:
        if name not in page:
            return _refused(404, f"the page has no function {name!r}; there are {', '.join(sorted(page))}")
        # A form of another site can send text/plain without asking; JSON it cannot.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refused(415, "expected a body of Content-Type: application/json")
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            return _refused(400, "the body is no JSON")
        if not isinstance(body, dict):
            return _refused(400, "expected a JSON object")
        try:
            return await run_in_threadpool(lambda: JSONResponse(page[name](body), headers=HEADERS))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            return _refused(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        except UserError as error:
            return _refused(400, str(error))


def _file(content: bytes, kind: str) -> Callable[[Request], Response]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag, "Cache-Control": "no-cache"}

    def answer(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return answer


def _refused(status: int, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers=HEADERS)
