"""OpenTelemetry traces (--otlp-endpoint): a span a request, and below it what its timeline says of each continuation.

The front owns a Tracer; app.py tells it of every request that is over. The engine is asked for the timeline only then,
so that a request never waits for its trace. Invariant: a collector that is slow or gone costs traces, never a request;
a W3C `traceparent` that came with the request is the span's parent, and its sampling decision holds.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

from ..errors import StartupError
from .timelines import RequestTimeline, timeline_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from .service import Service

log = logging.getLogger("actorserve.http")

MOST_WAITING: Final = 512
"""Requests whose timelines are being asked for; beyond it spans go without."""
FLUSH_MS: Final = 3000
"""For what is not sent yet when the server stops."""
_NEEDS: Final = "--otlp-endpoint needs OpenTelemetry's SDK: pip install 'actorserve[otlp]'"


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that is over; times Unix ns. `names`: what it asked the engine for, by reply id."""

    method: str
    route: str
    headers: dict[str, str]
    began_ns: int
    ended_ns: int
    status: int
    request_id: str
    key: str | None
    names: tuple[str, ...]
    tokens: tuple[int, int]
    """Of prompts, and generated."""


class Tracer:
    """See the module's text. `exporter`: where spans go; default: by OTLP over HTTP to the endpoint."""

    def __init__(self, endpoint: str, exporter: "SpanExporter | None" = None) -> None:
        """Raises StartupError where the packages are missing, or `endpoint` is no address."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise StartupError(_NEEDS) from None
        address = traces_address(endpoint)
        self._provider = TracerProvider(resource=Resource.create({"service.name": "actorserve"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=address)))
        self._tracer = self._provider.get_tracer("actorserve")
        self._context = TraceContextTextMapPropagator()
        self._tasks: set[asyncio.Task[None]] = set()

    def finished(self, service: "Service", request: Finished) -> None:
        """Make the spans of a request, soon. Never waits, raises nothing."""
        task = asyncio.create_task(self._trace(service, request))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def close(self) -> None:
        """Send what is made, for a few seconds at most."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._provider.force_flush, FLUSH_MS)
        await asyncio.to_thread(self._provider.shutdown)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a trace was lost", exc_info=task.exception())

    async def _trace(self, service: "Service", request: Finished) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        parent = self._context.extract(request.headers)
        name, attributes = f"{request.method} {request.route}", _attributes(service, request)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=request.began_ns)
        if span.is_recording() and len(self._tasks) <= MOST_WAITING:
            for asked in request.names:
                for timeline in await timeline_of(service, asked):
                    self._children(span, asked, timeline)
        if request.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(request.ended_ns)

    def _children(self, span: Any, name: str, timeline: RequestTimeline) -> None:
        """What happened to one continuation, one thing after another."""
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(span)
        arrival = int(timeline.arrival * 1e9)
        stages = (
            ("tokenize", 0.0, timeline.tokenized),
            ("queue", timeline.queued, timeline.admitted),
            ("prefill", timeline.prefill_start, timeline.prefill_end),
            ("decode", timeline.first_token, timeline.finished),
        )
        common: dict[str, str | int] = {"gen_ai.response.id": name, "actorserve.choice": timeline.index}
        for stage, start, end in stages:
            if start is None or end is None:
                continue
            child = self._tracer.start_span(stage, inside, attributes=common, start_time=arrival + int(start * 1e9))
            if stage == "prefill":
                child.set_attribute("actorserve.prompt_tokens", timeline.prompt_tokens)
                child.set_attribute("actorserve.cached_tokens", timeline.cached_tokens)
            if stage == "decode":
                child.set_attribute("actorserve.retractions", timeline.retractions)
                for w in timeline.windows:
                    facts = {"window": w.window, "k": w.k, "rows": w.rows, "prompt_tokens": w.prompt_tokens}
                    if w.end is not None:
                        child.add_event("window", facts, arrival + int(w.end * 1e9))
            child.end(arrival + int(end * 1e9))


def traces_address(endpoint: str) -> str:
    """Return where traces are POSTed: /v1/traces, unless the endpoint has a path. Raises StartupError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StartupError(f"--otlp-endpoint {endpoint}: this is no address like http://localhost:4318")
    return urlunsplit(parts._replace(path="/v1/traces")) if parts.path in ("", "/") else endpoint


def request_headers(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the headers that say which trace a request belongs to."""
    wanted = (b"traceparent", b"tracestate")
    return {name.decode(): value.decode("latin-1") for name, value in headers if name in wanted}


def _attributes(service: "Service", request: Finished) -> dict[str, Any]:
    """By OpenTelemetry's conventions where there are any."""
    found = {
        "http.request.method": request.method,
        "http.route": request.route,
        "http.response.status_code": request.status,
        "gen_ai.request.model": service.model_name,
        "gen_ai.usage.input_tokens": request.tokens[0],
        "gen_ai.usage.output_tokens": request.tokens[1],
        "actorserve.request_id": request.request_id,
    }
    return found if request.key is None else found | {"actorserve.key": request.key}
