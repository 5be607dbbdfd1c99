"""Streams that outlive their connection: `id:` on every event, and `Last-Event-ID` to go on from one.

Used by app.py, around the endpoints that stream. A request with the header `x-resumable: true` (or each one, with
--resumable-streams) is answered into an EventLog, from which any number of connections read. Invariant: who reads from
the start, and who breaks off and goes on from the last id, get the same events; without a reader for RESUME_SECONDS a
stream that still runs is aborted, and forgotten; at once, if it is none or has not begun: nobody has an id then.
"""

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RequestError
from .exchange import SSE

RESUME_SECONDS: Final = 60.0
MOST_BYTES: Final = 64 << 20
"""Of all logs that no request writes any more; beyond it the oldest go."""
_YES: Final = (b"true", b"1")


class EventLog:
    """The reply to one request, as ASGI messages: its start, and what follows, an event each.

    A reply that is no stream of events passes through as it is, and cannot be resumed.
    """

    def __init__(self, owner: Callable[[], str]) -> None:
        self.name = uuid.uuid4().hex
        self.owner = owner
        """Who may read it; known when the request was let in."""
        self.start: Message | None = None
        self.parts: list[bytes] = []
        self.finished = False
        self.size = 0
        self.readers = 0
        self.abandoned = asyncio.Event()
        self.timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    @property
    def is_events(self) -> bool:
        return self.start is not None and (b"content-type", SSE) in self.start["headers"]

    async def send(self, message: Message) -> None:
        """Take a message of the endpoint. Never waits."""
        if message["type"] == "http.response.start":
            self.start = message
        else:
            body: bytes = message.get("body", b"")
            for part in body.split(b"\n\n")[:-1] if self.is_events else [body]:
                self._add(part)
            self.finished = not message.get("more_body", False)
        self.wake()

    def end(self) -> None:
        """The endpoint has returned; no more comes, also if it did not say so."""
        self.finished = True
        self.wake()

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, send: Send, after: int) -> None:
        """Send what comes after part `after`, until the end."""
        while self.start is None and not self.finished:
            await self._changed.wait()
        if self.start is None:
            return  # the endpoint had nobody to reply to
        await send(dict(self.start))
        at = after + 1
        while True:
            body = b"".join(self.parts[at:])
            at = max(at, len(self.parts))
            await send({"type": "http.response.body", "body": body, "more_body": not self.finished})
            if self.finished:
                return
            await self._changed.wait()

    def _add(self, part: bytes) -> None:
        if self.is_events:
            head = b"" if part.startswith(b":") else f"id: {self.name}-{len(self.parts)}\n".encode()
            part = head + part + b"\n\n"
        self.parts.append(part)
        self.size += len(part)


class EventLogs:
    """The logs of one front, by name."""

    def __init__(self) -> None:
        self._logs: OrderedDict[str, EventLog] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, event_id: str, owner: str) -> tuple[EventLog, int]:
        """Return (log, number of the event). Raises RequestError (404)."""
        name, _, number = event_id.rpartition("-")
        log = self._logs.get(name)
        if log is None or log.owner() != owner or not (number.isascii() and number.isdigit() and len(number) < 10):
            what = f"there is no stream to resume here; one is kept for {RESUME_SECONDS:.0f} s"
            raise RequestError(what, param="Last-Event-ID", code="stream_not_found", status=404)
        return log, int(number)

    def open(self, endpoint: ASGIApp, scope: Scope, receive: Receive) -> tuple[EventLog, asyncio.Event]:
        """Have an endpoint answer into a new log; (log, set when the request's body was read)."""
        log = EventLog(lambda: scope["state"].get("key") or "")
        self._logs[log.name] = log
        body_read = asyncio.Event()

        async def receive_body() -> Message:
            if body_read.is_set():
                await log.abandoned.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if not message.get("more_body", False):
                body_read.set()
            return message

        async def answer() -> None:
            try:
                await endpoint(scope, receive_body, log.send)
            finally:
                body_read.set()
                log.end()
                self._trim()

        task = asyncio.create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return log, body_read

    async def follow(self, log: EventLog, after: int, send: Send, left: Coroutine[Any, Any, None]) -> None:
        """Read a log until its end, or until `left` (client_left) returns."""
        if log.timer is not None:
            log.timer.cancel()
        log.readers += 1
        reading = asyncio.create_task(log.read(send, after))
        leaving = asyncio.create_task(left)
        try:
            await asyncio.wait([reading, leaving], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            leaving.cancel()
            log.readers -= 1
            if not log.readers:
                seconds = RESUME_SECONDS if log.is_events else 0  # of anything else nobody has an id
                log.timer = asyncio.get_running_loop().call_later(seconds, self._expire, log)

    def _expire(self, log: EventLog) -> None:
        log.abandoned.set()
        self._logs.pop(log.name, None)

    def _trim(self) -> None:
        ended = [log for log in self._logs.values() if log.finished and not log.readers]
        size = sum(log.size for log in ended)
        for log in ended:
            if size > MOST_BYTES:
                size -= log.size
                self._expire(log)


def wants_log(scope: Scope, always: bool) -> bool:
    """Whether a request asks for a stream that can be resumed."""
    return always or header(scope, b"x-resumable").lower() in _YES


def header(scope: Scope, name: bytes) -> bytes:
    """Return a header of the request, or nothing."""
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")


async def client_left(receive: Receive, body_read: asyncio.Event | None = None) -> None:
    """Return when the client has left; `body_read` is set when its request has been read."""
    if body_read is not None:
        await body_read.wait()
    while (await receive())["type"] != "http.disconnect":
        continue
