"""JSON over HTTP for the backends that are servers: one connection pool a backend, retries, events of a stream.

Invariant: what a server answers is turned into this project's errors: RequestError for 4xx, Overloaded for 429 and
EngineDown for the rest, after `max_retries` further tries where another one may help.
"""

import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec

from ..errors import ActorserveError, EngineDown, Overloaded, RequestError, StartupError
from .loop import LOOP

if TYPE_CHECKING:
    import httpx

RETRIED: Final = frozenset({408, 409, 429, 500, 502, 503, 504})
LONGEST_PAUSE: Final = 30.0
"""Seconds between two tries, whatever the server asks for."""


class Http:
    """A server. Everything but the constructor belongs to the language's loop."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        timeout: float = 600.0,
        max_retries: int = 2,
        verify: Any = True,
    ) -> None:
        """`timeout`: seconds. Raises StartupError where httpx is not installed."""
        self._httpx = _module()
        self._options = {
            "base_url": base_url.rstrip("/"),
            "headers": dict(headers),
            "timeout": timeout,
            "verify": verify,
            "limits": self._httpx.Limits(max_connections=None, max_keepalive_connections=64),
        }
        self._max_retries = max_retries
        self._clients: dict[int, httpx.AsyncClient] = {}
        """By LOOP.forks: in a forked child those before its own are its parent's, who has their loop."""

    async def get(self, path: str) -> Any:
        """The reply's JSON. Raises ActorserveError."""
        return await self._call("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The reply's JSON; None for a reply that is none. Raises ActorserveError."""
        return await self._call("POST", path, body)

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        """The JSON of each `data:` of a stream, without "[DONE]". Raises ActorserveError."""
        content = msgspec.json.encode(body)
        try:
            async with self._open().stream("POST", path, content=content, headers=_JSON) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise _error(response)
                async for line in response.aiter_lines():
                    if line.startswith("data:") and line[5:].strip() != "[DONE]":
                        yield msgspec.json.decode(line[5:].strip())
        except self._httpx.HTTPError as error:
            raise _unreachable(error) from error

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        content = None if body is None else msgspec.json.encode(body)
        for left in range(self._max_retries, -1, -1):
            try:
                response = await self._open().request(method, path, content=content, headers=_JSON)
            except self._httpx.HTTPError as error:
                if not left:
                    raise _unreachable(error) from error
                await anyio.sleep(self._pause(left))
                continue
            if response.status_code < 400:
                return _decoded(response)
            if not left or response.status_code not in RETRIED:
                raise _error(response)
            await anyio.sleep(min(_retry_after(response) or self._pause(left), LONGEST_PAUSE))
        raise AssertionError("the last try returns or raises")

    def _pause(self, left: int) -> float:
        return float(0.5 * 2 ** (self._max_retries - left))

    def _open(self) -> "httpx.AsyncClient":
        client = self._clients.get(LOOP.forks)
        if client is None:
            client = self._clients[LOOP.forks] = self._httpx.AsyncClient(**self._options)
            weakref.finalize(self, _end, LOOP.forks, client).atexit = False
        return client


_JSON: Final = {"content-type": "application/json"}


def _end(forks: int, client: "httpx.AsyncClient") -> None:
    if forks == LOOP.forks:
        LOOP.start(_close, client)


async def _close(client: "httpx.AsyncClient") -> None:
    with suppress(Exception):  # whatever a connection says at its end, nobody waits for it
        await client.aclose()


def _module() -> ModuleType:
    try:
        import httpx
    except ImportError:
        raise StartupError("backends behind HTTP need httpx: pip install 'actorserve[lang]'") from None
    return httpx


def _decoded(response: "httpx.Response") -> Any:
    try:
        return msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        return None


def _retry_after(response: "httpx.Response") -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.replace(".", "", 1).isdecimal() else None


def _error(response: "httpx.Response") -> ActorserveError:
    """The error of a reply in OpenAI's form, or in none."""
    body = _decoded(response)
    inner = body.get("error", body) if isinstance(body, dict) else {}
    fields = inner if isinstance(inner, dict) else {"message": str(inner)}
    message = str(fields.get("message") or response.text[:200] or "no reason given")
    text, status = f"the server answers {response.status_code}: {message}", response.status_code
    if status == 429:
        return Overloaded(text)
    if status < 500:
        return RequestError(text, param=fields.get("param"), code=str(fields.get("code") or "rejected"), status=status)
    return EngineDown(text, status=status)


def stopped(error: Any) -> RequestError:
    """What ends a stream amid which a server tells an error; most tell it in OpenAI's form."""
    said = error.get("message") if isinstance(error, dict) else error
    return RequestError(f"the server stopped: {said}", status=502)


def _unreachable(error: Exception) -> EngineDown:
    return EngineDown(f"the server cannot be reached: {type(error).__name__} {error}".rstrip())
