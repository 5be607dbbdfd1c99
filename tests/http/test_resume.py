"""Streams that outlive their connection, and the comments that keep connections open."""

import asyncio
import json
import re

import pytest

from actorserve.actors.messages import Cancel, Chunks, Generate, Refused
from actorserve.http import resume, sse
from actorserve.http.inner_call import inner_call

pytestmark = pytest.mark.anyio
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
RESUMABLE = {"x-resumable": "true"}
STREAMS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Hi", "stream": True},
    "/generate": {"text": "Hi", "stream": True},
    "/v1/responses": {"input": "Hi", "stream": True},
    "/v1/messages": CHAT | {"model": "fake-model", "max_tokens": 9},
}


@pytest.fixture
def setting(tmp_path):
    return {}


def events_of(text):
    """(id, the rest) of each event."""
    events = [event for event in text.split("\n\n") if event]
    assert all(event.startswith("id: ") for event in events)
    return [tuple(event[4:].split("\n", 1)) for event in events]


def steady(events):
    """Without what differs from request to request."""
    return [re.sub(r'"(id|item_id|created|created_at)":("[^"]*"|\d+)', "", event) for event in events]


async def test_every_event_of_every_stream_has_an_id(rig):
    for path, body in STREAMS.items():
        plain = (await rig.http.post(path, json=body)).text
        assert "id: " not in plain.replace('"id"', "")
        reply = await rig.http.post(path, json=body, headers=RESUMABLE)
        assert reply.headers["content-type"].startswith("text/event-stream") and reply.headers["x-request-id"]
        events = events_of(reply.text)
        names = [name for name, _ in events]
        assert len(set(names)) == len(names)
        if path != "/generate":  # whose frames say how long it took
            assert steady([text for _, text in events]) == steady([x for x in plain.split("\n\n") if x])
        # Each event is followed by the same ones, whenever a client left.
        for i in (0, len(events) // 2, len(events) - 1):
            again = await rig.http.post(path, headers={"last-event-id": names[i]})
            assert events_of(again.text) == events[i + 1 :]


def slow(rig, gate, words=4):
    """Each word waits until the test lets it pass."""

    def script(generate):
        asyncio.get_running_loop().create_task(speak(generate))
        return []

    async def speak(generate):
        for i in range(words):
            await gate.acquire()
            last = i == words - 1
            rig.text.say(Chunks([rig.chunk(generate.rid, f"w{i} ", [i], i + 1, "stop" if last else None)]))

    rig.text.script = script


@pytest.fixture
def gate(rig, fakes):
    rig.chunk = fakes.chunk
    made = asyncio.Semaphore(0)
    slow(rig, made)
    return made


async def cut(rig, gate, count):
    """Read `count` words of a resumable stream, and leave; the events read."""
    for _ in range(count):
        gate.release()
    text = ""
    async with rig.http.stream("POST", "/v1/chat/completions", json=CHAT, headers=RESUMABLE) as reply:
        async for piece in reply.aiter_text():
            text += piece
            if len(re.findall(r"w\d ", text)) >= count and text.endswith("\n\n"):
                break
    return events_of(text)


def words_of(events):
    said = [json.loads(text[6:])["choices"] for _, text in events if text != "data: [DONE]"]
    return "".join(choices[0]["delta"].get("content", "") for choices in said)


async def test_a_stream_goes_on_after_a_cut(rig, gate):
    first = await cut(rig, gate, 2)
    gate.release()
    resumed = asyncio.create_task(
        rig.http.post("/v1/chat/completions", headers={"last-event-id": first[-1][0]}, content=b"whatever")
    )
    await asyncio.sleep(0.05)
    gate.release()
    events = first + events_of((await resumed).text)
    assert words_of(events) == "w0 w1 w2 w3 "
    assert events[-1][1] == "data: [DONE]"
    assert len(rig.text.generates) == 1 and not [m for m in rig.text.got if isinstance(m, Cancel)]


async def test_nobody_comes_back(rig, gate, fakes, monkeypatch):
    monkeypatch.setattr(resume, "RESUME_SECONDS", 0.05)
    first = await cut(rig, gate, 1)
    await rig.text.wait_for(Cancel)
    reply = await rig.http.post("/v1/chat/completions", headers={"last-event-id": first[-1][0]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "Last-Event-ID")
    assert not rig.front.client.table


async def test_who_does_not_ask_ends_the_request_by_leaving(rig, gate):
    gate.release()
    async with rig.http.stream("POST", "/v1/chat/completions", json=CHAT) as reply:
        await anext(reply.aiter_text())
    await rig.text.wait_for(Cancel)


@pytest.mark.parametrize("streams", [False, True])
async def test_who_has_no_id_cannot_come_back(rig, gate, streams):
    """A reply that is no stream, and a stream that has not begun, end with their connection."""
    reading = asyncio.create_task(
        rig.http.post("/v1/chat/completions", json=CHAT | {"stream": streams}, headers=RESUMABLE)
    )
    (generate,) = await rig.text.wait_for(Generate)
    reading.cancel()
    (cancelled,) = await rig.text.wait_for(Cancel)
    assert cancelled.rid == generate.rid and not rig.front.client.table
    assert not rig.front.service.streams._logs


@pytest.mark.parametrize("setting", [{"resumable_streams": True}])
async def test_a_batch_line_that_is_dropped_is_cancelled(rig, gate):
    endpoint = rig.front.service.batch_endpoints["/v1/chat/completions"]
    body = json.dumps(CHAT | {"stream": False}).encode()
    line = asyncio.create_task(inner_call(endpoint, "/v1/chat/completions", body, "", "line"))
    await rig.text.wait_for(Generate)
    line.cancel()
    await rig.text.wait_for(Cancel)


async def test_replies_that_are_no_streams_pass_through(rig, fakes):
    reply = await rig.http.post("/v1/chat/completions", json=CHAT | {"stream": False}, headers=RESUMABLE)
    assert reply.json()["choices"][0]["message"]["content"] == "Hello wörld and moon"
    refused = await rig.http.post("/v1/chat/completions", json=CHAT | {"temperature": -1}, headers=RESUMABLE)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    await fakes.until(lambda: not rig.front.service.streams._logs)


async def test_an_error_in_a_stream_is_an_event(rig, fakes):
    rig.text.script = lambda generate: [
        Chunks([fakes.chunk(generate.rid, "Yes", [9], 1)]), Refused(generate.rid, 1, 503, "engine_unavailable", "died"),
    ]  # fmt: skip
    events = events_of((await rig.http.post("/v1/chat/completions", json=CHAT, headers=RESUMABLE)).text)
    assert json.loads(events[-1][1][6:])["error"]["message"] == "died"
    again = await rig.http.post("/v1/chat/completions", headers={"last-event-id": events[0][0]})
    assert events_of(again.text) == events[1:]


async def test_ids_that_are_none(rig):
    for name in ("x", "-1", "a-b", "9" * 40 + "-0"):
        reply = await rig.http.post("/v1/messages", headers={"last-event-id": name})
        assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")


async def test_logs_are_bounded(rig, monkeypatch):
    monkeypatch.setattr(resume, "MOST_BYTES", 3000)
    ids = []
    for _ in range(4):
        reply = await rig.http.post("/v1/chat/completions", json=CHAT, headers=RESUMABLE)
        ids.append(events_of(reply.text)[0][0])
    found = [(await rig.http.post("/generate", headers={"last-event-id": name})).status_code for name in ids]
    assert found[0] == 404 and found[-1] == 200


async def test_a_stream_belongs_to_its_key(fakes, tmp_path):
    (tmp_path / "keys.toml").write_text(
        '[[keys]]\nname = "a"\nkey = "sk-a"\n[[keys]]\nname = "b"\nkey = "sk-b"\nmax_concurrency = 1\n'
    )
    async with fakes.open_rig(api_key_file=str(tmp_path / "keys.toml"), resumable_streams=True) as rig:
        a, b = ({"authorization": f"Bearer sk-{name}"} for name in "ab")
        events = events_of((await rig.http.post("/v1/chat/completions", json=CHAT, headers=a)).text)
        again = {"last-event-id": events[0][0]}
        for headers, status in ((a, 200), (b, 404), ({}, 401)):
            reply = await rig.http.post("/v1/chat/completions", headers=headers | again)
            assert reply.status_code == status


async def test_a_comment_while_there_is_nothing_to_say(rig, gate, monkeypatch):
    monkeypatch.setattr(sse, "HEARTBEAT_SECONDS", 0.02)
    for headers in ({}, RESUMABLE):
        text, gate = "", asyncio.Semaphore(0)
        slow(rig, gate)
        async with rig.http.stream("POST", "/v1/chat/completions", json=CHAT, headers=headers) as reply:
            assert reply.status_code == 200  # before any output
            async for piece in reply.aiter_text():
                text += piece
                if text.count(": still here\n\n") >= 2:
                    gate.release()
        assert text.startswith(": still here\n\n") and text.endswith("data: [DONE]\n\n")
        assert "w0" in text and "w3" in text


async def test_a_request_refused_in_the_queue_has_its_status(rig, monkeypatch):
    rig.text.script = lambda generate: [Refused(generate.rid, 1, 400, "context_length_exceeded", "long", "messages")]
    assert (await rig.http.post("/v1/chat/completions", json=CHAT)).status_code == 400
