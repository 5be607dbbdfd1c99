"""The slots of the executor's batch, as arrays: what the scheduler must know of every row in every window.

Arrays instead of a loop over requests keep the cost of a window flat: at 256 running requests it is a few numpy
calls. Invariant: a slot is free (no request) or holds one request; only its decoding rows are in a step.
"""

import numpy as np

from .request import Request


class SlotTable:
    """`horizon`, `cap` in tokens of KV; `pages` in pages; all int64 [size]."""

    def __init__(self, size: int, jumps: bool = True) -> None:
        """`jumps` False: nobody jumps (jumps.py)."""
        self.size = size
        self._jumps = jumps
        self.free = list(range(size - 1, -1, -1))
        self.requests: list[Request | None] = [None] * size
        self.decoding = np.zeros(size, dtype=bool)
        self.horizon = np.zeros(size, dtype=np.int64)
        """Tokens whose KV is written once all plans sent so far have run: an upper bound."""
        self.cap = np.zeros(size, dtype=np.int64)
        """Where `horizon` ends: the last token's KV is never needed."""
        self.pages = np.zeros(size, dtype=np.int64)
        self.jumps = np.zeros(size, dtype=bool)
        """The request may jump over forced tokens."""
        self.guided = np.zeros(size, dtype=bool)
        """Each of its tokens needs a mask: its row is `decoding` only while there is one that is not planned yet."""

    def take(self, request: Request) -> None:
        """Seat a request whose pages cover its prompt."""
        slot = self.free.pop()
        request.slot = slot
        self.requests[slot] = request
        self.horizon[slot] = request.target
        self.cap[slot] = max(request.limit - 1, request.target)
        self.pages[slot] = len(request.pages)
        self.decoding[slot] = False
        self.jumps[slot] = self._jumps and request.jumps
        self.guided[slot] = request.guided is not None

    def give_back(self, slot: int) -> None:
        """Free a slot. Its row may still run in windows under way; the executor applies the release in order."""
        self.requests[slot] = None
        self.decoding[slot] = self.jumps[slot] = self.guided[slot] = False
        self.horizon[slot] = self.cap[slot] = self.pages[slot] = 0
        self.free.append(slot)

    @property
    def empty(self) -> bool:
        """No request is seated."""
        return len(self.free) == self.size

    def running(self) -> list[Request]:
        """Return the seated requests."""
        return [r for r in self.requests if r is not None]

    def decoding_rows(self) -> np.ndarray:
        """Return the decoding slots that have steps left to plan, int64."""
        return np.flatnonzero(self.decoding & (self.horizon < self.cap))

    def remaining(self) -> int:
        """Return the tokens that the seated requests may still add."""
        return int((self.cap - self.horizon).sum())

    def pages_short(self, rows: np.ndarray, steps: int, page_size: int) -> np.ndarray:
        """Return int64 [rows]: pages that each row lacks for `steps` more tokens."""
        reach = np.minimum(self.horizon[rows] + steps, self.cap[rows])
        short: np.ndarray = np.maximum(-(-reach // page_size) - self.pages[rows], 0)
        return short
