"""The engines' thread, with a real engine: what it hands out, who is refused, and what it does after a fault."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest
from prometheus_client import generate_latest

from slmkit import SLMConfig, SLMTokenizer
from slmkit.config import UserError
from slmkit.generation.engine import Engine, Request
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.initialization import build_decoder
from slmkit.serving import worker as module
from slmkit.serving.protocol import ApiError
from slmkit.serving.worker import Job, Worker

GREEDY = SamplingSettings(temperature=0)


class Model:
    """What the worker asks of a `ServedModel`. `slow`: seconds that each step takes longer. `gate`: where each step
    waits while it is not set; `is_at_gate`: one does, or did.
    """

    def __init__(self, name: str = "m", slow: float = 0.0, **options: Any) -> None:
        self.name, self.slow, self.options, self.engines = name, slow, options, 0
        self.decoder, self.tokenizer = shared_model()
        self.gate = threading.Event()
        self.gate.set()
        self.is_at_gate = threading.Event()
        self.engine = self.new_engine()

    def new_engine(self) -> Engine:
        self.engines += 1
        engine = Engine(self.decoder, self.tokenizer, **self.options)
        step = engine.step

        def slow_step() -> Any:
            self.is_at_gate.set()
            assert self.gate.wait(120)
            time.sleep(self.slow)
            return step()

        engine.step = slow_step  # type: ignore[method-assign]
        return engine


_cache: list[Any] = []


def shared_model() -> Any:
    if not _cache:
        tokenizer = SLMTokenizer(vocab_size=300)
        tokenizer.train(["The fox had a red kite. The kite flew over the hill."] * 8)
        shape = SLMConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512,
        )  # fmt: skip
        _cache.extend((build_decoder(shape, seed=0).eval(), tokenizer))
    return _cache


@contextmanager
def started(*models: Model, **options: Any) -> Iterator[Worker]:
    worker = Worker(cast(Any, models), **options)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def go(function: Callable[[], Awaitable[Any]], seconds: float = 240) -> Any:
    return asyncio.run(asyncio.wait_for(cast(Any, function()), seconds))


def request(number: int = 0, tokens: int = 20, n: int = 1, **more: Any) -> Request:
    return Request([number % 256, 17, 33], tokens, GREEDY, n=n, **more)


async def tokens_of(job: Job) -> list[tuple[int, int | None]]:
    return [(event.index, event.token) async for event in job]


def alone(model: Model, asked: Request) -> list[tuple[int, int | None]]:
    engine = Engine(model.decoder, model.tokenizer)
    engine.insert(asked)
    events = []
    while engine.is_busy:
        events += [(event.index, event.token) for event in engine.step()]
    return events


def metric(worker: Worker, name: str, **labels: str) -> float:
    return worker.registry.get_sample_value(name, labels) or 0.0


async def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def test_many_requests_of_two_models_get_what_each_gets_alone() -> None:
    first, second = Model("first"), Model("second", max_rows=3)

    async def main() -> None:
        asked = [(model, request(number, 5 + number % 7, 1 + number % 3)) for number in range(40) for model in models]
        jobs = await asyncio.gather(*(worker.submit(cast(Any, model), one) for model, one in asked))
        found = await asyncio.gather(*map(tokens_of, jobs))
        for (model, one), events in zip(asked, found):
            assert sorted(events, key=lambda event: event[0]) == sorted(alone(model, one), key=lambda event: event[0])

    models = first, second
    with started(first, second) as worker:
        go(main)
        generated = sum(metric(worker, "slm_generated_tokens_total", model=model.name) for model in models)
        assert generated == sum(2 * (5 + number % 7) * (1 + number % 3) for number in range(40))
        for model in ("first", "second"):
            read = metric(worker, "slm_prompt_tokens_total", model=model)
            assert read + metric(worker, "slm_cached_prompt_tokens_total", model=model) == sum(
                3 * (1 + number % 3) for number in range(40)
            )
            assert metric(worker, "slm_running_rows", model=model) == 0
            first_tokens = metric(worker, "slm_time_to_first_token_seconds_count", model=model)
            assert first_tokens == sum(1 + number % 3 for number in range(40))
        assert b"slm_engine_steps_total" in generate_latest(worker.registry)


def test_all_events_of_a_step_reach_the_loop_in_one_call() -> None:
    async def main() -> None:
        loop, calls, step_calls = asyncio.get_running_loop(), 0, loop_calls()
        jobs = await asyncio.gather(*(worker.submit(cast(Any, model), request(k, 50)) for k in range(8)))
        original = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*arguments, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        before = loop_calls()
        await asyncio.gather(*map(tokens_of, jobs))
        assert 0 < calls <= loop_calls() - before + 1, step_calls

    def loop_calls() -> float:
        return metric(worker, "slm_engine_steps_total", model="m")

    model = Model(slow=0.002)
    with started(model) as worker:
        go(main)


def test_what_the_engine_refuses_is_refused_and_all_or_none_are_taken() -> None:
    async def main() -> None:
        with pytest.raises(UserError, match="an empty prompt"):
            await worker.submit(cast(Any, model), Request([], 5))
        with pytest.raises(UserError, match="token 999 of the prompt"):
            await worker.submit_all(cast(Any, model), [request(1), Request([999], 5), request(2)])
        await until(lambda: not model.engine.is_busy)
        assert metric(worker, "slm_generated_tokens_total", model="m") == 0
        jobs = await worker.submit_all(cast(Any, model), [request(1), request(2)])
        assert [len(await tokens_of(job)) for job in jobs] == [20, 20]

    model = Model()
    with started(model) as worker:
        go(main)


def test_a_cancelled_request_leaves_within_a_step_and_one_that_waits_never_starts() -> None:
    async def main() -> None:
        runs = await worker.submit(cast(Any, model), request(1, 400))
        waits = await worker.submit(cast(Any, model), request(2, 400))
        await until(lambda: metric(worker, "slm_generated_tokens_total", model="m") > 3)
        assert metric(worker, "slm_waiting_rows", model="m") == 1
        waits.cancel()
        waits.cancel()
        assert await tokens_of(waits) == []
        stays = asyncio.create_task(tokens_of(await worker.submit(cast(Any, model), request(3, 10))))
        runs.cancel()
        at = metric(worker, "slm_generated_tokens_total", model="m")
        await stays
        runs.cancel()
        assert metric(worker, "slm_generated_tokens_total", model="m") - at <= 10 + 1
        assert stays.result() == alone(model, request(3, 10))
        assert metric(worker, "slm_running_rows", model="m") == metric(worker, "slm_waiting_rows", model="m") == 0

    model = Model(slow=0.01, max_rows=1)
    with started(model) as worker:
        go(main)


def test_a_submission_that_is_given_up_before_it_is_taken_never_starts() -> None:
    async def main() -> None:
        model.gate.clear()
        first = await worker.submit(cast(Any, model), request(1, 30))
        await until(model.is_at_gate.is_set)
        task = asyncio.create_task(worker.submit(cast(Any, model), request(2, 30)))
        await until(lambda: not worker._commands.empty())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.gate.set()
        assert len(await tokens_of(first)) == 30
        await until(lambda: not worker._open)
        assert metric(worker, "slm_generated_tokens_total", model="m") == 30

    model = Model()
    with started(model) as worker:
        go(main)


def test_requests_that_come_while_the_thread_looks_for_the_oldest_one() -> None:
    class Slow(dict[Job, None]):
        def __iter__(self) -> Iterator[Job]:
            found = super().__iter__()
            time.sleep(0.005)
            return found

    async def main() -> None:
        jobs = await asyncio.gather(*(worker.submit(cast(Any, model), request(k, 5)) for k in range(20)))
        more = [await worker.submit(cast(Any, model), request(k, 5)) for k in range(20)]
        assert [len(await tokens_of(job)) for job in [*jobs, *more]] == [5] * 40
        assert worker.state == "ok"

    model = Model()
    with started(model) as worker:
        worker._open = Slow()
        go(main)


def test_a_full_queue_refuses_at_once_and_takes_again() -> None:
    """At once: while the thread is in a step."""

    async def main() -> None:
        model.gate.clear()
        jobs = await worker.submit_all(cast(Any, model), [request(k, 30) for k in range(6)])
        with pytest.raises(ApiError) as refused:
            await worker.submit(cast(Any, model), request(7))
        assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
        with pytest.raises(UserError, match="7 texts at once: .* takes 6"):  # it would never find room
            await worker.submit_all(cast(Any, model), [request(k) for k in range(7)])
        model.gate.set()
        jobs[5].cancel()
        await tokens_of(jobs[5])
        assert len(await tokens_of(await worker.submit(cast(Any, model), request(7)))) == 20
        assert [len(await tokens_of(job)) for job in jobs[:5]] == [30] * 5

    model = Model(max_rows=2)
    with started(model, max_queue=4) as worker:
        go(main)


def test_a_reader_that_reads_nothing_stalls_nobody() -> None:
    async def main() -> None:
        unread = [await worker.submit(cast(Any, model), request(k, 100)) for k in range(4)]
        for number in range(5):
            assert len(await tokens_of(await worker.submit(cast(Any, model), request(number)))) == 20
        await until(lambda: not worker._open)
        assert [await tokens_of(job) for job in unread] == [alone(model, request(k, 100)) for k in range(4)]

    model = Model()
    with started(model) as worker:
        go(main)


def test_a_request_that_takes_too_long_is_ended_and_its_rows_leave() -> None:
    async def main() -> None:
        slow = await worker.submit(cast(Any, model), request(1, 400, n=2))
        with pytest.raises(ApiError, match="longer than 0.3 s") as error:
            await tokens_of(slow)
        assert error.value.status == 504
        assert metric(worker, "slm_running_rows", model="m") == 0
        model.slow, worker.request_seconds = 0, 600
        assert len(await tokens_of(await worker.submit(cast(Any, model), request(2, 5)))) == 5

    model = Model(slow=0.01)
    with started(model, request_seconds=0.3) as worker:
        go(main)


def test_a_request_whose_time_is_over_before_it_is_taken_never_starts() -> None:
    async def main() -> None:
        first = await worker.submit(cast(Any, model), request(1, 400))
        late = await worker.submit(cast(Any, model), request(2, 400))  # during the first step
        for job in (first, late):
            with pytest.raises(ApiError, match="longer than 0.1 s"):
                await tokens_of(job)
        await until(lambda: not model.engine.is_busy)
        assert not worker._running

    model = Model(slow=0.3)
    with started(model, request_seconds=0.1) as worker:
        go(main)


# -- faults -----------------------------------------------------------------------------------------------------------


def break_next_step(model: Model) -> None:
    def broken() -> Any:
        raise RuntimeError("a fault, as of a kernel")

    model.engine.step = broken  # type: ignore[method-assign]


def test_a_fault_fails_the_requests_of_its_engine_alone_and_the_next_one_is_right() -> None:
    async def main() -> None:
        hurt = [await worker.submit(cast(Any, broken), request(k, 300)) for k in range(3)]
        other = asyncio.create_task(tokens_of(await worker.submit(cast(Any, whole), request(9, 100))))
        await until(lambda: metric(worker, "slm_generated_tokens_total", model="broken") > 10)
        broken.slow = 0
        await worker.call(lambda: break_next_step(broken))
        for job in hurt:
            with pytest.raises(ApiError, match="the engine failed") as error:
                await tokens_of(job)
            assert error.value.status == 500
        assert worker.state == "ok"
        assert await tokens_of(await worker.submit(cast(Any, broken), request(4))) == alone(broken, request(4))
        assert await other == alone(whole, request(9, 100))
        assert (broken.engines, whole.engines) == (2, 1)
        assert metric(worker, "slm_engine_faults_total", model="broken") == 1

    broken, whole = Model("broken", slow=0.05), Model("whole", slow=0.002)
    with started(broken, whole) as worker:
        go(main)


def test_a_fault_while_a_request_is_taken_fails_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        def broken(asked: Request) -> int:
            raise RuntimeError("a fault")

        model.engine.insert = broken  # type: ignore[method-assign]
        with pytest.raises(ApiError, match="the engine failed"):
            await worker.submit(cast(Any, model), request(1))
        assert len(await tokens_of(await worker.submit(cast(Any, model), request(2)))) == 20
        assert worker.state == "ok"

    model = Model()
    with started(model) as worker:
        go(main)


def test_a_fault_while_a_request_is_removed_fails_the_others_and_the_next_one_is_right() -> None:
    async def main() -> None:
        def broken(handle: int) -> None:
            model.slow = 0
            raise RuntimeError("a fault")

        leaves, hurt = [await worker.submit(cast(Any, model), request(k, 300)) for k in range(2)]
        model.engine.remove = broken  # type: ignore[method-assign]
        leaves.cancel()
        with pytest.raises(ApiError, match="the engine failed"):
            await tokens_of(hurt)
        assert await tokens_of(await worker.submit(cast(Any, model), request(2))) == alone(model, request(2))
        assert (worker.state, model.engines) == ("ok", 2)

    model = Model(slow=0.05)
    with started(model) as worker:
        go(main)


def test_faults_in_a_row_end_the_worker_but_not_with_a_finished_request_between() -> None:
    async def fault() -> None:
        await worker.call(lambda: break_next_step(model))
        with pytest.raises(ApiError):
            await tokens_of(await worker.submit(cast(Any, model), request(1)))

    async def main() -> None:
        for _ in range(module.MOST_FAULTS):
            await fault()
            await fault()
            assert len(await tokens_of(await worker.submit(cast(Any, model), request(2)))) == 20
        assert worker.state == "ok"
        for _ in range(module.MOST_FAULTS):
            await fault()
        await until(lambda: worker.state == "failed")
        with pytest.raises(ApiError) as refused:
            await worker.submit(cast(Any, model), request(3))
        assert refused.value.status == 503
        with pytest.raises(ApiError):
            await worker.call(lambda: 1)

    model = Model()
    with started(model) as worker:
        go(main)


def test_a_thread_that_dies_ends_every_request_and_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        jobs = [await worker.submit(cast(Any, model), request(k, 400)) for k in range(20)]

        def die(*_: Any) -> None:
            raise SystemExit

        monkeypatch.setattr(worker, "_send", die)
        for job in jobs:
            with pytest.raises(ApiError):
                await tokens_of(job)
        assert worker.state == "failed"
        assert not worker._thread.is_alive()

    model = Model(slow=0.02)
    with started(model) as worker:
        go(main)


def test_a_step_that_never_returns_is_seen() -> None:
    async def main() -> None:
        job = await worker.submit(cast(Any, model), request(1, 400))
        await worker.call(lambda: setattr(model.engine, "step", lambda: release.wait() and []))
        with pytest.raises(ApiError, match="does not answer"):
            await tokens_of(job)
        assert worker.state == "failed"

    model, release = Model(slow=0.002), threading.Event()
    with started(model, step_seconds=3) as worker:
        try:
            go(main)
            worker.stop()  # returns, so that the process can end
        finally:
            release.set()


def test_an_idle_worker_has_not_failed() -> None:
    with started(Model(), step_seconds=0.1) as worker:
        time.sleep(0.5)
        assert worker.state == "ok"


# -- the thread for others, and the end -------------------------------------------------------------------------------


def test_functions_of_others_run_between_two_steps_and_may_fail() -> None:
    async def main() -> None:
        assert await worker.call(threading.current_thread) is worker._thread
        with pytest.raises(ZeroDivisionError):
            await worker.call(lambda: 1 // 0)
        with pytest.raises(UserError, match="no"):
            await worker.call(lambda: (_ for _ in ()).throw(UserError("no")))
        assert worker.state == "ok"

    with started(Model()) as worker:
        go(main)


def test_functions_of_others_do_not_hold_up_the_steps() -> None:
    """One is called between two steps, however many wait."""

    async def compute() -> None:
        while True:
            await worker.call(lambda: order.append("call"))

    def noted_step() -> Any:
        order.append("step")
        return step()

    async def main() -> None:
        others = [asyncio.create_task(compute()) for _ in range(45)]
        await until(lambda: "call" in order)
        job = await worker.submit(cast(Any, model), request(1, 50))
        assert await tokens_of(job) == alone(model, request(1, 50))
        for other in others:
            other.cancel()
        await asyncio.wait(others)

    model, order = Model(slow=0.005), list[str]()
    step = model.engine.step
    model.engine.step = noted_step  # type: ignore[method-assign]
    with started(model) as worker:
        go(main)
    steps = [place for place, what in enumerate(order) if what == "step"]
    between = [after - before - 1 for before, after in itertools.pairwise(steps)]
    assert len(steps) == 50
    assert max(between) == 1
    assert sum(between) >= 40


def test_a_call_that_is_given_up_before_it_begins_never_does() -> None:
    async def main() -> None:
        release, ran = threading.Event(), list[int]()
        first = asyncio.create_task(worker.call(release.wait))
        others = [asyncio.create_task(worker.call(partial(ran.append, number))) for number in range(3)]
        await asyncio.sleep(0.05)
        others[1].cancel()
        await asyncio.sleep(0.05)
        release.set()
        await asyncio.wait([first, *others])
        assert ran == [0, 2]

    with started(Model()) as worker:
        go(main)


def test_tasks_are_in_the_limits_of_jobs() -> None:
    async def task(seconds: float = 30) -> None:
        async with worker.task():
            await asyncio.sleep(seconds)

    async def refusal(of: Awaitable[None]) -> int:
        with pytest.raises(ApiError) as refused:
            await of
        return refused.value.status

    async def main() -> None:
        tasks = [asyncio.create_task(task()) for _ in range(3)]
        await asyncio.sleep(0)
        assert await refusal(task()) == 429
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        await task(0)
        for one in tasks[1:]:
            assert await refusal(one) == 504
        worker.request_seconds = 600
        stays = [asyncio.create_task(task(600)) for _ in range(2)]
        await asyncio.sleep(0)
        draining = asyncio.create_task(worker.drain(0.3))
        await asyncio.sleep(0)
        assert await refusal(task()) == 503
        for one in stays:
            assert await refusal(one) == 503
        await draining

    async def drained_before_its_time() -> None:
        ends = asyncio.create_task(task(0.1))
        await asyncio.sleep(0)
        draining = asyncio.create_task(worker.drain(600))
        await ends
        await draining

    with started(Model(), max_queue=2, request_seconds=0.8) as worker:
        go(main)
    with started(Model()) as worker:
        go(drained_before_its_time)


def test_the_end_while_a_task_whose_time_is_over_cleans_up() -> None:
    async def late() -> None:
        async with worker.task():
            try:
                await asyncio.sleep(5)
            finally:
                await asyncio.sleep(0.5)

    async def main() -> None:
        task = asyncio.create_task(late())
        await asyncio.sleep(0.2)
        await worker.drain(0.1)
        with pytest.raises(ApiError) as refused:
            await task
        assert refused.value.status == 504

    with started(Model(), request_seconds=0.1) as worker:
        go(main)


def test_draining_finishes_what_runs_refuses_what_comes_and_ends_the_rest() -> None:
    async def main(seconds: float) -> list[Any]:
        jobs = [await worker.submit(cast(Any, model), request(k, 40)) for k in range(2)]
        drained = asyncio.create_task(worker.drain(seconds))
        await asyncio.sleep(0.01)
        assert worker.state == "draining"
        with pytest.raises(ApiError, match="shutting down"):
            await worker.submit(cast(Any, model), request(3))
        ends = await asyncio.gather(*map(tokens_of, jobs), return_exceptions=True)
        await drained
        return ends

    model = Model(slow=0.01)
    with started(model) as worker:
        assert go(lambda: main(600)) == [alone(model, request(k, 40)) for k in range(2)]
    model.slow = 0.2  # 8 seconds for each
    with started(model) as worker:
        ends = go(lambda: main(0.1))
        assert [(type(end), end.status) for end in ends] == [(ApiError, 503)] * 2
        assert not model.engine.is_busy


def test_a_closed_event_loop_leaves_no_rows_behind() -> None:
    model = Model(slow=0.005)
    with started(model) as worker:
        go(lambda: worker.submit(cast(Any, model), request(1, 400)))  # the loop is closed with it
        deadline = time.monotonic() + 120
        while model.engine.is_busy or worker._open:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert worker.state == "ok"


def test_nothing_is_kept_of_requests_that_ended() -> None:
    async def some(count: int) -> None:
        for start in range(0, count, 100):
            jobs = await asyncio.gather(*(worker.submit(cast(Any, model), request(start + k, 3)) for k in range(100)))
            for number, job in enumerate(jobs):
                if number % 5 == 0:
                    job.cancel()
            await asyncio.gather(*map(tokens_of, jobs))

    def blocks() -> int:
        """Pieces of memory that Python's objects have."""
        gc.collect()
        return sys.getallocatedblocks()

    model = Model()
    with started(model) as worker:
        go(lambda: some(500))
        before = blocks()
        go(lambda: some(1_000))
        assert blocks() - before < 500  # not one for each
        assert not worker._open
        assert not worker._running
