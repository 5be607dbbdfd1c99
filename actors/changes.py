"""What the scheduler sends a sampler ahead of the window in which it takes effect.

Used by the sampler and by the stub's. The messages come before their window's plan, but through another lane, and the
slots that they are about may still run for other requests until then. Invariant: a change is applied once, in the
order of arrival, with its own window and never before.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from .inbox import Inbox

SYNC_SECONDS: Final = 5.0
State = TypeVar("State")


class WindowChanges(Generic[State]):
    """Changes of some state that wait for their windows."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Callable[[State], None]]] = deque()
        """(window, change) in the order of arrival."""

    def add(self, window: int, change: Callable[[State], None]) -> None:
        """Keep a change for its window."""
        self._pending.append((window, change))

    def clear(self) -> None:
        """Forget all: who sent them died."""
        self._pending.clear()

    def apply(
        self, window: int, count: int, state: State, inbox: Inbox, receive: Callable[[object, str], None]
    ) -> None:
        """Apply what was sent for `window`, `count` messages, of which the last may be a moment late.

        What is in `inbox` is given to `receive`, which adds it here.

        Raises:
            RuntimeError: they did not come (the scheduler broke its promise).
        """
        deadline = time.monotonic() + SYNC_SECONDS
        while count:
            while (item := inbox.poll()) is not None:
                receive(*item)
            while count and self._pending and self._pending[0][0] <= window:
                number, change = self._pending.popleft()
                change(state)
                count -= number == window
            if count and time.monotonic() > deadline:
                raise RuntimeError(f"{count} messages to the sampler are missing for window {window}")
