"""The edges of the HTTP front: bad bodies, unknown routes, overload, disconnects, dying peers, draining, metrics."""

import asyncio
import json
import socket
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from actorserve.actors.messages import Cancel, Chunks, Drain, Generate, Refused

pytestmark = pytest.mark.anyio
USER = [{"role": "user", "content": "Hi"}]
POSTS = ("/generate", "/v1/completions", "/v1/chat/completions")


def error_of(reply: httpx.Response) -> dict:
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


# ------------------------------------------------------------------ bodies


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"\xef\xbb\xbf{}",
     b"[" * 5000, b'{"x": ' + b"[" * 5000, b'{"text": "a"} trailing', b"{'text': 'a'}", b'{"temperature": NaN}'],
)  # fmt: skip
async def test_bad_json_is_400(rig, path, body):
    reply = await rig.http.post(path, content=body)
    assert (reply.status_code, error_of(reply)["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("path", POSTS)
async def test_too_large_is_413_declared_or_not(rig, path):
    big = b'{"text": "' + b"a" * 10_000 + b'"}'

    async def pieces():
        for start in range(0, len(big), 1000):
            yield big[start : start + 1000]

    for content in (big, pieces()):
        reply = await rig.http.post(path, content=content)
        assert (reply.status_code, error_of(reply)["code"]) == (413, "body_too_large")
    exact = await rig.http.post("/generate", content=b'{"text": "' + b"a" * (10_000 - 12) + b'"}')
    assert exact.status_code == 200


# ------------------------------------------------------------------ routes


async def test_unknown_routes_and_methods(rig):
    for method, path, status in (
        ("GET", "/nope", 404),
        ("POST", "/v1/chat", 404),
        ("POST", "/generate/", 404),
        ("GET", "/generate", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/completions", 405),
    ):
        reply = await rig.http.request(method, path)
        assert (reply.status_code, error_of(reply)["type"]) == (status, "invalid_request_error"), path
    assert "POST" in (await rig.http.get("/generate")).headers["allow"]


async def test_info_routes(rig):
    hint = await rig.http.get("/")
    assert hint.headers["content-type"].startswith("text/plain")
    assert f"{rig.base}/v1/chat/completions" in hint.text
    info = (await rig.http.get("/get_model_info")).json()
    assert (info["is_generation"], info["vocab_size"], info["context_length"]) == (True, 1000, 512)
    assert (await rig.http.head("/health")).status_code == 200
    assert "server" not in hint.headers


async def test_handler_bug_is_500_without_details(rig, monkeypatch):
    monkeypatch.setattr(type(rig.front.service), "check_model", lambda *_: 1 / 0)
    reply = await rig.http.post("/v1/completions", json={"prompt": "a"})
    assert (reply.status_code, error_of(reply)["type"]) == (500, "server_error")
    assert "division" not in reply.text


# ------------------------------------------------------------------ health


async def test_health_follows_the_engine(rig, fakes):
    assert (await rig.http.get("/health")).json() == {"status": "ok", "reason": None}
    rig.text.say(type(fakes.STATS)(*[0] * 13, 0.0, False))
    await rig.http.post("/generate", json={"text": "a"})  # behind it in the lane
    down = await rig.http.get("/health")
    assert (down.status_code, down.headers["retry-after"]) == (503, "1")
    assert "executor" in down.json()["reason"]
    rig.kill_text()
    while "text" not in (await rig.http.get("/ready")).json()["reason"]:
        continue


# ------------------------------------------------------------------ overload


async def test_overload_is_429_and_ends(rig):
    rig.text.script = lambda generate: []
    first = asyncio.create_task(rig.http.post("/generate", json={"text": ["a"] * 100, "sampling_params": {"n": 3}}))
    await rig.text.wait_for(Generate, 100)
    reply = await rig.http.post("/v1/completions", json={"prompt": "a"})
    assert (reply.status_code, error_of(reply)["type"]) == (429, "rate_limit_error")
    assert int(reply.headers["retry-after"]) >= 1
    rig.text.say(Refused(rig.text.generates[0].rid, 3, 500, "internal_error", "broken"))
    assert (await first).status_code == 500
    assert rig.front.client.table == {}
    never = await rig.http.post("/generate", json={"text": ["a"] * 301})
    assert (never.status_code, error_of(never)["code"]) == (400, "too_many")


# ------------------------------------------------------------------ refusals by the engine


@pytest.mark.parametrize("stream", [False, True])
async def test_refusal_keeps_status_code_and_field(rig, stream):
    rig.text.script = lambda g: [
        Refused(g.rid, g.n, 400, "context_length_exceeded", "max_new_tokens too big", "max_new_tokens")
    ]
    body = {"messages": USER, "stream": stream, "max_tokens": 4}
    reply = await rig.http.post("/v1/chat/completions", json=body)
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert error["message"] == "max_tokens too big"
    rig.text.script = lambda g: [Refused(g.rid, g.n, 503, "executor_crashed", "crashed")]
    reply = await rig.http.post("/generate", json={"text": "a", "stream": stream})
    assert (reply.status_code, error_of(reply)["code"], reply.headers["retry-after"]) == (503, "executor_crashed", "1")


async def test_one_refused_prompt_fails_the_batch_and_cancels_the_rest(rig):
    rig.text.script = lambda g: [Refused(g.rid, 1, 400, "bad", "no", "text")] if g.prompt.text == "b" else []
    reply = await rig.http.post("/generate", json={"text": ["a", "b", "c"]})
    assert reply.status_code == 400
    cancels = await rig.text.wait_for(Cancel, 2)
    assert [(c.rid, c.n) for c in cancels] == [(g.rid, 1) for g in rig.text.generates if g.prompt.text != "b"]


# ------------------------------------------------------------------ failures in mid-stream


async def test_text_dies_in_mid_stream(rig, fakes):
    """The reader sees nothing of it: the next one says the rest."""

    def script(generate):
        said = fakes.words(generate)
        if generate.resumed is None:
            return said[:2]
        assert [(r.rid, r.ids.cast("i").tolist(), r.chars) for r in generate.resumed] == [(generate.rid, [10, 11], 11)]
        return said[2:]

    rig.text.script = script
    async with openai.AsyncOpenAI(base_url=f"{rig.base}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="fake-model", messages=USER, stream=True)
        texts = []
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content or "")
            if "".join(texts) == "Hello wörld":
                rig.kill_text()
                assert (await rig.http.get("/ready")).status_code == 503
                rig.revive_text()
    assert "".join(texts) == "".join(fakes.WORDS)
    assert rig.front.client.table == {}


async def test_error_event_ends_a_stream_without_done(rig, fakes):
    rig.text.script = lambda g: [*fakes.words(g)[:1], Refused(g.rid, g.n, 500, "poison", "NaN")]
    reply = await rig.http.post("/generate", json={"text": "a", "stream": True})
    *_, last, end = reply.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "poison"
    assert (end, "[DONE]" in reply.text) == ("", False)


async def test_a_request_waits_for_the_next_text_actor(rig, fakes):
    rig.kill_text()
    waiting = asyncio.create_task(rig.http.post("/generate", json={"text": "a"}))
    await fakes.until(lambda: rig.front.client.table)
    assert rig.text.generates == []
    rig.revive_text()
    assert (await waiting).json()["text"] == "".join(fakes.WORDS)


async def test_what_two_text_actors_die_of_is_refused(rig):
    rig.text.script = lambda generate: []
    waiting = asyncio.create_task(rig.http.post("/generate", json={"text": "a"}))
    for count in range(1, 3):
        asked = await rig.text.wait_for(Generate, count)
        rig.kill_text(asked[0].rid)
        rig.revive_text()
    reply = await waiting
    assert (reply.status_code, error_of(reply)["code"], reply.headers["retry-after"]) == (503, "text_crashed", "1")


# ------------------------------------------------------------------ disconnects


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", POSTS)
async def test_disconnect_cancels(rig, fakes, stream, path):
    rig.text.script = lambda g: fakes.words(g)[:2]
    body = json.dumps({"text": "a", "prompt": "a", "messages": USER, "n": 2, "stream": stream}).encode()
    port = rig.base.rpartition(":")[2]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    (generate,) = await rig.text.wait_for(Generate)
    if stream:
        await reader.readuntil(b"data: ")
    writer.close()
    (cancel,) = await rig.text.wait_for(Cancel)
    assert (cancel.rid, cancel.n) == (generate.rid, generate.n)
    assert rig.front.client.table == {}
    page = await rig.http.get("/metrics")
    assert f'route="{path}",status="499"' in page.text


async def test_disconnect_while_sending_the_body(rig):
    port = rig.base.rpartition(":")[2]
    _, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    await writer.drain()
    writer.close()
    while 'status="499"' not in (await rig.http.get("/metrics")).text:
        continue
    assert rig.text.got == []


async def test_a_finished_request_is_not_cancelled(rig):
    for stream in (False, True):
        await rig.http.post("/generate", json={"text": "a", "stream": stream})
    await rig.http.get("/health")
    assert [type(m) for m in rig.text.got] == [Generate, Generate]


@pytest.mark.parametrize("apart", [False, True])
async def test_a_wish_for_another_protocol_is_passed_over(rig, apart):
    """As Java's HTTP client has it at its first request: the body counts, and so does what is sent behind it."""
    body = b'{"text": "a"}'
    more = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    asked = f"POST /generate HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body
    chunked = f"POST /generate HTTP/1.1\r\nHost: x\r\n{more}Transfer-Encoding: chunked\r\n\r\n".encode()
    asked += chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    asked += f"GET /health HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode()
    asked += b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", int(rig.base.rpartition(":")[2]))
    for part in [asked[i : i + 1] for i in range(len(asked))] if apart else [asked]:
        writer.write(part)
        await asyncio.sleep(0)
    said = await reader.read()
    writer.close()
    assert said.count(b"HTTP/1.1 200 OK") == 4 and said.count(b'"Hello w\xc3\xb6rld and moon"') == 2
    assert [generate.prompt.text for generate in rig.text.generates] == ["a", "a"]


# ------------------------------------------------------------------ slow readers


async def test_slow_reader_gets_joined_chunks(rig, fakes):
    """A client that does not read blocks only its own stream; what it missed comes in few frames, and whole."""
    count, word = 1500, "x" * 2000
    rig.text.script = lambda generate: []
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", int(rig.base.rpartition(":")[2])))
    reader, writer = await asyncio.open_connection(sock=narrow, limit=1 << 16)
    body = b'{"prompt": "a", "stream": true}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    (generate,) = await rig.text.wait_for(Generate)
    for i in range(count):
        finish = "length" if i == count - 1 else None
        rig.text.say(Chunks([fakes.chunk(generate.rid, word, [5], i + 1, finish)]))
        if i % 50 == 0:  # lets the front run; other clients are served meanwhile
            assert (await rig.http.get("/health")).status_code == 200
    await fakes.until(lambda: not rig.front.client.table)
    received = b""
    while b"[DONE]" not in received[-64:]:
        received += await reader.read(1 << 20)
    writer.close()
    events = received.count(b"data: {")
    assert received.count(b"x") >= count * len(word)
    assert events < count / 3, events


# ------------------------------------------------------------------ the end


async def test_drain_lets_streams_finish_and_refuses_new_ones(rig, fakes):
    rig.text.script = lambda g: fakes.words(g)[:1]
    async with rig.http.stream("POST", "/generate", json={"text": "a", "stream": True}) as reply:
        lines = reply.aiter_lines()
        await anext(lines)
        rig.front.context.inbox.put_system(Drain(time.monotonic_ns() + int(60e9)))
        await fakes.until(lambda: rig.front.client.draining)
        (generate,) = rig.text.generates
        rig.text.say(Chunks([fakes.chunk(generate.rid, " end", [9], 2, "stop")]))
        rest = [line async for line in lines]
    assert rest[-2:] == ["data: [DONE]", ""]
    assert json.loads(rest[1].removeprefix("data: "))["text"] == "Hello end"
    assert rig.front.service.readiness().status == "draining"


async def test_new_requests_are_refused_while_draining(rig):
    rig.front.client.draining = True
    assert (await rig.http.get("/ready")).status_code == 503
    assert (await rig.http.get("/health")).status_code == 200
    reply = await rig.http.post("/generate", json={"text": "a"})
    assert (reply.status_code, "retry-after" in reply.headers) == (503, True)


async def test_stop_ends_what_does_not_finish(rig, fakes):
    rig.text.script = lambda g: fakes.words(g)[:1]
    async with rig.http.stream("POST", "/generate", json={"text": "a", "stream": True}) as reply:
        lines = reply.aiter_lines()
        await anext(lines)
        stopping = asyncio.create_task(rig.front.stop())
        rest = [line async for line in lines if line]
    await stopping
    assert "shutting down" in json.loads(rest[-1].removeprefix("data: "))["error"]["message"]
    assert not rig.running.done()  # run() ends by cancellation only
    assert rig.front._server.server_state.connections == set()


async def test_stop_answers_whoever_comes_while_a_body_does(rig, fakes):
    """Until the deadline of requests that have begun; then the one whose body is not here is told, too."""
    address = ("127.0.0.1", int(rig.base.rpartition(":")[2]))
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    await fakes.until(lambda: rig.front._server.server_state.tasks)
    rig.front._deadline_ns = time.monotonic_ns() + int(60e9)
    stopping = asyncio.create_task(rig.front.stop())
    await asyncio.sleep(0.1)
    refused = await rig.http.post("/generate", json={"text": "a"}, headers={"connection": "close"})
    assert refused.status_code == 503 and refused.headers["retry-after"] and not stopping.done()
    rig.front._deadline_ns = 0
    said = await reader.read()
    assert said.startswith(b"HTTP/1.1 503 ") and b"shutting down" in said and b"retry-after" in said
    writer.close()
    await stopping


# ------------------------------------------------------------------ metrics


async def test_metrics(rig):
    await rig.http.post("/generate", json={"text": "a"})
    await rig.http.post("/generate", json={})
    await rig.http.get("/wp-admin")
    page = await rig.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(page.text)
        for s in family.samples
    }
    route = ("route", "/generate")
    assert samples["actorserve_http_requests_total", route, ("status", "200")] == 1
    assert samples["actorserve_http_requests_total", route, ("status", "400")] == 1
    assert samples["actorserve_http_requests_total", ("route", "none"), ("status", "404")] == 1
    assert samples["actorserve_time_to_first_token_seconds_count",] == 1
    assert samples["actorserve_time_per_output_token_seconds_count",] == 1
    assert samples["actorserve_request_seconds_count",] == 1
    assert samples["actorserve_cached_tokens_total",] == 600
    assert samples["actorserve_kv_pages_tree",] == 50
    assert samples["actorserve_executor_up",] == 1
    assert samples["actorserve_step_seconds",] == 0.0015
    assert (samples["actorserve_forced_tokens_total",], samples["actorserve_jumps_total",]) == (77, 8)
    assert (samples["actorserve_grammar_waiting_requests",], samples["actorserve_grammar_hits_total",]) == (1, 5)
    assert samples["actorserve_grammars_compiled_total",] == 3 and samples["actorserve_grammars_failed_total",] == 2
    assert samples["actorserve_grammar_compile_seconds_total",] == 0.75


async def test_peer_up_again_serves_again(rig, fakes):
    rig.kill_text()
    await fakes.until(lambda: rig.front.client.reason_down())
    rig.revive_text()
    assert (await rig.http.post("/generate", json={"text": "a"})).status_code == 200
