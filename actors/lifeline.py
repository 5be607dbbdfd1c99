"""The lifeline: the socket between an embedded engine's root and its host. One datagram a status, upwards only.

Used by embedded_root.py and embedded_host.py. Invariant: its end means the end: shut by the host or gone with it, the
root stops; closed by the root, nothing of the engine is left.
"""

import socket
import time
from contextlib import suppress
from typing import Final, TypeAlias

import msgspec

PROGRESS_SECONDS: Final = 0.1
MAX_STATUS: Final = 64 << 10
MAX_TEXT: Final = 16_000


class Status(msgspec.Struct, frozen=True, array_like=True):
    """Base of what the root tells its host, one datagram each."""


class Progress(Status, frozen=True, tag=1):
    """A stage of the start is at `fraction` (0 to 1)."""

    stage: str
    fraction: float


class Up(Status, frozen=True, tag=2):
    """All nodes are ready."""


class Failed(Status, frozen=True, tag=3):
    """The engine cannot start, or gave up; the root ends."""

    message: str


AnyStatus: TypeAlias = Progress | Up | Failed
_decoder: Final = msgspec.msgpack.Decoder(AnyStatus)


def receive(lifeline: socket.socket) -> AnyStatus | None:
    """Return the next status, or None at the end. Raises BlockingIOError when there is none yet."""
    try:
        data = lifeline.recv(MAX_STATUS, socket.MSG_DONTWAIT)
    except ConnectionError:
        return None
    return _decoder.decode(data) if data else None


class Speaker:
    """Speaks up the lifeline without ever waiting: what the host does not read in time is lost."""

    def __init__(self, lifeline: socket.socket) -> None:
        self._lifeline = lifeline
        self._spoke = 0.0

    def say(self, status: AnyStatus) -> None:
        """Send one status; the host may be gone."""
        with suppress(OSError):
            self._lifeline.send(msgspec.msgpack.encode(status), socket.MSG_DONTWAIT)

    def fail(self, text: str) -> None:
        """Send a Failed; of a long text its end, where tracebacks say what happened."""
        self.say(Failed(text[-MAX_TEXT:]))

    def progress(self, stage: str, fraction: float) -> None:
        """Send a Progress, unless the last one was a moment ago."""
        now = time.monotonic()
        if now - self._spoke >= PROGRESS_SECONDS:
            self._spoke = now
            self.say(Progress(stage, fraction))

    def transfer(self, stage: str, done: int, total: int) -> None:
        """Take the progress of a download or conversion, in bytes."""
        self.progress(stage, done / total if total else 0.0)

    def event(self, kind: str, node: str, detail: str, fraction: float) -> None:
        """Take an event of the supervisor."""
        if kind == "progress":
            self.progress(detail, fraction)
        elif kind == "up":
            self.say(Up())
