"""A real HttpFront with a fake text actor behind it: the front's own protocol, lanes and codec, without a model.

The fake answers each Generate by its script; a test replaces the script. Everything runs in one asyncio loop.
"""

import asyncio
import contextlib
import math
import socket
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import openai
import pytest
from msgspec.structs import replace

from actorserve.actors.actor import Actor, Context, connect, disconnect
from actorserve.actors.messages import (
    Abort,
    AskTimelines,
    Cancel,
    Chunk,
    Chunks,
    Detokenize,
    Detokenized,
    Done,
    Generate,
    LaneView,
    Look,
    NodeView,
    Order,
    PeerDown,
    PeerUp,
    Refused,
    RequestView,
    Seen,
    Stats,
    TextInbox,
    TextPrompt,
    Timelines,
    TimelineView,
    Tokenize,
    Tokenized,
    TokenLogprob,
    TokenPrompt,
    Unpin,
    WindowView,
)
from actorserve.config import EngineConfig, ModelInfo, Thoughts
from actorserve.http.front import HttpFront
from actorserve.sampler.params import SamplingParams

MODEL = ModelInfo(
    name="fake-model", path="/models/fake", model_type="llama", vocab_size=1000, context_length=512, eos_ids=(2,)
)
READING = msgspec.structs.replace(MODEL, tool_parser="hermes", reasoning_parser="qwen3")
"""Outputs are read for calls and thoughts."""
THINKING = msgspec.structs.replace(READING, thoughts=Thoughts((900,), (901,)))
"""Thoughts' tags are tokens, so that a grammar can begin after them."""
STATS = Stats(1, 2, 100, 40, 50, 10, 1000, 600, 400, 333, 4, 55, 66, 1500.0, True, 77, 8, 1, 5, 3, 2, 0.75)
WINDOWS = [WindowView(7, 1, 3, 40, 5_000_000, 9_000_000), WindowView(8, 4, 3, 0, 6_000_000, 0)]
WORDS = ("Hello", " wörld", " and", " moon")


def logprob(token: int, text: str, top: int) -> TokenLogprob:
    """A token with logprob -token/10, and `top` others."""
    others = [(token + i, -token / 10 - i, f"alt{i}".encode()) for i in range(top)]
    return TokenLogprob(token, -token / 10, text.encode(), others)


def with_listed(item: TokenLogprob, params: SamplingParams) -> TokenLogprob:
    """Also those of the tokens that the request names: -token/100 behind a logprob of -token/10."""
    return replace(item, listed=[(i, item.logprob / 10 - i / 100, b"named") for i in params.token_ids_logprob])


def prompt_logprobs(params: SamplingParams) -> list[TokenLogprob]:
    """Of the prompt's tokens, one a character of "<s>☕ tea", from the wanted start on."""
    if not params.wants_prompt:
        return []
    texts = [b"<s>", b"\xe2\x98", b"\x95", b" te", b"a"]
    items = [with_listed(logprob(20 + i, "", params.logprobs), params) for i in range(len(texts))]
    items = [replace(item, text=text) for item, text in zip(items, texts, strict=True)]
    first, *rest = items[params.logprob_start_len :]
    return [TokenLogprob(first.token, math.nan, first.text, []), *rest]


def chunk(rid: int, text: str, ids: list[int], done: int, finish: str | None = None, **more: object) -> Chunk:
    """A chunk after `done` tokens in all; 7 prompt tokens, 3 of them cached."""
    fields = {"logprobs": [], "matched": None} | more
    return Chunk(rid, text, ids, fields.pop("logprobs"), finish, fields.pop("matched"), 7, done, 3, **fields)


def words(generate: Generate) -> list[Chunks]:
    """The default script: each choice says WORDS, one a step, all choices in one message a step; then EOS (2)."""
    steps = []
    top = generate.params.logprobs
    for i, word in enumerate(WORDS):
        last = i == len(WORDS) - 1
        logprobs = [] if top is None else [with_listed(logprob(10 + i, word, top), generate.params)]
        more = {"logprobs": logprobs, "matched": 2 if last else None}
        if not i:
            more["prompt_logprobs"] = prompt_logprobs(generate.params)
        more["valid"] = False if last and generate.grammar is not None else None
        rids = range(generate.rid, generate.rid + generate.n)
        steps.append(Chunks([chunk(r, word, [10 + i], i + 1, "stop" if last else None, **more) for r in rids]))
    return steps


class FakeText(Actor):
    """Answers Generate by `script`, one message a turn of the loop; remembers all it got."""

    inbox_type = TextInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.got: list[object] = []
        self.script: Callable[[Generate], list[Chunks | Refused]] = words
        self.arrived = asyncio.Event()
        self.busy = False
        self.mute = False
        """Looks get no answer."""

    def receive(self, message: object, source: str) -> None:
        if isinstance(message, Generate):
            prompt = message.prompt
            if isinstance(prompt, TokenPrompt):  # aliases the lane
                copied = TokenPrompt(memoryview(bytes(prompt.ids)))
                message = replace(message, prompt=copied)
            asyncio.get_running_loop().call_soon(self._say, self.script(message))
        asked = isinstance(message, Tokenize | Detokenize | Order | Look | AskTimelines)
        if asked and not (self.mute and isinstance(message, Look)):
            asyncio.get_running_loop().call_soon(self.say, self.answer(message))
        if isinstance(message, Unpin):
            message = replace(message, pins=memoryview(bytes(message.pins)).cast("q"))
        if isinstance(message, Generate | Cancel | Tokenize | Order | Abort | Look | AskTimelines | Unpin):
            self.got.append(message)
            self.arrived.set()

    def answer(self, message: Tokenize | Detokenize | Order | Look | AskTimelines) -> object:
        """A token a character, its code point; orders are refused while there are requests."""
        match message:
            case Tokenize():
                text = message.prompt.text if isinstance(message.prompt, TextPrompt) else "chat"
                ids = [1] * message.add_special_tokens + [ord(c) for c in text]
                return Tokenized(message.rid, memoryview(array("i", ids).tobytes()))
            case Detokenize():
                return Detokenized(message.rid, "".join(map(chr, message.ids.cast("i"))))
            case Order():
                busy = Refused(message.rid, 1, 400, "not_idle", "busy")
                return busy if self.busy else Done(message.rid, message.action)
            case AskTimelines():
                return Timelines(message.rid, [self.timeline(g, rid) for g, rid in self.named(message)])
            case Look():
                lanes = [LaneView("text", "sched", True, 3, 70, 1, 2), LaneView("sched", "exec.0", False)]
                nodes = [NodeView(1, -1, 0, 0, 1, 4), NodeView(2, 1, 40, 3, 1, 4)]
                requests = [RequestView(9, "decode", 7, 8, 2, 20)]
                return Seen(message.rid, STATS, lanes, nodes, 1, requests, False)

    def named(self, asked: AskTimelines) -> list[tuple[Generate, int]]:
        """The requests of a name and tenant."""
        found = [g for g in self.generates if g.name == asked.name and asked.tenant in (None, g.tenant)]
        return [(g, g.rid + i) for g in found for i in range(g.n)]

    def timeline(self, g: Generate, rid: int) -> TimelineView:
        """A millisecond for each thing that happens; two windows, the second on its way."""
        times = [g.arrival_ns + (i + 1) * 1_000_000 for i in range(6)]
        windows = [
            replace(w, start_ns=w.start_ns + g.arrival_ns, end_ns=w.end_ns and w.end_ns + g.arrival_ns) for w in WINDOWS
        ]
        return TimelineView(rid, g.arrival_ns, *times, 0, 7, 3, 1, 2, windows)

    def say(self, message: object) -> None:
        self.context.ref("front.0").post(message)

    def _say(self, messages: list[Chunks | Refused]) -> None:
        if messages:
            self.say(messages[0])
            asyncio.get_running_loop().call_soon(self._say, messages[1:])

    async def wait_for(self, kind: type, count: int = 1) -> list[object]:
        """Return the first `count` messages of a kind, once they are here."""
        while len(found := [m for m in self.got if isinstance(m, kind)]) < count:
            self.arrived.clear()
            await self.arrived.wait()
        return found

    @property
    def generates(self) -> list[Generate]:
        return [m for m in self.got if isinstance(m, Generate)]


@dataclass
class Rig:
    """What a test holds: the front, the fake, and how to reach them."""

    front: HttpFront
    text: FakeText
    base: str
    http: httpx.AsyncClient
    running: asyncio.Task[None] = field(repr=False)

    @property
    def app(self) -> Callable[..., object]:
        return self.front._server.config.app

    def kill_text(self, *at_work: int) -> None:
        """What the node does when the text actor dies, working on these requests."""
        disconnect(self.front.context, self.text.context)
        self.front.context.inbox.put_system(PeerDown("text", 1, "killed", at_work=at_work))

    def revive_text(self) -> None:
        """And what it does when there is another."""
        connect(self.front.context, self.text.context, codec=True)
        self.front.context.inbox.put_system(PeerUp("text", 2))


@contextlib.asynccontextmanager
async def open_rig(model: ModelInfo = MODEL, **config: object) -> AsyncIterator[Rig]:
    listener = socket.create_server(("127.0.0.1", 0))
    settings = EngineConfig(**config)
    contexts = [
        Context(
            "front.0", settings, model, HttpFront.inbox_type, sends_to=["text"], files={"listen": listener.fileno()}
        ),
        Context("text", settings, model, TextInbox, sends_to=["front.0"]),
    ]
    front, text = HttpFront(contexts[0]), FakeText(contexts[1])
    connect(contexts[0], contexts[1], codec=True)
    connect(contexts[1], contexts[0], codec=True)
    text.say(STATS)
    loop = asyncio.get_running_loop()
    loop.add_reader(contexts[1].inbox.fileno(), text.drain)
    running = asyncio.create_task(front.run())
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=base, timeout=20, verify=False) as http:  # certificates take 20 ms to load
        try:
            yield Rig(front, text, base, http, running)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            for connection in list(front._server.server_state.connections):
                connection.transport.abort()
            await asyncio.gather(*front._server.server_state.tasks)
            loop.remove_reader(contexts[1].inbox.fileno())
            for context in contexts:
                context.close()
            listener.close()


def say(rig: Rig, text: str, size: int = 3, finish: str = "stop", **more: object) -> None:
    """The engine answers with this text, `size` characters a chunk."""

    def script(generate: Generate) -> list[Chunks]:
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        rids = range(generate.rid, generate.rid + generate.n)
        return [
            Chunks([chunk(r, part, [9], i + 1, finish if i == len(parts) - 1 else None, **more) for r in rids])
            for i, part in enumerate(parts)
        ]

    rig.text.script = script


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something that has no event of its own is so; pytest's timeout is the limit."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture
def setting() -> dict[str, Any]:
    """What `rig` is opened with; files may have another."""
    return {"max_body_bytes": 10_000, "max_queued_requests": 300}


@pytest.fixture
async def rig(anyio_backend: object, setting: dict[str, Any]) -> AsyncIterator[Rig]:
    async with open_rig(**setting) as opened:
        yield opened


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[openai.AsyncOpenAI]:
    plain = openai.DefaultAsyncHttpxClient(verify=False)
    async with openai.AsyncOpenAI(
        base_url=f"{rig.base}/v1", api_key="none", max_retries=0, timeout=20, http_client=plain
    ) as opened:
        yield opened


@pytest.fixture
def fakes() -> SimpleNamespace:
    """What tests build scripts from (tests are no package, so they cannot import this file)."""
    return SimpleNamespace(
        chunk=chunk,
        logprob=logprob,
        words=words,
        say=say,
        WORDS=WORDS,
        MODEL=MODEL,
        READING=READING,
        THINKING=THINKING,
        STATS=STATS,
        open_rig=open_rig,
        until=until,
    )
