"""A streaming HTTP client that costs little CPU and notices everything that is wrong with a reply.

Used by serve.py (asyncio). `Reply` turns the bytes of one SSE reply into a Record and knows the three protocols by
their fields; `Client` speaks HTTP/1.1 with kept-alive connections over httptools. Invariant: a Record without an error
had status 200, well-formed events, a count of its tokens, and `[DONE]`, once, at the end.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

Clock = Callable[[], float]


class Record(msgspec.Struct):
    """One request: when things happened (seconds on the clock) and how many tokens there were."""

    index: int
    planned: float = 0.0
    """When it should have started."""
    start: float = 0.0
    times: list[float] = []
    """Arrival of each event with new output."""
    counts: list[int] = []
    """Output tokens up to and with each of `times`; empty where the server does not say."""
    end: float = 0.0
    """Arrival of the last event of a choice (its finish reason)."""
    wanted_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    """`usage` of OpenAI's replies; `meta_info` of /generate has the first two, and `cached_tokens`, as well."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    finish_reason: Any = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    """vLLM's extension, asked for by `return_token_ids`: the new ones."""

    @property
    def has_output(self) -> bool:
        """Whether a client sees something new; the role and an empty finish chunk are no output."""
        delta = self.delta
        said = delta and (delta.content or delta.reasoning_content or delta.tool_calls)
        return bool(self.text or self.token_ids or said)


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    meta_info: _Usage | None = None
    error: Any = None


class Reply:
    """Reads one SSE reply into `record`. Each `data:` line is one event: all servers in question write them so."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._decode = msgspec.json.Decoder(_Event).decode
        self._rest = b""
        self._done = False
        self._finished = False
        self._counted = False
        self._ids = 0

    def feed(self, data: bytes, now: float) -> None:
        """Take body bytes, cut anywhere, that arrived at `now`."""
        lines = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)
            elif line.startswith(b"event:") and line[6:].strip() == b"error":
                self._fail("error event")

    def close(self) -> None:
        """The body has ended: complain about what is missing."""
        record = self.record
        if self._rest.strip():
            self._fail(f"the stream ends within a line: {self._rest[:80]!r}")
        if not self._done:
            self._fail("the stream ends without [DONE]")
        if not self._finished:
            self._fail("no finish_reason")
        if not self._counted or not record.completion_tokens:
            self._fail("no count of completion tokens (usage or meta_info)")
        if not record.times:
            record.times.append(record.end)  # all of the output was invisible, special tokens for instance

    def _event(self, text: bytes, now: float) -> None:
        if self._done:
            self._fail("an event after [DONE]")
        if text == b"[DONE]":
            self._done = True
            return
        try:
            event = self._decode(text)
        except msgspec.DecodeError as error:
            self._fail(f"bad event: {error}: {text[:120]!r}")
            return
        if event.error is not None:
            self._fail(f"error event: {event.error}")
        if event.choices:
            self.record.end = now
            self._finished |= any(choice.finish_reason is not None for choice in event.choices)
            if any(choice.has_output for choice in event.choices):
                self.record.times.append(now)
                self._ids += sum(len(choice.token_ids or ()) for choice in event.choices)
                if self._ids:
                    self.record.counts.append(self._ids)
        if event.meta_info is not None:
            self.record.end = now
            self._finished |= event.meta_info.finish_reason is not None
            if event.meta_info.completion_tokens > self.record.completion_tokens:
                self.record.times.append(now)
                self.record.counts.append(event.meta_info.completion_tokens)
        usage = event.usage or event.meta_info
        if usage is not None:
            self._count(usage)

    def _count(self, usage: _Usage) -> None:
        details = usage.prompt_tokens_details
        self.record.prompt_tokens = usage.prompt_tokens
        self.record.completion_tokens = usage.completion_tokens
        self.record.cached_tokens = usage.cached_tokens or (details.cached_tokens or 0 if details else 0)
        self._counted = True

    def _fail(self, error: str) -> None:
        self.record.error = self.record.error or error


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.reusable = True
        self.silent = True  # no byte of the current reply has come yet
        self._transport: Any = None
        self._ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    async def send(self, request: bytes, reply: Reply) -> None:
        """Send a request and read its reply to the end; what is wrong with it stands in the reply's record."""
        self._parser = httptools.HttpResponseParser(self)
        self._reply, self._refusal, self.silent = reply, bytearray(), True
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._ended
        finally:
            self._ended = None

    def close(self) -> None:
        self.reusable = False
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._ended is None:  # nothing was asked
            self.close()
            return
        self._now = self.clock()
        self.silent = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._end(f"connection lost{f': {error}' if error else ''}")

    # called by the parser

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() == 200:
            self._reply.feed(body, self._now)
        else:
            self._refusal += body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self.reusable = self.reusable and self._parser.should_keep_alive()
        if status == 200:
            self._reply.close()
            self._end(None)
        else:
            self._end(f"HTTP {status}: {bytes(self._refusal[:300]).decode(errors='replace')}")

    def _end(self, error: str | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._reply.record.error = self._reply.record.error or error
            self._ended.set_result(None)


class Client:
    """Streams replies from one server; keeps connections alive between requests."""

    def __init__(self, url: str, headers: dict[str, str] | None = None, clock: Clock = time.monotonic) -> None:
        """`url` is where to POST, for instance http://127.0.0.1:30000/v1/completions."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http(s) URL: {url}")
        self.clock = clock
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        lines = [f"POST {parts.path or '/'} HTTP/1.1", f"host: {parts.netloc}", "content-type: application/json"]
        lines += ["accept: text/event-stream", *(f"{name}: {value}" for name, value in (headers or {}).items())]
        self._head = "\r\n".join(lines).encode()
        self._idle: list[Connection] = []

    async def stream(self, body: bytes, record: Record, timeout: float = 600.0) -> None:
        """POST `body` and fill in `record`, errors included; raises nothing but cancellation."""
        record.start = self.clock()
        request = self._head + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        try:
            async with asyncio.timeout(timeout):
                await self._send(request, record)
        except TimeoutError:
            record.error = f"no end of the reply after {timeout:g} s"
        except OSError as error:
            record.error = f"cannot connect: {error}"
        record.end = record.end or self.clock()

    async def _send(self, request: bytes, record: Record) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                await self._use(connection, request, record)
                if not (connection.silent and record.error):
                    return
                record.error = None  # the server closed an idle connection just when we used it
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if self._tls else None
        _, connection = await loop.create_connection(
            lambda: Connection(self.clock), self._host, self._port, ssl=context
        )
        await self._use(connection, request, record)

    async def _use(self, connection: Connection, request: bytes, record: Record) -> None:
        try:
            await connection.send(request, Reply(record))
        except BaseException:
            connection.close()  # a reply that nobody reads would answer the next request
            raise
        if connection.reusable:
            self._idle.append(connection)

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()
