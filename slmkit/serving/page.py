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

from slmkit.config import UserError, did_you_mean
from slmkit.serving.protocol import ApiError

Page = Mapping[str, Callable[[dict[str, Any]], Any]]

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {
    "/" if path.name == "index.html" else f"/page/{path.name}": (path.read_bytes(), TYPES[path.suffix])
    for path in sorted((Path(__file__).parent / "page").iterdir())
    if path.suffix in TYPES
}
# `Doors` adds the other headers of security.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def add_page(app: FastAPI, page: Page) -> None:
    """Serve the page at `/`, and the functions of `page` at `/page/NAME`. The files need no key, the functions do."""
    for path, (content, kind) in FILES.items():
        app.add_api_route(path, _file(content, kind), methods=["GET", "HEAD"], include_in_schema=False)

    @app.post("/page/{name}", include_in_schema=False)
    async def call(name: str, request: Request) -> Response:
        try:
            body = _json(request, await request.body())
            if name not in page:
                raise ApiError(404, f"the page has no function {name!r:.100}; {did_you_mean(name[:100], page)}")
            # Written as JSON in the thread too: curves may be long.
            return await run_in_threadpool(lambda: JSONResponse(page[name](body), headers=HEADERS))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            refusal = ApiError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        except UserError as error:
            refusal = ApiError(400, str(error))
        except ApiError as error:
            refusal = error
        return JSONResponse(refusal.envelope(), refusal.status, HEADERS)


def _json(request: Request, body: bytes) -> dict[str, Any]:
    # A page of another site can have a browser send text/plain here without asking first; JSON it cannot.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "expected a body of Content-Type: application/json")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body: expected a JSON object", code="invalid_json")
    return content


def _file(content: bytes, kind: str) -> Callable[[Request], Response]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    def answer(request: Request) -> Response:
        headers = HEADERS | {"ETag": tag, "Cache-Control": "no-cache"}  # kept, and asked for again each time
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return answer
