"""The load client: its figures from records with known times, its reading of replies, and all of it over a socket."""

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from actorserve.http.openai_types import OPENAI_REFUSED
from actorserve.perf import serve
from actorserve.perf.figures import peak_concurrency
from actorserve.perf.stream_client import Client, Record, Reply

DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": piece, "finish_reason": finish}])


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])


def native(so_far: str, tokens: int, finish: Any = None) -> bytes:
    meta = {"prompt_tokens": 7, "completion_tokens": tokens, "cached_tokens": 3, "finish_reason": finish}
    return event(text=so_far, output_ids=[1] * tokens, meta_info=meta)


def usage(prompt: int, completion: int, cached: int = 0) -> bytes:
    details = {"cached_tokens": cached}
    return event(
        choices=[],
        usage={"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details},
    )


COMPLETION = [text("a"), text("b c"), text("", "length"), usage(9, 4, 2), DONE]
CHAT = [delta(role="assistant", content=""), delta(content="a"), delta(content=""), delta("stop"), usage(9, 4), DONE]
NATIVE = [native("a", 1), native("a b", 3), native("a b", 3, {"type": "length", "length": 3}), DONE]


def read(frames: list[bytes]) -> Record:
    """Feed one frame a second, the first at time 10."""
    record = Record(0)
    reply = Reply(record)
    for i, frame in enumerate(frames):
        reply.feed(frame, 10.0 + i)
    reply.close()
    return record


# ------------------------------------------------------------------ reading replies on a fixed schedule


def test_completion_reply():
    record = read(COMPLETION)
    assert record.error is None
    assert record.times == [10.0, 11.0]
    assert record.end == 12.0  # the finish, not the usage and [DONE] after it
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (9, 4, 2)


def test_chat_reply_does_not_take_the_role_for_a_token():
    record = read(CHAT)
    assert record.error is None
    assert record.times == [11.0]
    assert record.end == 13.0


def test_native_reply_counts_by_its_cumulative_tokens():
    record = read(NATIVE)
    assert record.error is None
    assert record.times == [10.0, 11.0]
    assert record.end == 12.0
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (7, 3, 3)


def test_reasoning_and_tool_calls_are_output():
    assert read([delta(reasoning_content="hm"), *CHAT]).times == [10.0, 12.0]
    assert read([delta(tool_calls=[{"index": 0}]), *CHAT]).times == [10.0, 12.0]


def test_invisible_output_is_timed_by_its_end():
    record = read([text("", "length"), usage(9, 4), DONE])
    assert record.error is None
    assert record.times == [10.0]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([COMPLETION, CHAT, NATIVE]), st.booleans(), st.lists(st.integers(0, 900), max_size=8))
def test_any_split_of_the_bytes_reads_the_same(frames, crlf, cuts):
    body = b": comment\n\nid: 4\n" + b"".join(frames)
    if crlf:
        body = body.replace(b"\n", b"\r\n")
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    record, whole = Record(0), Record(0)
    reply = Reply(record)
    for start, end in itertools.pairwise(edges):
        reply.feed(body[start:end], 1.0)
    reply.close()
    other = Reply(whole)
    other.feed(body, 1.0)
    other.close()
    assert record == whole
    assert record.error is None


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        (COMPLETION[:-1], "without [DONE]"),
        ([*COMPLETION, DONE], "after [DONE]"),
        ([*COMPLETION, text("x")], "after [DONE]"),
        ([text("a"), event(error={"message": "boom"}), DONE], "boom"),
        ([text("a"), b"event: error\ndata: {}\n\n", DONE], "error event"),
        ([text("a"), b"data: {broken\n\n", DONE], "bad event"),
        ([text("a"), usage(1, 1), DONE], "no finish_reason"),
        ([text("a", "stop"), DONE], "no count"),
        ([text("a", "stop"), usage(1, 0), DONE], "no count"),
        ([*COMPLETION, b"data: {"], "within a line"),
        ([], "without [DONE]"),
    ],
)
def test_what_is_wrong_is_said(frames, complaint):
    assert complaint in (read(frames).error or "")


# ------------------------------------------------------------------ the figures


def record(index: int, start: float, times: list[float], tokens: int, **fields: Any) -> Record:
    return Record(index, start=start, times=times, end=times[-1], prompt_tokens=10, completion_tokens=tokens, **fields)


def test_figures_of_known_times():
    """Two requests, worked out by hand: 5 tokens in 3 events, and 2 tokens in 2 events."""
    figures = serve.summarize(
        [
            record(0, 100.0, [100.1, 100.2, 100.5], 5, wanted_tokens=5, cached_tokens=4),
            record(1, 101.0, [101.3, 101.4], 2, wanted_tokens=3),
        ],
        {"ttft": 200.0, "tpot": 150.0},
    )
    expected = {
        "completed": 2,
        "failed": 0,
        "duration": 1.4,
        "total_input_tokens": 20,
        "total_output_tokens": 7,
        "total_cached_tokens": 4,
        "request_throughput": 2 / 1.4,
        "output_throughput": 7 / 1.4,
        "total_token_throughput": 27 / 1.4,
        "max_concurrent_requests": 1,
        "concurrency": (0.5 + 0.4) / 1.4,
        "tokens_per_event": 7 / 5,
        "short_outputs": 1,
        "mean_ttft_ms": 200.0,
        "median_ttft_ms": 200.0,
        "std_ttft_ms": 100.0,
        "p50_ttft_ms": 200.0,
        "p90_ttft_ms": 280.0,
        "p99_ttft_ms": 298.0,
        "mean_tpot_ms": 100.0,  # 400 / 4 and 100 / 1
        "mean_itl_ms": (100 + 300 + 100) / 3,
        "p99_itl_ms": 296.0,
        "mean_e2el_ms": 450.0,
        "request_goodput": 1 / 1.4,  # the second one's first token is late
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["errors"] == []


def test_failed_requests_count_in_no_latency():
    figures = serve.summarize(
        [record(0, 0.0, [1.0, 2.0], 2), record(1, 0.0, [0.1], 1, error="HTTP 503"), record(2, 0.0, [9.0], 1, error="x")]
    )
    assert (figures["completed"], figures["failed"]) == (1, 2)
    assert figures["errors"] == ["HTTP 503", "x"]
    assert figures["mean_ttft_ms"] == 1000
    assert figures["total_output_tokens"] == 2
    assert figures["duration"] == 9.0


def test_one_token_has_no_tpot():
    figures = serve.summarize([record(0, 0.0, [1.0], 1)], {"tpot": 1.0})
    assert "mean_tpot_ms" not in figures
    assert "mean_itl_ms" not in figures
    assert figures["request_goodput"] == 1.0
    serve.report(figures | {"client_cpu_share": 0.9})


def test_peak_concurrency():
    spans = [(0, 4), (1, 3), (2, 5), (3, 6), (5, 7)]
    records = [record(i, float(a), [float(b)], 1) for i, (a, b) in enumerate(spans)]
    assert peak_concurrency(records) == 3  # at 2: the first three; at 3 one leaves as another comes


# ------------------------------------------------------------------ the workload


def test_prompts_share_what_they_should_and_nothing_else():
    args = serve.parse(["--num-prompts", "20", "--shared-prefix-len", "30", "--random-input-len", "10"])
    prompts = [prompt.split() for prompt in serve.make_prompts(args)]
    assert {len(prompt) for prompt in prompts} == {40}
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 20
    assert [prompt.split() for prompt in serve.make_prompts(args)] == prompts


def test_prompts_as_ids():
    args = serve.parse(["--vocab-size", "500", "--num-prompts", "9", "--random-input-len", "40"])
    ids = serve.make_prompts(args)
    assert all(250 <= i < 500 for prompt in ids for i in prompt)
    body = json.loads(serve.make_body(ids[0], 5, args, "m"))
    assert body["prompt"] == ids[0]
    assert not set(body) & set(OPENAI_REFUSED)  # our own server serves it
    asking = serve.parse(["--vocab-size", "500", "--return-token-ids"])
    assert json.loads(serve.make_body(ids[0], 5, asking, "m"))["return_token_ids"] is True
    args = serve.parse(["--vocab-size", "500", "--api", "generate"])
    assert json.loads(serve.make_body(ids[0], 5, args, ""))["input_ids"] == ids[0]
    with pytest.raises(SystemExit):
        serve.make_prompts(serve.parse(["--vocab-size", "500", "--api", "chat"]))


def test_lengths_in_the_range():
    args = serve.parse(["--random-range-ratio", "0.5", "--random-input-len", "10", "--num-prompts", "100"])
    assert {len(prompt.split()) for prompt in serve.make_prompts(args)} == set(range(5, 11))


def test_poisson_arrivals():
    starts = serve.arrivals(4000, 20.0, 1)
    gaps = np.diff(starts)
    assert starts[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.1)  # exponential: deviation = mean
    assert serve.arrivals(3, None, 1) == [0.0] * 3


def test_processes_share_the_job():
    args = serve.parse(["--num-prompts", "10", "--max-concurrency", "7", "--request-rate", "5"])
    job = serve.plan(args, "m")
    parts = serve.split(job, 3)
    assert [part.concurrency for part in parts] == [3, 2, 2]
    assert sorted(i for part in parts for i in part.indices) == list(range(10))
    assert parts[1].bodies == job.bodies[1::3]
    assert parts[1].offsets == job.offsets[1::3]
    assert len(serve.split(job, 100)) == 7


# ------------------------------------------------------------------ over a socket


class FakeServer:
    """A server on uvicorn in a thread that answers as the request's `model` or text says."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.running = self.peak = 0
        routes = [
            Route(path, self.answer, methods=["POST"])
            for path in ("/v1/completions", "/v1/chat/completions", "/generate")
        ]
        routes.append(Route("/v1/models", lambda _: JSONResponse({"data": [{"id": "fake"}]})))
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> "FakeServer":
        self.thread.start()
        while not self.server.started:
            threading.Event().wait(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if body.get("model") == "busy":
            return JSONResponse({"error": {"message": "too many requests"}}, status_code=429)
        if body.get("model") == "plain":
            return JSONResponse({"choices": [{"text": "not a stream"}]})
        return StreamingResponse(self.frames(request.url.path, body), media_type="text/event-stream")

    async def frames(self, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.running += 1
        self.peak = max(self.peak, self.running)
        tokens = body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
        for i in range(tokens):
            await asyncio.sleep(0)
            if path == "/generate":
                yield native("x" * (i + 1), i + 1, {"type": "length"} if i + 1 == tokens else None)
            else:
                yield text("x") if path == "/v1/completions" else delta(content="x")
            if body.get("model") == "cut":
                self.running -= 1
                raise RuntimeError("the server dies within a stream")
        if path != "/generate":
            yield text("", "length") if path == "/v1/completions" else delta("length")
            yield usage(5, tokens)
        self.running -= 1
        if body.get("model") != "endless":
            yield DONE


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def flags(server: FakeServer, *more: str) -> Any:
    short = ["--num-prompts", "6", "--random-input-len", "4", "--random-output-len", "5"]
    return serve.parse(["--base-url", server.url, *short, *more])


@pytest.mark.parametrize("api", ["completions", "chat", "generate"])
def test_every_protocol_over_a_socket(fake, api):
    fake.bodies.clear()
    figures = serve.run(flags(fake, "--api", api, "--max-concurrency", "2", "--goodput", "e2el:60000"))
    assert (figures["completed"], figures["failed"]) == (6, 0), figures["errors"]
    assert figures["total_output_tokens"] == 30
    assert figures["total_input_tokens"] == 6 * (7 if api == "generate" else 5)
    assert figures["tokens_per_event"] == 1.0
    assert figures["short_outputs"] == 0
    assert figures["max_concurrent_requests"] <= 2
    assert figures["request_goodput"] == figures["request_throughput"]
    assert len(fake.bodies) == 7  # one to warm up
    assert all(body["stream"] for body in fake.bodies)
    assert api == "generate" or fake.bodies[0]["model"] == "fake"


def test_open_loop(fake):
    figures = serve.run(flags(fake, "--request-rate", "500"))
    assert figures["completed"] == 6
    assert figures["max_start_lag_ms"] >= 0


def test_two_client_processes(fake, monkeypatch):
    """Their results are larger than a pipe holds, and come through an unbuffered stdout too."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    fake.bodies.clear()
    two = ["--client-processes", "2", "--max-concurrency", "4", "--warmup-requests", "0"]
    figures = serve.run(flags(fake, *two, "--num-prompts", "30", "--random-output-len", "400"))
    assert (figures["completed"], figures["failed"]) == (30, 0), figures["errors"]
    assert figures["total_output_tokens"] == 30 * 400
    assert len({body["prompt"] for body in fake.bodies}) == 30


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("busy", 'HTTP 429: {"error":{"message":"too many requests"}}'),
        ("plain", "not a stream"),
        ("endless", "without [DONE]"),
        ("cut", "connection lost"),
    ],
)
def test_bad_replies_fail_loudly(fake, model, complaint, monkeypatch, capsys, tmp_path):
    file = tmp_path / "out.json"
    command = ["serve", "--base-url", fake.url, "--model", model, "--num-prompts", "2", "--warmup-requests", "0"]
    monkeypatch.setattr("sys.argv", [*command, "--json", str(file), "--api-key", "secret"])
    with pytest.raises(SystemExit) as ended:
        serve.main()
    assert ended.value.code == 1
    assert complaint in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert (written["completed"], written["failed"]) == (0, 2)
    assert "secret" not in file.read_text()


def test_no_server_is_one_line():
    for more in ([], ["--model", "m"]):
        with pytest.raises(SystemExit, match=r"cannot|warm-up"):
            serve.run(serve.parse(["--base-url", "http://127.0.0.1:9", *more]))


def test_a_reply_that_never_ends_times_out_and_its_connection_is_closed():
    async def scenario() -> list[Record]:
        answers = []

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answers.append(asyncio.current_task())
            await reader.read()  # until the client closes
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/generate")
        records = [Record(0), Record(1)]
        for record in records:
            await client.stream(b"{}", record, timeout=0.05)
        async with asyncio.timeout(20):
            await asyncio.gather(*answers)
        assert len(answers) == 2
        server.close()
        return records

    for record in asyncio.run(scenario()):
        assert "no end of the reply" in (record.error or "")


def test_an_idle_connection_that_the_server_closed_is_replaced():
    """The server closes each connection after one reply without having said so."""

    async def scenario() -> list[Record]:
        body = b"".join(COMPLETION)
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)

        answers = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answers.append(asyncio.current_task())
            await reader.readuntil(b"{}")
            writer.write(head + body)
            await reader.read(1)  # the next request has begun to arrive: drop it
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/generate")
        records = [Record(0), Record(1), Record(2)]
        for record in records:
            await client.stream(b"{}", record, timeout=10)
        client.close()
        await asyncio.gather(*answers)
        server.close()
        return records

    assert [record.error for record in asyncio.run(scenario())] == [None] * 3
