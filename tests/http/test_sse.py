"""Output from the engine to the wire: directly while the client keeps up, in slices, each stream for itself."""

import asyncio
import json

import pytest

from actorserve.actors.actor import Context
from actorserve.actors.inbox import Inbox
from actorserve.actors.lane import LaneReceiver, LaneSender, create_lane
from actorserve.actors.messages import Cancel, Chunks, Generate
from actorserve.actors.ref import Ref
from actorserve.actors.stream import LoopWakeup
from actorserve.config import EngineConfig
from actorserve.http.front import SLICE, HttpFront
from actorserve.http.openai_replies import CompletionWriter
from actorserve.http.protocol import encode
from actorserve.http.sse import data_event, event_format

pytestmark = pytest.mark.anyio
CHAT = [{"role": "user", "content": "Hi"}]
STREAMS = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": CHAT},
    "/generate": {"text": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": CHAT, "model": "100%b", "max_tokens": 9},
}
WORDS = ["a", ' "b"', " 100%", "%b", "\n", " wörld", "\ue000", " z"]


def texts(path, body):
    """What the events of a stream say, put together."""
    events = [json.loads(line[6:]) for line in body.split("\n") if line.startswith("data: {")]
    match path:
        case "/v1/completions":
            return "".join(event["choices"][0]["text"] for event in events)
        case "/v1/chat/completions":
            return "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        case "/generate":
            return events[-1]["text"]
        case "/v1/responses":
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        case _:
            return "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")


def told(stream, tokens):
    """Whether all of so many tokens has arrived."""
    return all(choice.last is not None and choice.last.completion_tokens == tokens for choice in stream.choices)


@pytest.fixture
def setting():
    return {"served_model_name": "100%b"}


@pytest.mark.parametrize("path", STREAMS)
async def test_between_its_first_output_and_its_last_no_reader_is_woken(rig, fakes, path):
    woken = []

    class Counting(LoopWakeup):
        def set(self):
            woken.append(1)
            super().set()

    rig.front.client.new_wakeup = Counting
    rig.text.script = lambda generate: []
    asked = asyncio.create_task(rig.http.post(path, json=STREAMS[path] | {"stream": True}))
    (generate,) = await rig.text.wait_for(Generate)
    (choice,) = rig.front.client.table.values()
    for i, word in enumerate(WORDS):
        await fakes.until(lambda: choice.stream._wakeup is not None)
        finish = "stop" if i == len(WORDS) - 1 else None
        rig.text.say(Chunks([fakes.chunk(generate.rid, word, [9], i + 1, finish)]))
        await fakes.until(lambda i=i: told(choice.stream, i + 1))
    reply = (await asked).text
    assert texts(path, reply) == "".join(WORDS)
    assert len(woken) == 2, "for the first, and for the last"
    assert "100%b" in reply or path == "/generate"


async def test_a_writer_that_breaks_ends_its_own_stream(rig, fakes, monkeypatch):
    whole = CompletionWriter.chunk

    def broken(self, chunk):
        if chunk.text == "boom":
            raise ValueError("boom")
        return whole(self, chunk)

    monkeypatch.setattr(CompletionWriter, "chunk", broken)
    rig.text.script = lambda generate: []
    body = {"prompt": "Hi", "stream": True}
    asked = [asyncio.create_task(rig.http.post("/v1/completions", json=body)) for _ in range(2)]
    generates = await rig.text.wait_for(Generate, 2)
    bad, good = (g.rid for g in generates)
    streams = [choice.stream for choice in rig.front.client.table.values()]
    for i, text in enumerate(["ok", "boom", "boom"]):
        rig.text.say(Chunks([fakes.chunk(rid, text if rid == bad else "ok", [9], i + 1) for rid in (bad, good)]))
        await fakes.until(
            lambda i=i: all(not stream.open or (told(stream, i + 1) and stream._wakeup) for stream in streams)
        )
    cancels = await rig.text.wait_for(Cancel)
    assert {cancel.rid for cancel in cancels} == {bad}
    rig.text.say(Chunks([fakes.chunk(good, "", [2], 4, "stop")]))
    replies = sorted([(await one).text for one in asked], key=len)
    assert '"code":"internal_error"' in replies[0] and "[DONE]" not in replies[0]
    assert texts("/v1/completions", replies[1]) == "okokok" and replies[1].endswith("[DONE]\n\n")


async def test_output_is_delivered_in_slices(rig, fakes):
    """Between them other work of the loop has its turn; what came later stays behind."""
    count = 2 * SLICE + 5
    sizes, deliver = [], rig.front.client.deliver

    def counted(chunks):
        sizes.append(len(chunks))
        deliver(chunks)

    rig.front.client.deliver = counted
    rig.text.script = lambda generate: [
        Chunks([fakes.chunk(generate.rid + i, "a", [9], 1) for i in range(count)]),
        Chunks([fakes.chunk(generate.rid + i, "b", [2], 2, "stop") for i in range(count)]),
    ]
    reply = (await rig.http.post("/v1/completions", json={"prompt": "Hi", "n": count})).json()
    assert [choice["text"] for choice in reply["choices"]] == ["ab"] * count
    assert sum(sizes) == 2 * count and max(sizes) <= SLICE and len(sizes) >= 6


async def test_nothing_is_left_in_a_ring(fakes):
    """The front listens to a lane between processes whenever it stops taking from it, after a slice or the last one."""
    context = Context("front.0", EngineConfig(), fakes.MODEL, HttpFront.inbox_type, sends_to=["text"])
    front, outbox, fds = HttpFront(context), Inbox(HttpFront.inbox_type), create_lane()
    context.inbox.add_ring("text", LaneReceiver(fds.dup()))
    text, got = Ref("front.0", outbox), []
    text.connect(LaneSender(fds), 1)
    front.client.deliver = lambda chunks: got.extend(chunk.rid for chunk in chunks)
    loop = asyncio.get_running_loop()
    loop.add_reader(context.inbox.fileno(), front.drain)
    sent = 0
    try:
        async with asyncio.timeout(20):
            for burst in [[1], [SLICE], [SLICE - 1, 1], [SLICE + 1], [1] * (SLICE + 1), [3 * SLICE, 5]] * 3:
                for size in burst:
                    text.post(Chunks([fakes.chunk(sent + i, "a", [9], 1) for i in range(size)]))
                    sent += size
                await fakes.until(lambda sent=sent: len(got) >= sent)
                text.post(fakes.STATS)
                await fakes.until(lambda: front.client.stats is not None)
                front.client.replicas.clear()
    finally:
        loop.remove_reader(context.inbox.fileno())
        text.disconnect()
        outbox.close()
        context.close()
    assert got == list(range(sent))


def test_event_format():
    made = {"model": "5% %b", "text": "<text>", "n": 77, "more": "<text", "%": [1]}
    form = event_format(data_event(encode(made)), "<text>", 77)
    assert form % (encode('%"'), encode(3)) == data_event(encode(made | {"text": '%"', "n": 3}))
    with pytest.raises(AssertionError):
        event_format(data_event(encode(made)), "none")
