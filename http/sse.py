"""Server-sent events: a stream of chunks as `data:` frames, one send per wake and stream.

Used by native.py and openai.py, which bring a Renderer. Invariant: `data: [DONE]` is sent if and only if every choice
came to its end; the reply starts only with the first output, so that a request refused late still gets its status.
"""

from collections.abc import Iterable
from typing import Final, Protocol

from ..actors.client import Stream
from ..actors.messages import Chunk
from .exchange import Exchange

DONE: Final = b"data: [DONE]\n\n"


class Renderer(Protocol):
    """Turns chunks into JSON documents, each of which becomes one event."""

    def head(self) -> Iterable[bytes]:
        """Return what comes before the first output."""

    def chunk(self, chunk: Chunk) -> Iterable[bytes]:
        """Return the documents for new output of one choice; none when there is nothing to show."""

    def tail(self) -> Iterable[bytes]:
        """Return what comes after the last output."""


async def send_stream(exchange: Exchange, stream: Stream, renderer: Renderer) -> None:
    """Send all of `stream` as events. Raises what ended it early; the caller reports that to the client."""
    started = False
    while chunks := await stream.take():
        documents = [] if started else list(renderer.head())
        for chunk in chunks:
            documents += renderer.chunk(chunk)
        if ended := stream.ended:
            documents += renderer.tail()
        if not started:
            await exchange.start_events()
            started = True
        if documents or ended:
            frames = b"".join([b"data: " + document + b"\n\n" for document in documents])
            await exchange.write(frames + DONE if ended else frames, last=ended)
