"""Server-sent events: a stream of chunks as events, one send per wake and stream.

Used by native.py, openai.py, responses.py and messages.py, which bring a Renderer. Invariant: what ends a stream,
`data: [DONE]` or another last event, is sent if and only if every choice came to its end; the reply starts only with
the first output, or after HEARTBEAT_SECONDS without any, so that a request refused before that still gets its status.
While there is nothing to say, a comment at times keeps proxies from closing the connection.

What comes between the first output and the last needs no task: as long as the client keeps up, a chunk is written
where it is received. A client that lags behind has its chunks joined until there is room, and its task waits for that.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Protocol

from ..actors.messages import Chunk
from ..actors.stream import Stream
from .exchange import Exchange
from .protocol import encode

DONE: Final = b"data: [DONE]\n\n"
HEARTBEAT: Final = b": still here\n\n"
HEARTBEAT_SECONDS: Final = 15.0


class Renderer(Protocol):
    """Turns chunks into events, as they go over the wire."""

    def head(self) -> Iterable[bytes]:
        """Return what comes before the first output."""

    def chunk(self, chunk: Chunk) -> Iterable[bytes]:
        """Return the events for new output of one choice; none when there is nothing to show."""

    def tail(self) -> Iterable[bytes]:
        """Return what comes after the last output."""


class Writer(Renderer, Protocol):
    """A Renderer that can also make one document of a whole output."""

    def whole(self, chunks: list[Chunk]) -> Any:
        """Return the reply of a request that was not streamed; `chunks` has one for each choice."""


AtEnd = Callable[[list[Chunk]], Awaitable[None]]
"""Awaited before the last chunks of choices are shown."""


def data_event(document: bytes) -> bytes:
    """Return a JSON document as a nameless event."""
    return b"data: " + document + b"\n\n"


def named_event(kind: str, document: bytes) -> bytes:
    """Return a JSON document as an event with a name."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), document)


def event_format(event: bytes, *values: Any) -> bytes:
    """Return a format for events like `event`: `%` puts encoded JSON values into the places of these, which occur in it
    once each, in this order. What streams say most costs no tree of structs then.
    """
    parts = [event.replace(b"%", b"%%")]
    for value in values:
        parts[-1:] = parts[-1].split(encode(value).replace(b"%", b"%%"))
    assert len(parts) == len(values) + 1
    return b"%b".join(parts)


async def send_output(
    exchange: Exchange,
    stream: Stream,
    writer: Writer,
    streamed: bool,
    at_end: AtEnd | None = None,
) -> None:
    """Send the engine's output as it comes, or when it is complete; a client that leaves ends it. See `send_stream`."""
    async with exchange.watched(stream):
        if streamed:
            await send_stream(exchange, stream, writer, at_end)
            return
        chunks = await stream.collect()
        if at_end is not None:
            await at_end(chunks)
        await exchange.reply(encode(writer.whole(chunks)))


async def send_stream(exchange: Exchange, stream: Stream, renderer: Renderer, at_end: AtEnd | None = None) -> None:
    """Send all of `stream` as events. Raises what ended it early; the caller reports that to the client."""

    outlet = exchange.outlet

    def direct(chunk: Chunk) -> bool:
        assert outlet is not None
        if not outlet.ready:
            return False
        if events := b"".join(renderer.chunk(chunk)):
            exchange.writes += 1
            outlet.write(events)
        return True

    heart = asyncio.create_task(_beat(exchange))
    begun = False
    try:
        while chunks := await stream.take():
            if at_end is not None and (last := [chunk for chunk in chunks if chunk.finish is not None]):
                await at_end(last)
            events = [] if begun else list(renderer.head())
            begun = True
            for chunk in chunks:
                events += renderer.chunk(chunk)
            if ended := stream.ended:
                events += renderer.tail()
            if not exchange.status:
                await exchange.start_events()
            if events or ended:
                await exchange.write(b"".join(events), last=ended)
            if outlet is not None:
                stream.direct = direct
    finally:
        stream.direct = None
        heart.cancel()


async def _beat(exchange: Exchange) -> None:
    """Write a comment after each HEARTBEAT_SECONDS without an event."""
    while True:
        before = exchange.writes
        await asyncio.sleep(HEARTBEAT_SECONDS)
        if exchange.writes == before:
            if not exchange.status:
                await exchange.start_events()
            await exchange.write(HEARTBEAT)
