"""The engines' thread: it alone calls the engines of all models, and hands what they say to the event loop.

    jobs reach it through a queue  →  one step of each busy engine in turn  →  one message to the loop for all jobs

A fault in a step fails the requests of that engine, which is then made anew. Faults that repeat, a step that never
returns and the end of the thread are the worker's own failure: every open request ends with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from slmkit.config import UserError
from slmkit.generation.engine import Event, Request
from slmkit.serving.metrics import Metrics
from slmkit.serving.protocol import ApiError, try_later

if TYPE_CHECKING:
    from slmkit.serving.models import ServedModel

T = TypeVar("T")
State = Literal["ok", "draining", "failed"]
FAULT = "the engine failed while it worked on this request: send it again"
MOST_FAULTS = 3  # of an engine, without a request that it finished in between

logger = logging.getLogger(__name__)


def failed(message: str, status: int = 500) -> ApiError:
    """A request that ended without its answer: 500 after a fault, 503 at the server's end, 504 if it took too long."""
    return ApiError(status, message, code="generation_failed")


class Job:
    """A request that the engine has taken, and its events in order. For the event loop that submitted it.

    Events are kept until they are read, at most as many as the request's rows and `max_new_tokens` allow, so that a
    slow reader delays nobody.
    """

    def __init__(self, worker: Worker, model: ServedModel, request: Request) -> None:
        self.model, self.request, self._worker = model, request, worker
        self.news = asyncio.Queue[Event | ApiError | None]()  # the last one is an error, or None
        # The worker thread's own:
        self.handle: int | None = None  # once the engine has it
        self.began, self.rows_left = time.monotonic(), request.n
        self.last_token: dict[int, float] = {}  # row → when

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Until the last row's end. Raises `ApiError` if the job failed."""
        while (news := await self.news.get()) is not None:
            if isinstance(news, ApiError):
                raise news
            yield news

    def cancel(self) -> None:
        """The rows leave before the next step. A job that has ended is no error. May be called from any thread."""
        self._worker.end_soon(self)


class Worker:
    """Steps the engines of `models` in one thread.

    `max_queue`: rows that wait for a slot, of each model. `request_seconds`: the longest that a request may take, from
    its arrival. `step_seconds`: after how long without a step's return the worker has failed.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        max_queue: int = 256,
        request_seconds: float = 600.0,
        step_seconds: float = 300.0,
    ) -> None:
        self.models, self.max_queue = list(models), max_queue
        self.request_seconds, self.step_seconds = request_seconds, step_seconds
        self.metrics = Metrics(self.models)
        self.registry = self.metrics.registry
        self.state: State = "ok"
        self._lock = threading.Lock()  # of the state, the open jobs and the calls: none begins after a failure
        self._open: dict[Job, None] = {}  # in order of their arrival
        self._calls = set[Future[Any]]()
        self._loop: asyncio.AbstractEventLoop | None = None  # that reads the jobs' news
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # None: the end
        self._functions = deque[Callable[[], None]]()  # of `call`: one between two steps, so that they hold up nobody
        self._tasks: dict[asyncio.Timeout, ApiError] = {}  # the error that each ends with if its time is over
        # The thread's own, but for the supervisor, which reads them after a failure:
        self._running: dict[tuple[str, int], Job] = {}  # (model, handle) → job
        self._unsent = defaultdict[Job, list[Event | ApiError | None]](list)
        self._faults = Counter[str]()  # of a model, since it last finished a request
        self._busy_since: float | None = None  # when the present command or step began
        self._thread = threading.Thread(target=self._run, name="slm-engine", daemon=True)
        self._supervisor = threading.Thread(target=self._supervise, name="slm-supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._supervisor.start()

    def stop(self) -> None:
        """End the thread after the present step; requests that are open end with an error."""
        self._commands.put(None)
        self._supervisor.join()

    async def submit(self, model: ServedModel, request: Request) -> Job:
        """Returns when the engine has taken the request.

        Raises `UserError` as `Engine.insert` does, and `ApiError`: 429 if the queue is full, 503 if the server is
        shutting down or has failed, 500 after a fault.
        """
        return (await self.submit_all(model, [request]))[0]

    async def submit_all(self, model: ServedModel, requests: Sequence[Request]) -> list[Job]:
        """`submit` for several requests at once: all or none. Raises `UserError` for more than rows and queue hold."""
        self._loop = asyncio.get_running_loop()
        jobs = [Job(self, model, request) for request in requests]
        with self._lock:
            self.expect("ok")
            rows = sum(job.rows_left for job in self._open if job.model is model)
            wanted, room = sum(request.n for request in requests), model.engine.pools.max_rows + self.max_queue
            if wanted > room:
                raise UserError(f"{wanted:,} texts at once: {model.name} takes {room:,}, so send fewer at a time")
            if rows + wanted > room:
                raise try_later(429, f"the queue of {model.name} is full ({rows} rows run or wait): try again")
            self._open |= dict.fromkeys(jobs)
        try:
            await asyncio.wrap_future(self._call(partial(self._insert, jobs), self._commands.put))
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        return jobs

    def end_soon(self, job: Job, error: ApiError | None = None) -> None:
        self._commands.put(partial(self._end, job, error))

    async def call(self, function: Callable[[], T]) -> T:
        """The result of `function`, which runs in the worker's thread between two steps. Cancelled, it never begins.

        Raises what the function raises, and `ApiError` (503) if the worker has failed.
        """
        future = self._call(function, self._functions.append)
        self._commands.put(lambda: None)  # wakes the thread
        return await asyncio.wrap_future(future)

    @contextlib.asynccontextmanager
    async def task(self) -> AsyncIterator[None]:
        """A request that is no job, such as embeddings, in the limits of jobs: one runs and `max_queue` wait.

        Raises `ApiError`: 429 if there are more, 503 at the server's end and after a failure, 504 if it takes too long.
        """
        self.expect("ok")
        if len(self._tasks) > self.max_queue:
            raise try_later(429, f"{len(self._tasks)} requests of this kind run or wait: try again")
        end = asyncio.timeout(self.request_seconds)
        self._tasks[end] = failed(f"the request took longer than {self.request_seconds:g} s", 504)
        try:
            async with end:
                yield
        except TimeoutError:
            raise self._tasks[end] from None
        finally:
            del self._tasks[end]

    def _call(self, function: Callable[[], T], put: Callable[[Callable[[], None]], object]) -> Future[T]:
        future = Future[T]()

        def obey() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        with self._lock:
            self.expect("ok", "draining")
            self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        put(obey)
        return future

    def expect(self, *states: State) -> None:
        """Raises `ApiError` (503) in another state."""
        if self.state not in states:
            what = "is shutting down" if self.state == "draining" else "has failed, and will be restarted"
            raise try_later(503, f"the server {what}: try again")

    async def drain(self, seconds: float) -> None:
        """Take no new request, and wait at most `seconds` for the open ones; the others end with an error."""
        with self._lock:
            self.state = "draining" if self.state == "ok" else self.state
        until = time.monotonic() + seconds
        while (self._open or self._tasks) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        error = failed("the server was shut down before the answer was complete: send the request again", 503)
        for job in [*self._open]:
            self.end_soon(job, error)
        for end in [end for end in self._tasks if not end.expired()]:
            self._tasks[end] = error
            end.reschedule(0)
        while (self._open or self._tasks) and time.monotonic() < until + 1:
            await asyncio.sleep(0.02)

    # -- in the worker's thread

    def _run(self) -> None:
        try:
            while self._obey():
                if self._functions:
                    self._functions.popleft()()
                for model in self.models:
                    if model.engine.is_busy:
                        self._step(model)
                now = time.monotonic()
                while (job := self._oldest()) and now - job.began > self.request_seconds:
                    self._end(job, failed(f"the request took longer than {self.request_seconds:g} s", 504))
                self._send()
        except BaseException:
            logger.critical("the engines' thread has ended", exc_info=True)

    def _obey(self) -> bool:
        """Run the commands that wait; with nothing else to do, wait for one. False: the end."""
        while self.state != "failed":
            is_busy = bool(self._unsent or self._functions) or any(model.engine.is_busy for model in self.models)
            self._busy_since = time.monotonic() if is_busy else None
            try:
                command = self._commands.get(block=not is_busy)
            except queue.Empty:
                return True
            if command is None:
                break
            self._busy_since = time.monotonic()
            command()
        return False

    def _oldest(self) -> Job | None:
        with self._lock:  # the event loop must not add one between `iter` and `next`
            return next(iter(self._open), None)

    def _insert(self, jobs: Sequence[Job]) -> None:
        """Give jobs to their engine: all, or none."""
        try:
            for job in jobs:
                if job in self._open:  # else a long step has used up its time
                    job.handle = self._ask(job.model, partial(job.model.engine.insert, job.request))
                    if job.handle is None:
                        raise failed(FAULT)
                    self._running[job.model.name, job.handle] = job
        except UserError:
            for refused in jobs:
                self._end(refused)
            raise

    def _ask(self, model: ServedModel, function: Callable[[], T]) -> T | None:
        """What a function of the model's engine returns; None after a fault. Raises `UserError`."""
        try:
            return function()
        except UserError:
            raise
        except Exception:
            logger.error(f"the engine of {model.name} failed, and is made anew", exc_info=True)
        self._fault(model)  # now that the exception, which refers to the engine's memory, is gone
        return None

    def _step(self, model: ServedModel) -> None:
        self._busy_since = time.monotonic()
        if (events := self._ask(model, model.engine.step)) is None:
            return
        now = time.monotonic()
        self.metrics.steps.labels(model.name).inc()
        self.metrics.generated_tokens.labels(model.name).inc(sum(event.token is not None for event in events))
        for event in events:
            job = self._running[model.name, event.handle]
            if (before := job.last_token.get(event.index)) is None:
                self.metrics.count_first(model.name, event, len(job.request.prompt), now - job.began)
            else:
                self.metrics.between_tokens.add(model.name, now - before)
            job.last_token[event.index] = now
            self._unsent[job].append(event)
            job.rows_left -= event.finish_reason is not None
            if job.rows_left == 0:
                self._faults[model.name] = 0
                self._end(job)

    def _end(self, job: Job, error: ApiError | None = None) -> None:
        """Take a job out, with its rows that still run. One that has ended is no error."""
        if job in self._open:
            with self._lock:
                self._open.pop(job, None)
            if job.handle is not None:
                del self._running[job.model.name, job.handle]
                self._ask(job.model, partial(job.model.engine.remove, job.handle))
            self._unsent[job].append(error)

    def _fault(self, model: ServedModel) -> None:
        """After an exception: make another engine, and fail the requests that this one had."""
        self.metrics.faults.labels(model.name).inc()
        self._faults[model.name] += 1
        if self._faults[model.name] >= MOST_FAULTS:
            logger.critical(f"the engine of {model.name} failed {MOST_FAULTS} times in a row")
            self._commands.put(None)
        model.engine = model.new_engine()
        for job in [job for job in self._running.values() if job.model is model]:
            self._end(job, failed(FAULT))

    def _send(self) -> None:
        """One message to the event loop for all jobs."""
        news = dict(self._unsent)
        self._unsent.clear()
        self._tell(news)

    def _tell(self, news: Mapping[Job, Sequence[Event | ApiError | None]]) -> None:
        def call() -> None:
            for job, items in news.items():
                for item in items:
                    job.news.put_nowait(item)

        if self._loop is not None and news:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(call)

    # -- in the supervisor's thread

    def _supervise(self) -> None:
        """Wait for the end of the engines' thread, or a step that does not return: every open request ends with it."""
        what = "the server failed before the answer was complete: send the request again"
        while self._thread.is_alive():
            self._thread.join(min(1.0, self.step_seconds / 4))
            if (began := self._busy_since) is not None and time.monotonic() - began > self.step_seconds:
                logger.critical(f"a step of the engine has not returned for {self.step_seconds:g} s")
                what = "the engine does not answer any more: send the request again"
                break
        with self._lock:
            self.state = "failed"
            jobs, self._open, calls = [*self._open, *self._unsent], {}, [*self._calls]
        self._tell({job: [failed(what)] for job in jobs})
        for call in calls:
            with contextlib.suppress(InvalidStateError):  # it has just ended
                call.set_exception(try_later(503, "the server has failed, and will be restarted: try again"))
