"""Streams without end against a server to which something happens: which were lost or changed, how long they paused.

Each worker asks one thing again and again; the answers can be compared with those of a time when nothing happened.
"""

import asyncio
import json
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from actorserve.perf.stream_client import Connection


class Answer:
    """What a stream of /v1/completions said, joined. Fed by a Connection, for which it is a Reply and its record."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[str] = []
        self.logprobs: list[float] = []
        self.ends: list[str] = []
        """Its finish reasons, then its [DONE]."""
        self.error: str | None = None
        self.pause = 0.0
        """The longest time between two events, in seconds."""
        self.record = self
        self._last = time.monotonic()
        self._rest = b""

    def __repr__(self) -> str:
        return f"Answer({self.text!r}, {len(self.tokens)} tokens, {self.ends}, {self.error!r})"

    def said(self, exact: bool) -> tuple[object, ...]:
        """What must not change; `exact`: logprobs too."""
        return (self.text, self.tokens, self.ends, self.error, self.logprobs if exact else None)

    def feed(self, data: bytes, now: float) -> None:
        """Take body bytes, cut anywhere."""
        self.pause, self._last = max(self.pause, now - self._last), now
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                self._take(line[6:])

    def close(self) -> None:
        """The body has ended."""
        if self._rest.strip():
            self.error = self.error or "it ends within a line"

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.ends.append("[DONE]")
            return
        event = json.loads(data)
        if "error" in event:
            self.error = str(event["error"])
        for choice in event.get("choices", ()):
            self.text += choice["text"]
            given = choice.get("logprobs") or {}
            self.tokens += given.get("tokens", ())
            self.logprobs += given.get("token_logprobs", ())
            if choice["finish_reason"] is not None:
                self.ends.append(choice["finish_reason"])


async def stream(url: str, body: dict[str, Any]) -> Answer:
    """Ask /v1/completions and read all of it."""
    address, answer = urlsplit(url), Answer()
    data = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-length: {len(data)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(time.monotonic), address.hostname, address.port)
    await connection.send(head.encode() + data, answer)  # type: ignore[arg-type]  # as much of a Reply as it needs
    connection.close()
    return answer


class LiveLoad:
    """`with LiveLoad(url, bodies) as load:` keeps a stream of each body running; `answers` are those that ended."""

    def __init__(self, url: str, bodies: list[dict[str, Any]]) -> None:
        self.bodies = bodies
        self.answers: list[tuple[int, Answer]] = []
        """(number of the body, the answer)"""
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def once(self) -> list[Answer]:
        """Ask each once, all at the same time."""
        self._stop.set()
        asyncio.run(self._run())
        return [answer for _, answer in sorted(self.answers, key=lambda item: item[0])]

    def __enter__(self) -> "LiveLoad":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let the running streams end."""
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        await asyncio.gather(*(self._ask_again_and_again(i) for i in range(len(self.bodies))))

    async def _ask_again_and_again(self, number: int) -> None:
        while True:
            self.answers.append((number, await stream(self._url, self.bodies[number])))
            if self._stop.is_set():
                return
