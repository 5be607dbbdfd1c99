"""A request that comes from inside: an endpoint's whole reply, without a connection.

Used by batch_runner.py and by `actorserve batch`. Invariant: the endpoint cannot tell it from a request of a client
that stays; when the caller is cancelled, so is what the endpoint asked the engine for.
"""

import asyncio
from typing import NamedTuple

from starlette.types import ASGIApp, Message


class InnerReply(NamedTuple):
    status: int
    body: bytes


async def inner_call(endpoint: ASGIApp, path: str, body: bytes, owner: str, request_id: str) -> InnerReply:
    """POST a JSON body, as the owner of an API key (its name; "" without keys)."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]
    parts: list[bytes] = []
    status = 0

    async def receive() -> Message:
        if not waiting:
            await asyncio.Event().wait()  # the client stays
        return waiting.pop()

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [],
        "path_params": {},
        "state": {"owner": owner, "request_id": request_id},
    }
    await endpoint(scope, receive, send)
    return InnerReply(status, b"".join(parts))
