"""Work that lets others go first, and gives way to everybody when it takes long: for compilers on the cores of a model.

Used by fsm_worker.py and match_crew.py. Each piece of work runs in a thread of its own: priorities are a thread's on
Linux, and without privileges no thread gets a better one back. It begins nicer than its process: where all cores are
busy it has a tenth of one, and the steps of others' tokens are hardly longer. Giving way is SCHED_IDLE: a core that has
anything else to do leaves such a thread at once, where a merely nicer one first takes what its turn is worth; so it
must hold nothing that others wait for, and who waits for it must know that from being slow (fsm/budget.py). Where cores
are free, or none of it is wasted, nothing is slower for it.
Invariant: work begins with the same priority, whatever the work before it was; over a long time at most REFILL of a
core is wasted at that priority, and LEAST a piece.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")
NICE: Final = 10
"""A weight of 110 for 1,024, by Linux's table; nicer still, work on full cores would hardly go on."""
MOST: Final = 0.5
"""Seconds of a core that one piece of work takes before it gives way: what grammars take that mean no harm."""
LEAST: Final = 0.005
"""The same right after much was wasted."""
REFILL: Final = 0.01
"""Seconds that are won back in a second."""


def politely(work: Callable[[], T]) -> T:
    """Return what the work returns, which lets others go first; raises what it raises."""
    thread = _Thread(work)
    thread.start()
    thread.join()
    return thread.result()


class Courteous:
    """Does one piece of work after another; see the module's text."""

    def __init__(self, saved: float = MOST) -> None:
        """`saved`: seconds that may be wasted at first."""
        self._saved = saved
        self._since = time.monotonic()

    def do(self, work: Callable[[], T], wasted: Callable[[T], bool]) -> T:
        """Return what the work returns, and learn whether that was worth its time; raises what it raises."""
        thread = _Thread(work)
        thread.start()
        allowed = left = max(LEAST, self.saved())
        while left > 0 and thread.is_alive():
            thread.join(left)
            left = allowed - thread.used()
        if thread.is_alive():
            thread.give_way()
        thread.join()
        result = thread.result()
        if wasted(result):
            self._saved = max(0.0, self.saved() - thread.seconds)
        return result

    def saved(self) -> float:
        """Seconds that may be wasted now."""
        now = time.monotonic()
        self._saved = min(MOST, self._saved + REFILL * (now - self._since))
        self._since = now
        return self._saved


class _Thread(threading.Thread, Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._made: list[T] = []
        self._error: BaseException | None = None
        self.seconds = 0.0
        """Of a core, once it has ended."""

    def run(self) -> None:
        with contextlib.suppress(OSError):
            os.nice(NICE)  # this thread's alone, on Linux
        try:
            self._made.append(self._work())
        except BaseException as error:
            self._error = error
        self.seconds = time.thread_time()

    def used(self) -> float:
        """Seconds of a core so far."""
        try:
            with open(f"/proc/self/task/{self.native_id}/schedstat", encoding="ascii") as file:
                return int(file.read().split()[0]) / 1e9
        except OSError:  # it has ended
            return self.seconds

    def give_way(self) -> None:
        """Have only what nobody else wants; where that is not allowed, it goes on as it is."""
        assert self.native_id is not None
        with contextlib.suppress(OSError):
            os.sched_setscheduler(self.native_id, os.SCHED_IDLE, os.sched_param(0))

    def result(self) -> T:
        """What the work returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._made[0]
