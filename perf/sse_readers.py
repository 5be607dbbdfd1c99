"""Readers of many event streams that cost little, in a process of their own, and one stream's first event exactly.

Used by http.py. The readers count events and nothing else; a first event is waited for by a blocking socket in another
process, so that what is measured there does not wait behind the readers. Invariant: each event is counted once,
wherever TCP cuts it; an event is what begins with `data: `.
"""

import contextlib
import multiprocessing
import select
import socket
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

MARK: Final = b"data: "
AT_ONCE: Final = 1 << 16
"""Bytes taken from a socket at a time."""
START_SECONDS: Final = 60.0


class Seen(NamedTuple):
    """Of all streams: events so far, streams that have had one, streams that have ended."""

    events: int
    begun: int
    ended: int


class Readers:
    """The streams that are being read; `seen` asks the process that reads them."""

    def __init__(self, control: "Connection[Any, Any]", count: int) -> None:
        self._control = control
        self._count = count

    def seen(self) -> Seen:
        self._control.send(None)
        return Seen(*self._control.recv())

    def wait_until_begun(self) -> None:
        """Return when each stream has had an event. Raises TimeoutError."""
        deadline = time.monotonic() + START_SECONDS
        while self.seen().begun < self._count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all of {self._count} streams began within {START_SECONDS:g} s")
            time.sleep(0.02)


@contextlib.contextmanager
def reading(url: str, requests: Sequence[bytes]) -> Iterator[Readers]:
    """All of the requests under way for the block; then their connections are dropped."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=read_streams, args=(url, list(requests), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Readers(ours, len(requests))
    finally:
        process.kill()
        process.join()
        ours.close()


def read_streams(url: str, requests: Sequence[bytes], control: "Connection[Any, Any]") -> None:
    """Send the requests, read their replies, and answer whoever asks what was seen; until killed."""
    poll, sockets, tails = select.epoll(), {}, {}
    events, begun, ended = 0, set[int](), 0
    for request in requests:
        connection = connected(url)
        connection.sendall(request)
        number = connection.fileno()
        sockets[number], tails[number] = connection, b""
        poll.register(number, select.EPOLLIN)
    poll.register(control.fileno(), select.EPOLLIN)
    while True:
        for number, _ in poll.poll():
            if number == control.fileno():
                control.recv()
                control.send((events, len(begun), ended))
                continue
            try:
                data = sockets[number].recv(AT_ONCE)
            except OSError:
                data = b""
            if not data:
                poll.unregister(number)
                sockets[number].close()
                ended += 1
                continue
            text = tails[number] + data
            tails[number] = text[1 - len(MARK) :]
            if found := text.count(MARK):
                events += found
                begun.add(number)


class FirstEvent(NamedTuple):
    """A reply whose first event was waited for; times CLOCK_REALTIME, seconds."""

    sent: float
    first: float
    body: bytes


def first_event(url: str, request: bytes) -> FirstEvent:
    """Send a request, read its reply to the end. The time begins when there is a connection."""
    with connected(url) as connection:
        sent, first, body = time.time(), 0.0, b""
        connection.sendall(request)
        while data := connection.recv(AT_ONCE):
            body += data
            if not first and MARK in body:
                first = time.time()
    return FirstEvent(sent, first, body)


def connected(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), START_SECONDS)
