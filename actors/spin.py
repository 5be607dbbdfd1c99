"""When a wait begins with watching instead of sleep: a decision from how the last waits went.

Each Inbox owns one Spin. Waking a sleeper on another core takes an interrupt, 10 to 40 us where the kernel has halted
that core; when the next message comes soon, watching the rings for it (ring.Watch) is several times faster and takes
less CPU than sleeping. Messages carry the time at which they were sent, so each wait that slept tells whether watching
would have paid: nothing is tried blindly. Invariant: a wait watches for at most LONGEST, and after MISSES failures in
a row not again before a growing number of sleeps in a row says so. What comes rarely, wakes cheaply because both sides
share a core, or finds no core free thus costs next to no spinning.
"""

from typing import Final

LONGEST: Final = 60_000
"""ns: a peer that sleeps itself needs a wake-up, some 30 us, and a while to answer."""
DEAR: Final = 8_000
"""ns from sending to receiving from which a wake-up is worth avoiding; on a shared core it takes less."""
DISTURBED: Final = 4_000
"""ns between two looks of a watcher, which takes below 1 us a look: its core was taken away, so it should sleep."""
STREAK: Final = 8
"""Sleeps in a row that watching would have spared, before it is tried."""
CAUTION: Final = 1024
"""The same after many attempts in vain: STREAK doubles with each, up to this."""
MISSES: Final = 2


class Spin:
    """`on` says whether the next wait should watch first; `slept` and `watched` tell how a wait went."""

    __slots__ = ("_caught", "_misses", "_needed", "_streak", "on")

    def __init__(self) -> None:
        self.on = False
        self._streak = self._misses = self._caught = 0
        self._needed = STREAK

    def slept(self, began_ns: int, sent_ns: int, received_ns: int) -> None:
        """A wait that began at `began_ns` slept until a message came that was sent at `sent_ns`."""
        if sent_ns - began_ns >= LONGEST or received_ns - sent_ns <= DEAR:
            self._streak = 0
            return
        self._streak += 1
        if self._streak >= self._needed:
            self.on = True
            self._streak = self._misses = self._caught = 0

    def watched(self, well: bool) -> None:
        """A message came while we watched, on a core of our own; or not."""
        if well:
            self._caught += 1
            self._misses = 0
            return
        self._misses += 1
        if self._misses >= MISSES:
            self.on = False
            self._needed = STREAK if self._caught > self._needed else min(2 * self._needed, CAUTION)
