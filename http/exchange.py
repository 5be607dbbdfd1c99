"""Exchange: one HTTP request and its reply, directly on ASGI. Every route's handler gets one.

Invariant: at most one reply is started; the body is counted while it is read; a client that goes away ends the stream
of chunks that is being produced for it, whether it streams or waits.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.datastructures import QueryParams
from starlette.types import Message, Receive, Scope, Send

from ..errors import ActorserveError, RequestError
from .error_replies import OPENAI_ERRORS, ErrorShape, error_headers, invalid_field

T = TypeVar("T")
Header = tuple[bytes, bytes]
JSON = b"application/json"
SSE = b"text/event-stream; charset=utf-8"


class Cancellable(Protocol):
    """Work for a client: a Stream, or more of them."""

    def cancel(self, error: ActorserveError | None = None) -> None: ...


class Outlet(Protocol):
    """A way past the ASGI layers for parts of a body that has begun and not ended, where there is one."""

    @property
    def ready(self) -> bool:
        """Whether `write` takes something now: the client keeps up, and is there."""

    def write(self, body: bytes) -> None:
        """Send a part; only while `ready`."""


class ClientGone(ActorserveError):
    """The client closed its connection; there is nobody to reply to. 499 is what access logs call it."""

    status = 499
    code = "client_gone"


class Exchange:
    """See the module's text. `status` is the one replied with, 0 before; `errors` is how they are written."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        errors: ErrorShape = OPENAI_ERRORS,
        outlet: Outlet | None = None,
    ) -> None:
        self.scope = scope
        self.errors = errors
        self.inside = "owner" in self.state
        """It comes from inner_call."""
        self.owner: str = self.state.get("owner", "")
        """Name of the API key; "" where there are none."""
        self.status = 0
        self.writes = 0
        """Parts of the body so far."""
        self._receive = receive
        self._send = send
        self.outlet = outlet
        """May be used in place of `write`, also by who cannot wait."""
        self._finished = False

    @property
    def state(self) -> dict[str, Any]:
        """What is known of the request: `owner`, `request_id`, `key`, `tokens`, `outlet`."""
        state: dict[str, Any] = self.scope.setdefault("state", {})
        return state

    @property
    def path_id(self) -> str:
        """The {id} in the route's path."""
        return str(self.scope["path_params"]["id"])

    def query(self, kind: type[T]) -> T:
        """Return what follows the ? in the address, as a struct. Raises RequestError naming the parameter."""
        given = dict(QueryParams(self.scope.get("query_string", b"")))
        try:
            return msgspec.convert(given, kind, strict=False)
        except msgspec.ValidationError as error:
            raise invalid_field(str(error)) from None

    async def receive_any(self) -> Message:
        """Return what the client does next."""
        return await self._receive()

    async def receive(self) -> Message:
        """Return more of the body. Raises ClientGone."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed the connection")
        return message

    async def body(self, limit: int) -> bytes:
        """Read the whole body. Raises RequestError (413) as soon as it is above `limit` bytes, or ClientGone."""
        # The rest of a body that is too large is read and dropped by the server: a client that is still sending
        # would otherwise lose the reply to a connection reset.
        for name, value in self.scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > limit:
                raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    @asynccontextmanager
    async def watched(self, stream: Cancellable) -> AsyncIterator[None]:
        """While inside, a disconnect cancels `stream` (its reader gets ClientGone); on leaving, it is cancelled."""
        watcher = asyncio.create_task(self._watch(stream))
        try:
            yield
        finally:
            watcher.cancel()
            stream.cancel()

    async def reply(
        self, body: bytes, status: int = 200, content_type: bytes = JSON, headers: Iterable[Header] = ()
    ) -> None:
        """Send a whole reply."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, [(b"content-type", content_type), length, *headers])
        await self.write(body, last=True)

    async def start_events(self) -> None:
        """Start a reply of server-sent events."""
        # The last header stops nginx from collecting events.
        headers = [(b"content-type", SSE), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self.start(200, headers)

    async def write(self, body: bytes, last: bool = False) -> None:
        """Send a part of the body. Waits while the client is slow to read."""
        self._finished = last
        self.writes += 1
        if not last and self.outlet is not None and self.outlet.ready:
            self.outlet.write(body)
        else:
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def relay(self, message: Message) -> None:
        """Send a message of another reply."""
        if message["type"] == "http.response.start":
            await self.start(message["status"], message["headers"])
        else:
            await self.write(message["body"], last=not message["more_body"])

    async def fail(self, error: ActorserveError, headers: Sequence[Header] = ()) -> None:
        """Reply with an error; inside a stream of events as its last event, without the usual end."""
        if not self.status:
            await self.reply(self.errors.body(error), error.status, headers=[*headers, *error_headers(error)])
        elif not self._finished:
            await self.write(self.errors.event(self.errors.body(error)), last=True)

    async def start(self, status: int, headers: list[Header]) -> None:
        """Start a reply whose body follows by `write`."""
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _watch(self, stream: Cancellable) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        stream.cancel(ClientGone("the client closed the connection"))


def _too_large(limit: int) -> RequestError:
    return RequestError(f"the body is above {limit} bytes", code="body_too_large", status=413)
