"""The engines' thread: it alone calls the engines of all models, and hands what they say to the event loop.

    jobs reach it through a queue  →  one step of each busy engine in turn  →  one message to the loop for all jobs

A fault in a step fails the requests of that engine, which is then made anew. Faults that repeat, a step that never
returns and the end of the thread are the worker's own failure: every open request ends with an error.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

import prometheus_client as prometheus

from slmkit.config import UserError
from slmkit.generation.engine import Event, Request
from slmkit.serving.metrics import Metrics

if TYPE_CHECKING:
    from slmkit.serving.models import ServedModel

T = TypeVar("T")
State = Literal["ok", "draining", "failed"]
FAULT = "the engine failed while it worked on this request: send it again"
MOST_FAULTS = 3  # of an engine, without a request that it finished in between
RETRY_AFTER = 1.0  # seconds: what a refused client is told; queues of small models are short

logger = logging.getLogger(__name__)


class Failed(Exception):  # noqa: N818
    """A request that ended without its answer. `status`: 500 after a fault, 503 at the end of the server, 504 for one
    that took too long.
    """

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


class Busy(Exception):  # noqa: N818
    """The queue is full (429). `retry_after`: seconds."""

    status = 429

    def __init__(self, message: str, retry_after: float = RETRY_AFTER) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(Busy):
    """The server is shutting down, or has failed (503)."""

    status = 503


class Job:
    """A request that the engine has taken, and its events in order. For the event loop that submitted it.

    Events are kept until they are read, at most as many as the request's rows and `max_new_tokens` allow, so that a
    slow reader delays nobody.
    """

    def __init__(self, worker: Worker, model: ServedModel, request: Request, taken: asyncio.Future[None]) -> None:
        self.model, self.request = model, request
        self._worker, self._taken, self.loop = worker, taken, taken.get_loop()
        self._events, self._news = deque[Event](), asyncio.Event()
        self._error: Exception | None = None
        self._has_ended = False
        # The worker thread's own:
        self.handle: int | None = None  # once the engine has it
        self.began, self.rows_left = time.monotonic(), request.n
        self.last_token: dict[int, float] = {}  # row → when

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Until the last row's end. Raises `Failed`."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._error is not None:
                raise self._error
            if self._has_ended:
                return
            await self._news.wait()
            self._news.clear()

    def cancel(self) -> None:
        """The rows leave before the next step. A job that has ended is no error. May be called from any thread."""
        if not self._has_ended:
            self._worker._commands.put(partial(self._worker._end, self))

    def receive(self, events: Sequence[Event], has_ended: bool, error: Exception | None) -> None:
        """From the worker, in the event loop."""
        if self._has_ended:
            return
        self._events.extend(events)
        self._has_ended, self._error = has_ended, error
        if not self._taken.done():
            if error is None:
                self._taken.set_result(None)
            else:
                self._taken.set_exception(error)
        self._news.set()


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
        self._state: State = "ok"
        self._lock = threading.Lock()  # of the state and the open jobs: none begins after the worker has failed
        self._open: dict[Job, None] = {}  # in order of their arrival
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: the end
        self._functions = deque[Callable[[], None]]()  # of `run`: one between two steps, so that they hold up nobody
        # The thread's own, but for the watch, which reads `_busy_since`:
        self._running: dict[tuple[str, int], Job] = {}  # (model, handle) → job
        self._unsent: defaultdict[Job, list[Event]] = defaultdict(list)  # and jobs without news but their end
        self._ended: dict[Job, Exception | None] = {}
        self._faults = Counter[str]()  # of a model, since it last finished a request
        self._busy_since: float | None = None  # when the present command or step began
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slm-engine", daemon=True)
        self._watch = threading.Thread(target=self._watch_steps, name="slm-watch", daemon=True)

    @property
    def registry(self) -> prometheus.CollectorRegistry:
        return self.metrics.registry

    @property
    def state(self) -> State:
        return self._state

    def start(self) -> None:
        self._thread.start()
        self._watch.start()

    def stop(self) -> None:
        """End the thread after the present step; requests that are open end with `Failed`."""
        self._stopped.set()
        self._commands.put(None)
        self._thread.join(timeout=1.0 if self._state == "failed" else self.step_seconds)  # its step may never return

    async def submit(self, model: ServedModel, request: Request) -> Job:
        """Returns when the engine has taken the request.

        Raises `UserError` as `Engine.insert` does, `Busy` if the queue is full, `Unavailable` if the server is shutting
        down or has failed, and `Failed`.
        """
        return (await self.submit_all(model, [request]))[0]

    async def submit_all(self, model: ServedModel, requests: Sequence[Request]) -> list[Job]:
        """`submit` for several requests at once: all are taken, or none."""
        taken = asyncio.get_running_loop().create_future()
        jobs = [Job(self, model, request, taken) for request in requests]
        with self._lock:
            if self._state != "ok":
                what = "is shutting down" if self._state == "draining" else "has failed, and will be restarted"
                raise Unavailable(f"the server {what}: try again")
            rows = sum(job.rows_left for job in [*self._open] if job.model is model)
            if rows + sum(request.n for request in requests) > model.engine.pools.max_rows + self.max_queue:
                raise Busy(f"the queue of {model.name} is full ({rows} rows run or wait): try again")
            self._open |= dict.fromkeys(jobs)
        self._commands.put(partial(self._insert, jobs))
        try:
            await taken
        except BaseException:  # also those that another engine has taken after a fault
            for job in jobs:
                job.cancel()
            raise
        return jobs

    def run(self, function: Callable[[], T]) -> T:
        """The result of `function`, which runs in the worker's thread between two steps. Blocks; from another thread.

        Raises what the function raises, and `Unavailable` if the worker has failed.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def obey() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._functions.append(obey)
        self._commands.put(lambda: None)  # wakes the thread
        while not concurrent.futures.wait([future], timeout=0.5).done:
            if self._state == "failed" or not self._thread.is_alive():
                raise Unavailable("the server has failed, and will be restarted: try again")
        return future.result()

    async def drain(self, seconds: float) -> None:
        """Take no new request, and wait at most `seconds` for the open ones; the others end with `Failed`."""
        with self._lock:
            self._state = "draining" if self._state == "ok" else self._state
        until = time.monotonic() + seconds
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        error = Failed("the server was shut down before the answer was complete: send the request again", 503)
        for job in [*self._open]:
            self._commands.put(partial(self._end, job, error))
        while self._open and self._thread.is_alive() and time.monotonic() < until + 1:
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
                    self._end(job, Failed(f"the request took longer than {self.request_seconds:g} s", 504))
                self._send()
        except BaseException:
            logger.critical("the engines' thread has ended", exc_info=True)
        finally:
            self._fail("the server failed before the answer was complete: send the request again")

    def _obey(self) -> bool:
        """Run the commands that wait; with nothing else to do, wait for one. False: the end."""
        while self._state != "failed":
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
        for job in jobs:
            if job not in self._open:  # cancelled, or refused with another
                continue
            try:
                job.handle = job.model.engine.insert(job.request)
            except UserError as error:
                for refused in jobs:
                    self._end(refused, error)
            except Exception:
                logger.error(f"the engine of {job.model.name} failed, and is made anew", exc_info=True)
                self._fault(job.model)
                self._end(job, Failed(FAULT))
            else:
                self._running[job.model.name, job.handle] = job
                self._unsent[job] = []  # it is taken

    def _step(self, model: ServedModel) -> None:
        self._busy_since = time.monotonic()
        events: list[Event] | None = None
        try:
            events = model.engine.step()
        except Exception:
            logger.error(f"the engine of {model.name} failed, and is made anew", exc_info=True)
        if events is None:  # the exception, which refers to the engine's memory, is gone
            self._fault(model)
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

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Take a job out, with its rows that still run. One that has ended is no error."""
        if job in self._open:
            with self._lock:
                self._open.pop(job, None)
            if job.handle is not None:
                del self._running[job.model.name, job.handle]
                job.model.engine.remove(job.handle)
            self._unsent[job], self._ended[job] = self._unsent[job], error

    def _fault(self, model: ServedModel) -> None:
        """After an exception: make another engine, and fail the requests that this one had."""
        self.metrics.faults.labels(model.name).inc()
        self._faults[model.name] += 1
        if self._faults[model.name] >= MOST_FAULTS:
            raise RuntimeError(f"the engine of {model.name} failed {MOST_FAULTS} times in a row")
        model.engine = model.new_engine()
        for job in [job for job in [*self._open] if job.model is model and job.handle is not None]:
            self._end(job, Failed(FAULT))

    def _send(self) -> None:
        """One message to each event loop (only tests have several), for all jobs."""
        by_loop = defaultdict[asyncio.AbstractEventLoop, list[Callable[[], None]]](list)
        for job, events in self._unsent.items():
            by_loop[job.loop].append(partial(job.receive, events, job in self._ended, self._ended.get(job)))
        self._unsent.clear()
        self._ended.clear()
        for loop, news in by_loop.items():
            _call_all_in(loop, news)

    def _fail(self, message: str) -> None:
        """End every open request. From the thread itself at its end, or from the watch."""
        with self._lock:
            self._state = "failed" if not self._stopped.is_set() else self._state
            jobs, self._open = [*self._open, *self._ended], {}
        for job in jobs:
            _call_all_in(job.loop, [partial(job.receive, (), True, Failed(message))])

    def _watch_steps(self) -> None:
        while not self._stopped.wait(min(1.0, self.step_seconds / 4)):
            began = self._busy_since
            if began is not None and time.monotonic() - began > self.step_seconds and self._state != "failed":
                logger.critical(f"a step of the engine has not returned for {self.step_seconds:g} s")
                self._fail("the engine does not answer any more: send the request again")


def _call_all_in(loop: asyncio.AbstractEventLoop, functions: Sequence[Callable[[], None]]) -> None:
    """Call functions in an event loop. If that is closed, nobody waits any more."""

    def call() -> None:
        for function in functions:
            function()

    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
