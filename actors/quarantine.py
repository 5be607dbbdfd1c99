"""Quarantine: requests of which an actor died until they were refused, so that the same is not tried again.

Clients send again what was answered by 503; each time would cost the engine two or three deaths, and after few of them
it gives up. Part of the Client: each front has its own. Invariant: at most MOST digests are kept, each for SECONDS.
"""

import time
from hashlib import blake2b
from typing import Final

import msgspec

from ..errors import RequestError
from . import messages
from .admission import Submission

CODES: Final = frozenset({"text_crashed", "scheduler_crashed", "fsm_crashed", "executor_crashed"})
"""Of the refusals that bring a request here."""
MOST: Final = 1024
SECONDS: Final = 3600.0
_encode: Final = msgspec.msgpack.Encoder().encode


class Quarantine:
    """See the module's text."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}

    def add(self, asked: messages.Generate) -> None:
        """An actor died of it."""
        if len(self._until) >= MOST:
            del self._until[next(iter(self._until))]
        self._until[_digest(asked)] = time.monotonic() + SECONDS

    def check(self, asked: Submission) -> None:
        """Raise RequestError if it is the same as one that is here."""
        if not self._until:
            return
        try:
            until = self._until.get(_digest(asked))
        except (ValueError, OverflowError):
            return  # it cannot even be sent: no actor has seen it
        if until is not None and until > time.monotonic():
            text = "an actor of the engine died of this very request, again and again; it is not tried for an hour"
            raise RequestError(text, code="quarantined")


def _digest(asked: messages.Generate | Submission) -> bytes:
    """Of what may make an actor die: all but who asks, when, and under which name."""
    return blake2b(_encode((asked.prompt, asked.params, asked.grammar, asked.n, asked.pooled)), digest_size=16).digest()
