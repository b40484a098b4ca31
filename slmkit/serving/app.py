"""The routes of the server. The event loop never computes: requests are read, rendered and encoded in a thread of the
pool, and models run in the worker's.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from slmkit.config import UserError, did_you_mean
from slmkit.generation import engine
from slmkit.serving.answers import Answer, event_line
from slmkit.serving.models import ServedModel, chat_requests, completion_requests
from slmkit.serving.page import Page, add_page
from slmkit.serving.protocol import (
    JSON,
    ApiError,
    ChatRequest,
    Common,
    CompletionRequest,
    EmbeddingRequest,
    Error,
    read,
    several,
)
from slmkit.serving.worker import Busy, Failed, Job, Unavailable, Worker

if TYPE_CHECKING:
    from slmkit.serving.doors import Limits

PATIENCE = 15.0  # seconds without a first token after which a comment keeps the connection open
NO_ROUTE = {  # status → code, message
    404: ("not_found", "no such path: the API is below /v1, /openapi.json lists it, and the page needs --ui"),
    405: ("method_not_allowed", "another method is needed here: the header Allow names it"),
}
T = TypeVar("T")
C = TypeVar("C", ChatRequest, CompletionRequest)
Prepare = Callable[[C, ServedModel, str], list[engine.Request]]
logger = logging.getLogger(__name__)


class ClientGone(Exception):  # noqa: N818
    """The client has closed the connection."""


def create_app(worker: Worker, models: Mapping[str, ServedModel], limits: Limits, page: Page | None = None) -> FastAPI:
    """The application, for `Doors` around it."""
    # FastAPI's own pages of documentation load scripts from another host.
    app = FastAPI(title="slmkit", version="1", docs_url=None, redoc_url=None)
    for kind in (UserError, ApiError, Busy, Failed, HTTPException, ClientGone, Exception):
        app.add_exception_handler(kind, _refused)
    routes = Routes(worker, models)
    errors = {status: _described("An error.", "Error") for status in ("4XX", "5XX")}
    for path, call, kind, answer in (
        ("/v1/chat/completions", routes.chat, ChatRequest, "Answer"),
        ("/v1/completions", routes.completions, CompletionRequest, "Answer"),
        ("/v1/embeddings", routes.embeddings, EmbeddingRequest, "Embeddings"),
    ):
        extra = {"requestBody": {"required": True, **_described("A request.", kind.__name__)}}
        described = {"200": _described("The answer, whole or as events.", answer, "text/event-stream"), **errors}
        app.post(path, responses=described, openapi_extra=extra, response_class=Response)(call)
    app.get("/v1/models", responses=errors)(routes.list_models)
    app.get("/v1/models/{name:path}", responses=errors)(routes.one_model)
    app.get("/health", responses=errors, response_model=None)(routes.health)
    app.get("/metrics", responses=errors, response_class=PlainTextResponse)(routes.metrics)
    if page is not None:
        add_page(app, page)
    app.openapi = partial(_openapi, app, [*models])  # type: ignore[method-assign]
    return app


class Routes:
    """The handlers."""

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

        def compute() -> JSON:
            asked = read(EmbeddingRequest, body)
            model = self._model(request, asked)
            inputs = [model.text_ids(one, least=0) for one in several(asked.input) if one != ""]
            if len(inputs) < len(several(asked.input)):
                raise ApiError(400, "input: an empty text has no embedding", "input")
            data = []
            for index, ids in enumerate(inputs):
                vector = model.embed(ids, self.worker.run).numpy().astype("<f4")
                is_text = asked.encoding_format == "base64"
                value = base64.b64encode(vector.tobytes()).decode() if is_text else vector.tolist()
                data.append({"object": "embedding", "index": index, "embedding": value})
            tokens = sum(map(len, inputs))
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return {"object": "list", "data": data, "model": model.name, "usage": usage}

        return JSONResponse(await run_in_threadpool(compute))

    async def list_models(self) -> JSON:
        return {"object": "list", "data": [_entry(model) for model in self.models.values()]}

    async def one_model(self, name: str) -> JSON:
        return _entry(self._named(name))

    async def health(self) -> Response:
        """200 while requests are taken; 503 during the end and after a failure."""
        state = self.worker.state
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def metrics(self) -> Response:
        return Response(generate_latest(self.worker.registry), media_type=CONTENT_TYPE_LATEST)

    # -- what they share

    def _named(self, name: str) -> ServedModel:
        if name not in self.models:
            known = did_you_mean(name[:100], self.models)
            raise ApiError(404, f"there is no model {name!r:.100}; {known}", "model", "model_not_found")
        return self.models[name]

    def _model(self, request: Request, body: Common) -> ServedModel:
        model = self._named(body.model)
        request.state.model = model.name  # for the metrics
        return model

    async def _generate(self, request: Request, kind: type[C], prepare: Prepare[C]) -> Response:
        """Read and prepare the request, give it to the engine, and answer whole or as a stream."""
        content, group = await request.body(), getattr(request.state, "key_id", "")

        def begin() -> Answer:
            body = read(kind, content)
            model = self._model(request, body)
            return Answer(model, body, prepare(body, model, group))

        answer = await run_in_threadpool(begin)
        jobs: list[Job] = []

        async def work() -> bytes | None:
            jobs.extend(await self.worker.submit_all(answer.model, answer.requests))
            return None if answer.body.stream else await answer.whole(jobs)

        try:
            whole = await unless_gone(request.receive, work())
            return (
                EventStream(answer.stream(jobs), jobs)
                if whole is None
                else Response(whole, media_type="application/json")
            )
        except BaseException:
            for job in jobs:
                job.cancel()
            raise


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection. Raises `ClientGone` then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class EventStream(Response):
    """Server-sent events, until their end or until the client goes away."""

    def __init__(self, events: AsyncIterator[bytes], jobs: Sequence[Job]) -> None:
        super().__init__(media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.jobs = events, jobs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await unless_gone(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            for job in self.jobs:
                job.cancel()

    async def _send(self, send: Any) -> None:
        try:
            first = asyncio.ensure_future(anext(self.events))
            while not (await asyncio.wait({first}, timeout=PATIENCE))[0]:
                await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": first.result(), "more_body": True})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            last = event_line(api_error(error).envelope())
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


# -- errors and descriptions ------------------------------------------------------------------------------------------


def api_error(error: Exception) -> ApiError:
    """Any exception as an error of the API. What is no answer to a client is logged."""
    message, status = str(error), getattr(error, "status", 500)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientGone):
        return ApiError(499, "the client has closed the connection")  # for the metrics: nobody reads it
    if isinstance(error, UserError):
        name = message.partition(":")[0]  # most begin with the field
        return ApiError(400, message, name if name.isidentifier() else None)
    if isinstance(error, Busy):
        code = "service_unavailable" if isinstance(error, Unavailable) else "rate_limit_exceeded"
        return ApiError(status, message, code=code, headers={"Retry-After": str(math.ceil(error.retry_after))})
    if isinstance(error, Failed):
        return ApiError(status, message, code="generation_failed")
    if isinstance(error, HTTPException):
        code, message = NO_ROUTE.get(error.status_code, (None, str(error.detail)))
        return ApiError(error.status_code, message, code=code, headers=error.headers)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request: its log says why", code="internal_error")


async def _refused(request: Request, error: Exception) -> Response:
    found = api_error(error)
    return JSONResponse(found.envelope(), found.status, found.headers)


def _entry(model: ServedModel) -> JSON:
    context = model.decoder.max_positions
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "slmkit",
        "max_model_len": context,
    }


ANSWERS: JSON = {
    "Answer": {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"]},
    "Embeddings": {"type": "object", "required": ["object", "data", "model", "usage"]},
}


def _described(what: str, schema: str, *others: str) -> JSON:
    """JSON of a schema of the OpenAPI document, or other types of content."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": what, "content": content | {kind: {} for kind in others}}


def _openapi(app: FastAPI, names: list[str]) -> JSON:
    """FastAPI's description of the routes, with the schemas of requests and answers. `names`: of the models."""
    kinds = [(kind, "validation") for kind in (ChatRequest, CompletionRequest, EmbeddingRequest, Error)]
    _, found = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    for kind, _ in kinds[:3]:
        found["$defs"][kind.__name__]["properties"]["model"]["enum"] = names
    document = FastAPI.openapi(app)
    document.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"] | ANSWERS)
    return document
