"""What every request passes on its way in and out: its id, the root path, the access log.

Used by app.py, around the routes. Invariant: every reply bears x-request-id; the log has one line a request, JSON, when
it is over, without query, headers or bodies, which may hold what is private.
"""

import logging
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any, Final

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import StartupError

REQUEST_ID: Final = b"x-request-id"
"""OpenAI's name; Anthropic's is request-id, so replies have both."""
_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")


class Access:
    """An ASGI application around another. `log` is None for no log."""

    def __init__(self, app: ASGIApp, root_path: str = "", log: logging.Logger | None = None) -> None:
        self._app = app
        self._root = root_path.rstrip("/")
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
        request_id = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}".encode()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode()
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (REQUEST_ID, request_id),
                    (b"request-id", request_id),
                ]
            await send(message)

        path = scope["path"]
        if self._root and path.startswith(self._root + "/"):
            scope["path"] = path[len(self._root) :]
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if self._log is not None:
                self._log.info(_line(scope, status, time.monotonic() - began))


def access_log(target: str | None) -> logging.Logger | None:
    """Return the log of --access-log: a file, which may be rotated, or "-" for stdout. Raises StartupError."""
    if target is None:
        return None
    try:
        handler = logging.StreamHandler(sys.stdout) if target == "-" else WatchedFileHandler(target, encoding="utf-8")
    except OSError as error:
        raise StartupError(f"--access-log {target}: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("actorserve.access")
    for before in list(log.handlers):
        log.removeHandler(before)
        before.close()
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO)
    return log


def _line(scope: Scope, status: int, seconds: float) -> str:
    state: dict[str, Any] = scope["state"]
    prompt, generated = state.get("tokens", (0, 0))
    client = scope.get("client")
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": state["request_id"],
        "client": client[0] if client else None,
        "key": state.get("key"),
        "method": scope["method"],
        "path": scope["path"],
        "status": status or 499,
        "seconds": round(seconds, 4),
        "prompt_tokens": prompt,
        "generated_tokens": generated,
    }
    return msgspec.json.encode(line).decode()
