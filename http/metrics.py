"""Metrics of one front in Prometheus' text format: its own requests and latencies, and the schedulers' last Stats.

The front owns one; handlers count replies, the client reports choices that ended. Invariant: the set of time series
is fixed (routes come from the route table, never from a client's path).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from ..actors.messages import Stats
from ..actors.stream import Choice

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4.encode()
_SECONDS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 180)
_TOKEN_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)

_GAUGES: Final = (
    ("waiting_requests", "Requests in the scheduler's queue", "waiting"),
    ("running_requests", "Requests in the batch", "running"),
    ("grammar_waiting_requests", "Of these, the ones whose grammar is being compiled", "grammar_waiting"),
    ("kv_pages", "KV pages there are", "pages_total"),
    ("kv_pages_free", "KV pages that nobody uses", "pages_free"),
    ("kv_pages_tree", "KV pages of the prefix cache", "pages_tree"),
    ("kv_pages_running", "KV pages of running requests alone", "pages_running"),
)
_COUNTERS: Final = (
    ("prompt_tokens", "Prompt tokens of admitted requests", "prompt_tokens"),
    ("cached_tokens", "Prompt tokens taken from the prefix cache", "cached_tokens"),
    ("prefilled_tokens", "Tokens computed in prefill, also again after a retraction", "prefilled_tokens"),
    ("generated_tokens", "Tokens generated", "generated_tokens"),
    ("forced_tokens", "Of these, the ones that grammars forced and no step had to draw", "forced_tokens"),
    ("jumps", "Runs in which forced tokens came", "jumps"),
    ("grammar_hits", "Requests whose grammar was compiled before", "grammar_hits"),
    ("grammars_compiled", "Grammars compiled", "grammars_compiled"),
    ("grammars_failed", "Grammars that were refused or could not be compiled", "grammars_failed"),
    ("grammar_compile_seconds", "Time that compiling took, also where it failed", "grammar_seconds"),
    ("retractions", "Requests put back into the queue for want of pages", "retractions"),
    ("windows", "Windows scheduled", "windows"),
    ("steps", "Steps run by the executor", "steps"),
)


class StatsCollector(Collector):
    """The schedulers' Stats as metrics; `reports` are the last ones received. Of several replicas each has its own
    series, with the label dp_rank."""

    def __init__(self, replicas: int) -> None:
        self.reports: Sequence[Stats] = ()
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        """Yield the present values; only `actorserve_executor_up` (0) of replicas without a report."""
        up = {stats.dp_rank: float(stats.executor_up) for stats in self.reports}
        ranks = range(self._replicas)
        yield self._gauge("executor_up", "1 while the executor is up", {rank: up.get(rank, 0.0) for rank in ranks})
        if not self.reports:
            return
        for name, text, field in _GAUGES:
            yield self._gauge(name, text, {stats.dp_rank: getattr(stats, field) for stats in self.reports})
        for name, text, field in _COUNTERS:
            counter = CounterMetricFamily(f"actorserve_{name}", text, labels=self._labels)
            for stats in self.reports:
                counter.add_metric(self._values(stats.dp_rank), getattr(stats, field))
            yield counter
        steps = {stats.dp_rank: stats.step_us / 1e6 for stats in self.reports}
        yield self._gauge("step_seconds", "Smoothed time of a step", steps)

    def _gauge(self, name: str, text: str, values: Mapping[int, float]) -> GaugeMetricFamily:
        """`values`: by rank."""
        gauge = GaugeMetricFamily(f"actorserve_{name}", text, labels=self._labels)
        for rank, value in values.items():
            gauge.add_metric(self._values(rank), value)
        return gauge

    @property
    def _labels(self) -> list[str]:
        return ["dp_rank"] if self._replicas > 1 else []

    def _values(self, rank: int) -> list[str]:
        return [str(rank)] if self._replicas > 1 else []


class Metrics:
    """All metrics of one front; where there are several of them, `render` shows the sums over all."""

    def __init__(self, replicas: int = 1) -> None:
        shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ  # serve.py's; the library writes files there
        self.registry = CollectorRegistry()
        self._own = None if shared else self.registry
        if shared:
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
        self._stats = StatsCollector(replicas)
        self.registry.register(self._stats)
        self._requests = Counter(
            "actorserve_http_requests", "HTTP requests that were answered", ["route", "status"], registry=self._own
        )
        self._ttft = self._histogram("time_to_first_token", "From arrival to the first token", _SECONDS)
        self._tpot = self._histogram("time_per_output_token", "Mean time of a token after the first", _TOKEN_SECONDS)
        self._e2e = self._histogram("request", "From arrival to the last token, or the vector", _SECONDS)

    def count(self, route: str, status: int) -> None:
        """Count a reply; 499: the client left before it."""
        self._requests.labels(route, str(status)).inc()

    def observe(self, choice: Choice) -> None:
        """Take the latencies of a choice that came to its end."""
        if choice.last is not None and choice.last.vector:
            self._e2e.observe((choice.last_ns - choice.arrival_ns) / 1e9)
        if not choice.first_ns or choice.last is None:
            return
        self._ttft.observe((choice.first_ns - choice.arrival_ns) / 1e9)
        self._e2e.observe((choice.last_ns - choice.arrival_ns) / 1e9)
        if choice.last.completion_tokens > 1:
            self._tpot.observe((choice.last_ns - choice.first_ns) / 1e9 / (choice.last.completion_tokens - 1))

    def render(self, reports: Sequence[Stats]) -> bytes:
        """Return the page of /metrics; `reports`: the replicas' last ones."""
        self._stats.reports = reports
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"actorserve_{name}_seconds", text, buckets=buckets, registry=self._own)
