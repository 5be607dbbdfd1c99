"""Server-sent events: a stream of chunks as `data:` frames, one send per wake and stream.

Used by native.py, openai.py and responses.py, which bring a Renderer. Invariant: what ends a stream, `data: [DONE]` or
another last event, is sent if and only if every choice came to its end; the reply starts only with the first output,
so that a request refused late still gets its status.
"""

from collections.abc import Callable, Iterable
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


def data_frame(document: bytes) -> bytes:
    """Return a document as a nameless event."""
    return b"data: " + document + b"\n\n"


async def send_stream(
    exchange: Exchange,
    stream: Stream,
    renderer: Renderer,
    frame: Callable[[bytes], bytes] = data_frame,
    done: bytes = DONE,
) -> None:
    """Send all of `stream` as events. Raises what ended it early; the caller reports that to the client.

    `frame` makes an event of a document; `done` comes after the last one.
    """
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
            frames = b"".join(map(frame, documents))
            await exchange.write(frames + done if ended else frames, last=ended)
