"""Connection: uvicorn's HTTP protocol with limits that hold while bytes come and go.

Made by uvicorn for each client, from the class that `limited` returns. Request heads are bounded in bytes, in headers
and in time, bodies in time (in size by Exchange.body), replies by how slowly they may be read, all of them in number.
Invariant: whoever owes us something, a head, a body or room for a reply, and brings less than MIN_RATE of it for
`seconds` loses the connection; nothing is kept for a client beyond SEND_BUFFER and what uvicorn buffers.
"""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, ClassVar, Final, Literal, NamedTuple

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ..actors.client import DRAINING
from ..config import EngineConfig
from ..errors import ActorserveError, Overloaded, RequestError
from .error_replies import error_body, error_headers

log = logging.getLogger("actorserve.http")

MIN_RATE: Final = 1024
"""Bytes a second that a client must send or read while it is waited for."""
SEND_BUFFER: Final = 128 << 10
"""Bytes that the kernel takes ahead of what it has sent (TCP_NOTSENT_LOWAT)."""
LINGER_SECONDS: Final = 1.0
"""How long a refused client may take to read why; a connection that is closed under its request would be reset."""
MAX_PIPELINED: Final = 16
"""Requests sent ahead of the reply to the first of them."""
OVERHEAD: Final = 16
"""Bytes that a chunked body may have around each of its own."""
FREE_FILES: Final = 128
"""Descriptors that the front needs beside its connections."""
MOST_CONNECTIONS: Final = 16_384


class ConnectionLimits(NamedTuple):
    """What one front's clients may do. `refused` is told the status of each refusal."""

    connections: int
    head_bytes: int
    headers: int
    seconds: float
    refused: Callable[[int], None]


class ChunkedBody:
    """An Outlet (exchange.py) for the body of one reply: uvicorn's `send` without a message for each part."""

    __slots__ = ("_cycle", "_flow", "_transport")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    @property
    def ready(self) -> bool:
        cycle = self._cycle
        if self._flow.write_paused or cycle.disconnected or cycle.response_complete:
            return False
        return cycle.chunked_encoding is True

    def write(self, body: bytes) -> None:
        if body:  # an empty chunk would be the end
            self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class Connection(HttpToolsProtocol):
    """See the module's text."""

    limits: ClassVar[ConnectionLimits]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._owes: Literal["head", "body"] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._fault: ActorserveError | None = None
        """What the parser is being stopped for."""
        self._refused = False
        self._began = 0.0
        self._received = 0
        """Bytes of the head or body that is owed, with all that is around them."""
        self._parsed = 0
        """Of the head: bytes of its names and values. Of the body: its own."""
        self._unsent = 0
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the newest."""
        _bound_kernel_buffer(transport)
        most = self.limits.connections
        if len(self.connections) > 2 * most:
            transport.abort()
        elif len(self.connections) > most:
            self._refuse(Overloaded(f"{most} connections are open, which is the most; try again", status=503))
        else:
            self._expect("head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_watching_reader()
        self._leave()
        super().connection_lost(exc)

    # ------------------------------------------------------------------ requests

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._owes is None:
            self._expect("head")
        self._received += len(data)
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._refused or self._owes is None:
            return
        if self._owes == "head" and self._received > self.limits.head_bytes:
            self._refuse(_head_too_large(f"above {self.limits.head_bytes} bytes"))
        elif self._owes == "body" and self._received > OVERHEAD * self._parsed + self.limits.head_bytes:
            self._refuse(RequestError("the body's chunks are mostly overhead", code="invalid_http"))

    def _feed(self, data: bytes) -> None:
        """Parse. A wish for another protocol (HTTP/2, by Java's client at each first request) is passed over, as RFC
        9110, 7.8 lets us: the parser stops at it without the request's body, so another one gets the head without it.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                rest = data[stopped.args[0] :]
            head = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
            head += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            data = b"\r\n".join([*head, b"\r\n"]) + rest
            self._parsed = 0
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's

    @property
    def _stops(self) -> bool:
        """Whether the parser stops at this head, which comes again without its reason."""
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed, or what a callback below found too large."""
        self._refuse(self._fault or RequestError("this is not valid HTTP", code="invalid_http"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._owes is None:  # behind another request in the same bytes
            self._expect("head")
            self._received = 1

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._owes == "body":
            return  # a trailer: nobody reads those, and the head's headers must not change under their reader
        super().on_header(name, value)
        self._count_head(len(name) + len(value))
        if len(self.headers) > self.limits.headers:
            self._stop_parsing(_head_too_large(f"of more than {self.limits.headers} headers"))

    def on_headers_complete(self) -> None:
        if self._stops:
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop_parsing(RequestError("too many requests are sent ahead of replies", code="invalid_http"))
        super().on_headers_complete()
        self._expect("body")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        cycle.scope["state"]["outlet"] = ChunkedBody(cycle)
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._parsed += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._stops:
            return
        self._owes = None
        self._stop_timer()
        super().on_message_complete()

    def _count_head(self, size: int) -> None:
        self._parsed += size
        if self._parsed > self.limits.head_bytes:
            self._stop_parsing(_head_too_large(f"above {self.limits.head_bytes} bytes"))

    def _stop_parsing(self, error: ActorserveError) -> None:
        """Raise through the parser, which then calls send_400_response."""
        self._fault = error
        raise error

    # ------------------------------------------------------------------ time

    def _expect(self, what: Literal["head", "body"]) -> None:
        self._owes, self._received, self._parsed = what, 0, 0
        self._began = self.loop.time()
        self._stop_timer()
        self._timer = self.loop.call_later(self.limits.seconds, self._late)

    def _late(self) -> None:
        """A head is late after `seconds`; a body gets a second more for each MIN_RATE bytes of it."""
        seconds, now = self.limits.seconds, self.loop.time()
        answering = self._running is not None and not self._running.response_complete
        if self.flow.read_paused or (self._owes == "head" and answering):
            left = seconds  # it is we who do not read, or there is no need to hurry
        elif self._owes == "body" and answering:
            left = self._began + seconds + self._parsed / MIN_RATE - now
        else:
            left = 0.0
        if left > 0:
            self._timer = self.loop.call_later(left, self._late)
        elif self._owes == "head" and not self._received:
            self.transport.close()  # it never asked for anything
        else:
            what = f"the request's {self._owes} does not come: less than {MIN_RATE} bytes a second for {seconds:g} s"
            self._refuse(RequestError(what, code="request_timeout", status=408))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------ refusals

    def _refuse(self, error: ActorserveError) -> None:
        """Say what is wrong, if nothing else is being said, and close."""
        self._refused, self._owes = True, None
        self._stop_timer()
        self._unset_keepalive_if_required()
        self.limits.refused(error.status)
        running, transport = self._leave(), self.transport
        if running is not None and (running is not self.cycle or running.response_started):
            transport.abort()  # what is said now would be taken for its answer, or a part of it
            return
        if transport.is_closing():
            return
        self.flow.resume_reading()
        body = error_body(error)
        head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode(), b"connection: close"]
        head += [b"content-type: application/json", b"content-length: %d" % len(body)]
        head += [b"%b: %b" % header for header in error_headers(error)]
        transport.write(b"\r\n".join(head) + b"\r\n\r\n" + body)
        if not transport.can_write_eof():
            transport.close()
            return
        transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, transport.abort)

    def shutdown(self) -> None:
        """Be closed by the server's end once there is a reply; a body that is not here by then is not waited for."""
        if self._owes == "body" and self._running is self.cycle and not self.cycle.response_started:
            self._refuse(Overloaded(f"{DRAINING}; try again", status=503))
        else:
            super().shutdown()

    def _leave(self) -> RequestResponseCycle | None:
        """Let the handler of the request that is being answered, if there is one, see a client that went away."""
        self.pipeline.clear()
        running = self._running
        if running is None or running.response_complete:
            return None
        running.disconnected = True
        running.waiting_for_100_continue = False
        running.message_event.set()
        return running

    def eof_received(self) -> None:
        if self._refused:
            self.transport.close()

    # ------------------------------------------------------------------ replies

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching_reader()

    def _watch_reader(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(self.limits.seconds, self._check_reader)

    def _check_reader(self) -> None:
        if self._unsent - self.transport.get_write_buffer_size() >= MIN_RATE * self.limits.seconds:
            self._watch_reader()
            return
        log.info("cut a connection whose client reads less than %d bytes a second", MIN_RATE)
        self.limits.refused(499)
        self.transport.abort()

    def _stop_watching_reader(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


def limited(config: EngineConfig, count: Callable[[int], None]) -> type[Connection]:
    """Return the protocol of a front with this configuration; it may open as many files as the system lets it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = MOST_CONNECTIONS if files == resource.RLIM_INFINITY else max(1, files - FREE_FILES)
    most = config.max_connections or min(MOST_CONNECTIONS, room)
    limits = ConnectionLimits(most, config.max_header_bytes, config.max_headers, config.client_timeout, count)
    return type("LimitedConnection", (Connection,), {"limits": limits})


def _head_too_large(what: str) -> RequestError:
    return RequestError(f"the request's head is {what}", code="headers_too_large", status=431)


def _bound_kernel_buffer(transport: asyncio.Transport) -> None:
    raw = transport.get_extra_info("socket")
    if raw is not None:
        with suppress(OSError):  # no TCP
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, SEND_BUFFER)
