"""The routes of the server and of its page. Requests are read, rendered and encoded in a thread of the pool, models run
in the worker's thread, and the event loop writes the events of streams.

GET /                  index.html of the page
GET /page/FILE         a file of `serving/page`: read once, at the start; no path of a request is ever opened
POST /page/NAME        a function of `Page`, whose arguments are in the JSON body → JSON
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from slmkit.config import UserError, did_you_mean
from slmkit.generation import engine
from slmkit.serving.answers import Answer, event_line
from slmkit.serving.models import ServedModel, chat_requests, completion_requests
from slmkit.serving.protocol import (
    EMBEDDED_TOKENS,
    JSON,
    ApiError,
    ChatRequest,
    Common,
    CompletionRequest,
    EmbeddingRequest,
    Error,
    api_error,
    json_object,
    read,
    several,
)
from slmkit.serving.worker import Job, Worker

if TYPE_CHECKING:
    from slmkit.serving.server import Engines

PATIENCE = 15.0  # seconds without a first token after which a comment keeps the connection open
PAGE_THREADS = 8
ANSWER = "id", "object", "created", "model", "choices", "usage"  # keys
EMBEDDINGS = "object", "data", "model", "usage"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {
    "/" if path.name == "index.html" else f"/page/{path.name}": (path.read_bytes(), TYPES[path.suffix])
    for path in sorted((Path(__file__).parent / "page").iterdir())
    if path.suffix in TYPES
}
PAGE_HEADERS = {  # `Doors` adds the other headers of security
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # kept, and asked for again each time
}
Page = Mapping[str, Callable[..., Any]]
NO_ROUTE = {  # status → code, message
    404: ("not_found", "no such path: the API is below /v1, /openapi.json lists it, and the page needs --ui"),
    405: ("method_not_allowed", "another method is needed here: the header Allow names it"),
}
T = TypeVar("T")
C = TypeVar("C", ChatRequest, CompletionRequest)


def create_app(worker: Worker, models: Mapping[str, ServedModel], page: Page | None = None) -> FastAPI:
    """The application, for `Doors` around it."""
    app, routes = base_app(worker, {name: _entry(model) for name, model in models.items()}), Routes(worker, models)
    for path, call, kind, keys in (
        ("/v1/chat/completions", routes.chat, ChatRequest, ANSWER),
        ("/v1/completions", routes.completions, CompletionRequest, ANSWER),
        ("/v1/embeddings", routes.embeddings, EmbeddingRequest, EMBEDDINGS),
    ):
        asked = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        answer = {"application/json": {"schema": {"type": "object", "required": keys}}, "text/event-stream": {}}
        described: dict[int | str, JSON] = {200: {"description": "Whole, or as events.", "content": answer}}
        extra = {"requestBody": {"required": True, "content": asked}}
        app.post(path, responses=described, openapi_extra=extra, response_class=Response)(call)
    if page is not None:
        add_page(app, page, worker.task)
    app.openapi = partial(_openapi, app, [*models])  # type: ignore[method-assign]
    return app


def base_app(engines: Engines, models: Mapping[str, JSON]) -> FastAPI:
    """The routes of every engine, and errors in OpenAI's envelope. `models`: the entries of `/v1/models` by name."""
    # FastAPI's own pages of documentation load scripts from another host.
    errors: dict[int | str, JSON] = {status: {"model": Error, "description": "An error."} for status in ("4XX", "5XX")}
    app = FastAPI(title="slmkit", version="1", docs_url=None, redoc_url=None, responses=errors)
    for kind in (UserError, ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)

    @app.get("/v1/models")
    async def list_models() -> JSON:
        return {"object": "list", "data": [*models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSON:
        return named(models, name)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=None)
    async def health() -> Response:
        """200 while requests are taken; 503 during the end and after a failure."""
        return JSONResponse({"status": engines.state}, 200 if engines.state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(engines.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        code, message = NO_ROUTE.get(error.status_code, (None, str(error.detail)))
        error = ApiError(error.status_code, message, code=code, headers=error.headers)
    found = api_error(error)
    return JSONResponse(found.envelope(), found.status, found.headers)


def named(known: Mapping[str, T], name: str) -> T:
    """The model of a name. Raises `ApiError`."""
    if name not in known:
        near = did_you_mean(name[:100], known)
        raise ApiError(404, f"there is no model {name!r:.100}; {near}", "model", "model_not_found")
    return known[name]


class Routes:
    """The handlers of the routes that compute."""

    def __init__(self, worker: Worker, models: Mapping[str, ServedModel]) -> None:
        self.worker, self.models = worker, models

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._generate(request, ChatRequest, chat_requests)

    async def completions(self, request: Request) -> Response:
        """Continue texts, or score them."""
        return await self._generate(request, CompletionRequest, completion_requests)

    async def embeddings(self, request: Request) -> Response:
        """The mean of the final hidden states of each text."""
        body = await request.body()

        def begin() -> tuple[ServedModel, bool, list[Sequence[int]]]:
            asked = read(EmbeddingRequest, body)
            model, inputs = self._model(request, asked), several(asked.input)
            if "" in inputs:
                raise ApiError(400, "input: an empty text has no embedding", "input")
            each = [model.text_ids(one, least=0) for one in inputs]
            if (tokens := sum(map(len, each))) > EMBEDDED_TOKENS:
                raise ApiError(400, f"input: {tokens:,} tokens, at most {EMBEDDED_TOKENS:,} in a request", "input")
            return model, asked.encoding_format == "base64", each

        def end() -> Response:
            data = list[JSON]()
            for index, vector in enumerate(vector.numpy().astype("<f4") for vector in vectors):
                value = base64.b64encode(vector.tobytes()).decode() if is_text else vector.tolist()
                data.append({"object": "embedding", "index": index, "embedding": value})
            tokens = sum(map(len, each))
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})

        async with self.worker.task():
            model, is_text, each = await run_in_threadpool(begin)
            pieces, vectors = model.embeddings(each), []
            while (found := await self.worker.call(partial(next, pieces, None))) is not None:
                vectors += found
            return await run_in_threadpool(end)

    def _model(self, request: Request, body: Common) -> ServedModel:
        model = named(self.models, body.model)
        request.state.model = model.name  # for the metrics
        return model

    async def _generate(
        self, request: Request, kind: type[C], prepare: Callable[[C, ServedModel, str], list[engine.Request]]
    ) -> Response:
        """Read and prepare the request, give it to the engine, and answer whole or as a stream."""
        content = await request.body()

        def begin() -> Answer:
            body = read(kind, content)
            model = self._model(request, body)
            return Answer(model, body, prepare(body, model, request.state.key_id))

        answer = await run_in_threadpool(begin)
        jobs = await self.worker.submit_all(answer.model, answer.requests)
        if answer.body.stream:
            return EventStream(answer.stream(jobs), jobs)
        try:
            return Response(await answer.whole(jobs), media_type="application/json")
        finally:
            for job in jobs:
                job.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; at their end, and when `Doors` sees that the client has gone, the jobs end."""

    def __init__(self, events: AsyncIterator[bytes], jobs: Sequence[Job]) -> None:
        super().__init__(_kept_open(events), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self.jobs = jobs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.stream_response(send)
        finally:
            for job in self.jobs:
                job.cancel()


async def _kept_open(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """With comments until the first event, and an error as the last one."""
    try:
        first = asyncio.ensure_future(anext(events))
        while not (await asyncio.wait({first}, timeout=PATIENCE))[0]:
            yield b": waiting\n\n"
        yield first.result()
        async for event in events:
            yield event
    except Exception as error:
        yield event_line(api_error(error).envelope())


# -- the page ---------------------------------------------------------------------------------------------------------


def add_page(app: FastAPI, page: Page, task: Callable[[], AbstractAsyncContextManager[None]]) -> None:
    """Serve the page at `/`, and the functions of `page` at `/page/NAME`. The files need no key, the functions do.

    Plain functions run in a few threads of their own. `task` is `Worker.task`, for the limits.
    """
    threads = anyio.CapacityLimiter(PAGE_THREADS)
    for path, (content, kind) in FILES.items():
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        file = partial(_file, content=content, media_type=kind, headers=PAGE_HEADERS | {"ETag": tag})
        app.add_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)

    @app.post("/page/{name}", include_in_schema=False)
    async def call(name: str, request: Request) -> Response:
        try:
            # A page of another site can have a browser send text/plain here without asking first; JSON it cannot.
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError(415, "expected a body of Content-Type: application/json")
            body = json_object(await request.body())
            if name not in page:
                raise ApiError(404, f"the page has no function {name!r:.100}; {did_you_mean(name[:100], page)}")
            function = partial(page[name], **body)
            async with task():
                if inspect.iscoroutinefunction(page[name]):
                    found = await function()
                    return await run_in_threadpool(JSONResponse, found)
                # Written as JSON in the thread too: curves may be long.
                return await anyio.to_thread.run_sync(lambda: JSONResponse(function()), limiter=threads)
        except Exception as error:
            return await _refused(request, error)


async def _file(request: Request, **answer: Any) -> Response:
    if answer["headers"]["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=answer["headers"])
    return Response(**answer)


# -- descriptions -----------------------------------------------------------------------------------------------------


def _entry(model: ServedModel) -> JSON:
    facts = {"id": model.name, "object": "model", "created": model.created, "owned_by": "slmkit"}
    return facts | {"max_model_len": model.decoder.max_positions}


def _openapi(app: FastAPI, names: list[str]) -> JSON:
    """FastAPI's description of the routes, with the schemas of requests. `names`: of the models."""
    kinds = ChatRequest, CompletionRequest, EmbeddingRequest
    each, template = [(kind, "validation") for kind in kinds], "#/components/schemas/{model}"
    schemas = models_json_schema(each, ref_template=template)[1]["$defs"]  # type: ignore[arg-type]
    for kind in kinds:
        schemas[kind.__name__]["properties"]["model"]["enum"] = names
    document = FastAPI.openapi(app)
    document["components"]["schemas"] |= schemas
    return document
