"""What an actor is working on, written where it outlives the actor: who reads it after a death knows the cause.

A node's actors note the id of each request before they work on it; the note is a number in a page of memory that the
supervisor shares, so that it is there whatever the process died of. When a node dies of itself, its neighbours get the
notes with PeerDown. `Suspects` counts: what an actor died of MAX_DEATHS times is not tried again, and what was only
near, in a queue or in the same second, is not blamed at all. Invariant: a note is taken back only when the work it is
of has ended well: no `finally`, since an exception ends the actor.
"""

import mmap
import os
import threading
from typing import Final

from .messages import PeerDown

DESK: Final = "desk"
"""The page among a node's files (control.Boot)."""
MAX_DEATHS: Final = 2
NOBODY: Final = -1
"""No request's id."""
_CELLS: Final = 64
_BYTES: Final = 8 * _CELLS


class Desk:
    """The notes of a node. Cell 0 is of the thread that runs the loop; others are of threads beside it."""

    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor`: of `make_page`, which may be closed afterwards; None: nobody reads it."""
        self._memory = None if descriptor is None else mmap.mmap(descriptor, _BYTES)
        self._cells = memoryview(self._memory or bytearray(_BYTES)).cast("q")
        self._lock = threading.Lock()

    def now(self, rid: int) -> None:
        """The loop works on this request."""
        self._cells[0] = rid + 1

    def rest(self) -> None:
        """It does not any more."""
        self._cells[0] = 0

    def begin(self, rid: int) -> int:
        """A thread works on this request; what `end` takes is returned."""
        with self._lock:
            cell = next((i for i in range(1, _CELLS) if not self._cells[i]), _CELLS)
            if cell < _CELLS:
                self._cells[cell] = rid + 1
        return cell

    def end(self, cell: int) -> None:
        """It does not any more."""
        if cell < _CELLS:
            self._cells[cell] = 0

    def close(self) -> None:
        """Its actors work no more."""
        self._cells = memoryview(bytearray(_BYTES)).cast("q")
        if self._memory is not None:
            self._memory.close()


class Suspects:
    """How often an actor died while it worked on a request."""

    def __init__(self) -> None:
        self._deaths: dict[int, int] = {}

    def guilty(self, down: PeerDown) -> list[int]:
        """The requests of which it died for the last time."""
        found = []
        for rid in down.at_work if down.fault else ():
            deaths = self._deaths.pop(rid, 0) + 1
            if deaths < MAX_DEATHS:
                self._deaths[rid] = deaths
            else:
                found.append(rid)
        return found


def make_page() -> int:
    """The descriptor of a page for a Desk."""
    descriptor = os.memfd_create("actorserve-desk", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _BYTES)
    return descriptor


def read_page(descriptor: int) -> list[int]:
    """The requests that a node works on, or worked on when it died."""
    cells = memoryview(os.pread(descriptor, _BYTES, 0)).cast("q")
    return sorted({cell - 1 for cell in cells if cell})
