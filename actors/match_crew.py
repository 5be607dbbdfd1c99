"""Threads that do jobs, and hand on together what was asked for together.

Used by match_pool.py. What takes longer than DEADLINE is handed on later by itself. Invariant: each job that was added
is done once and handed on once, after that; as long as one waits, no thread of the crew rests.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import trio

from .courtesy import politely

Job = TypeVar("Job")
DEADLINE: Final = 0.005
"""Seconds that a job may make others wait that came with it."""


class Crew(Generic[Job]):
    """`do` runs in its threads and raises nothing; `hand_on` in the loop's."""

    def __init__(
        self, threads: int, do: Callable[[Job], None], hand_on: Callable[[list[Job]], None], polite: bool
    ) -> None:
        """`polite`: others' threads go first (courtesy.py)."""
        self._do = do
        self._hand_on = hand_on
        self._polite = polite
        self._jobs: deque[Job] = deque()
        self._done: deque[Job] = deque()
        self._open = 0
        """Jobs that are queued or under way."""
        self._busy = [False] * threads
        self._asked = trio.Event()
        self._progress = trio.Event()

    def start(self, nursery: trio.Nursery) -> None:
        """Begin, until the nursery is cancelled."""
        limiter = trio.CapacityLimiter(len(self._busy))
        for number in range(len(self._busy)):
            nursery.start_soon(self._work, number, limiter)
        nursery.start_soon(self._answer)

    def add(self, job: Job) -> None:
        """Have a job done."""
        self._jobs.append(job)
        self._open += 1
        self._ring()

    def _ring(self) -> None:
        """Wake who waits for jobs."""
        self._asked.set()
        self._asked = trio.Event()

    async def _work(self, number: int, limiter: trio.CapacityLimiter) -> None:
        """Have a thread do jobs whenever there are some that the threads before this one are too busy for."""
        drain = (lambda: politely(self._drain)) if self._polite else self._drain
        while True:
            while not self._jobs or not all(self._busy[:number]):
                await self._asked.wait()
            self._busy[number] = True
            if len(self._jobs) > 1:
                self._ring()
            await trio.to_thread.run_sync(drain, limiter=limiter, abandon_on_cancel=True)
            self._busy[number] = False
            self._progress.set()
            self._progress = trio.Event()

    def _drain(self) -> None:
        """Do jobs until none is left; runs in several threads at once."""
        while True:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            self._do(job)
            self._done.append(job)

    async def _answer(self) -> None:
        """Hand on what is done: all that was asked for, or what is there at the deadline."""
        while True:
            while not self._open:
                await self._asked.wait()
            with trio.move_on_after(DEADLINE):
                while len(self._done) < self._open:
                    await self._progress.wait()
            done = [self._done.popleft() for _ in range(len(self._done))]
            self._open -= len(done)
            self._hand_on(done)
