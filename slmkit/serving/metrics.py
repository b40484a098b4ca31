"""What `/metrics` shows, for Prometheus."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

import prometheus_client as prometheus
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from slmkit.generation.engine import Event
    from slmkit.serving.models import ServedModel

BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # seconds
TO_FIRST_TOKEN = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Gaps(Collector):
    """A histogram of the times between tokens for each model. prometheus_client's own takes ten times as long for a
    value, which at thousands of tokens a second was a tenth of the engines' thread.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.counts = {model.name: [0] * (len(BETWEEN_TOKENS) + 1) for model in models}
        self.sums = {model.name: 0.0 for model in models}

    def add(self, model: str, seconds: float) -> None:
        self.counts[model][bisect.bisect_left(BETWEEN_TOKENS, seconds)] += 1
        self.sums[model] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        name, edges = "slm_time_between_tokens_seconds", [*map(str, map(float, BETWEEN_TOKENS)), "+Inf"]
        family = HistogramMetricFamily(name, "Between two tokens of a row.", labels=["model"])
        for model, counts in self.counts.items():
            family.add_metric([model], [*zip(edges, itertools.accumulate(counts))], self.sums[model])
        yield family


class Metrics:
    """What `/metrics` shows, in a registry of its own."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.registry = registry = prometheus.CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(f"slm_{name}", about, labels, registry=registry)

        def times(name: str, about: str, buckets: Sequence[float]) -> prometheus.Histogram:
            return prometheus.Histogram(f"slm_{name}_seconds", about, ["model"], registry=registry, buckets=buckets)

        self.requests = counter("requests", "Answered HTTP requests.", "route", "model", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read.", "model")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts taken from the prefix cache.", "model")
        self.generated_tokens = counter("generated_tokens", "New tokens.", "model")
        self.steps = counter("engine_steps", "Steps of the engine.", "model")
        self.faults = counter("engine_faults", "Steps that failed; the engine was made anew.", "model")
        self.first_token = times("time_to_first_token", "From the request to a row's first token.", TO_FIRST_TOKEN)
        self.between_tokens = Gaps(models)
        registry.register(self.between_tokens)
        running = prometheus.Gauge("slm_running_rows", "Rows in the engine's slots.", ["model"], registry=registry)
        waiting = prometheus.Gauge("slm_waiting_rows", "Rows without a slot.", ["model"], registry=registry)
        for model in models:
            running.labels(model.name).set_function(partial(attrgetter("engine.running_rows"), model))
            waiting.labels(model.name).set_function(partial(attrgetter("engine.waiting_rows"), model))

    def count_first(self, model: str, event: Event, prompt: int, seconds: float) -> None:
        """A row's first event, so long after its request came. `prompt`: its tokens."""
        self.first_token.labels(model).observe(seconds)
        self.cached_tokens.labels(model).inc(event.cached_tokens)
        self.prompt_tokens.labels(model).inc(prompt - event.cached_tokens)
