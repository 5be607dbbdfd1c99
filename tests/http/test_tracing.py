"""Traces: what a collector gets for a request, over OTLP and from memory."""

import asyncio
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from actorserve.errors import StartupError
from actorserve.http.tracing import Tracer, traces_address

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

pytestmark = pytest.mark.anyio
USER = [{"role": "user", "content": "Hi"}]
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
async def traced(rig):
    """A rig whose spans stay here."""
    exporter = InMemorySpanExporter()
    tracer = Tracer("http://localhost:4318", exporter)
    object.__setattr__(rig.front.service, "tracer", tracer)
    yield rig, exporter, tracer
    await tracer.close()


async def spans_of(tracer, exporter):
    await asyncio.gather(*tracer._tasks)
    tracer._provider.force_flush()
    return exporter.get_finished_spans()


async def test_a_request_is_a_span_with_its_stages(traced):
    rig, exporter, tracer = traced
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "req-1"}
    reply = (await rig.http.post("/v1/chat/completions", json={"messages": USER, "n": 2}, headers=headers)).json()
    spans = await spans_of(tracer, exporter)
    (root,) = [span for span in spans if span.name == "POST /v1/chat/completions"]
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, "b7ad6b7169203331")
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["actorserve.request_id"] == "req-1"
    assert (root.attributes["gen_ai.usage.input_tokens"], root.attributes["gen_ai.usage.output_tokens"]) == (7, 8)
    children = [span for span in spans if span is not root]
    assert sorted(span.name for span in children) == ["prefill", "prefill", "queue", "queue", "tokenize", "tokenize"]
    for span in children:
        assert span.parent.span_id == root.context.span_id and span.end_time - span.start_time == 1_000_000
        assert span.attributes["gen_ai.response.id"] == reply["id"]


async def test_a_finished_one_has_its_windows(traced):
    rig, exporter, tracer = traced
    known = rig.text.timeline

    def finished(g, rid):
        view = known(g, rid)
        return type(view)(*(getattr(view, n) or g.arrival_ns + 20_000_000 for n in view.__struct_fields__))

    rig.text.timeline = finished
    await rig.http.post("/v1/completions", json={"prompt": "a", "stream": True})
    (decode,) = [span for span in await spans_of(tracer, exporter) if span.name == "decode"]
    (event,) = decode.events  # the second window is on its way
    assert (event.name, event.attributes["k"], event.attributes["rows"]) == ("window", 1, 3)
    assert decode.end_time - decode.start_time == 14_000_000


async def test_what_is_not_sampled_is_not_asked_for(traced):
    rig, exporter, tracer = traced
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-00"}
    await rig.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert await spans_of(tracer, exporter) == ()
    assert not [m for m in rig.text.got if type(m).__name__ == "AskTimelines"]


async def test_refused_and_looked_at(traced):
    rig, exporter, tracer = traced
    await rig.http.get("/v1/models")
    await rig.http.post("/v1/completions", json={"prompt": 5}, headers={"traceparent": "nonsense"})
    (span,) = await spans_of(tracer, exporter)
    assert (span.name, span.attributes["http.response.status_code"], span.parent) == ("POST /v1/completions", 400, None)


async def test_a_collector_gets_them(fakes):
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=collector.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        async with fakes.open_rig(otlp_endpoint=endpoint) as rig:
            await rig.http.post("/v1/completions", json={"prompt": "a"})
    finally:
        collector.shutdown()
        collector.server_close()
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    ((path, body),) = got
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {span.name for scope in resource.scope_spans for span in scope.spans} > {"POST /v1/completions", "prefill"}
    names = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert names["service.name"] == "actorserve"


def test_addresses():
    assert traces_address("http://a:4318") == traces_address("http://a:4318/") == "http://a:4318/v1/traces"
    assert traces_address("https://a/otlp/traces") == "https://a/otlp/traces"
    for wrong in ("a:4318", "grpc://a", "http://", ""):
        with pytest.raises(StartupError, match="otlp-endpoint"):
            traces_address(wrong)
