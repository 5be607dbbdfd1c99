"""A Group of threads in one process, for tests of what the ranks compute together."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
PATIENCE = 60.0


class Meeting:
    """Where the ranks leave their tensors for each other."""

    def __init__(self, size: int) -> None:
        self.left: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.calls: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(size)]
        """What each rank called, with the shapes."""


class ThreadGroup:
    """See parallel.Group. A rank that fails releases the others."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, len(meeting.left)

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._all("sum", x)).sum(0)

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._all("gather", x))

    def broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(self._all("broadcast", x)[0])

    def least(self, number: int) -> int:
        return int(min(self._all("least", torch.tensor(number))))

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        yield

    def _all(self, name: str, x: Tensor) -> list[Tensor]:
        self.meeting.calls[self.rank].append((name, tuple(x.shape)))
        self.meeting.left[self.rank] = x.clone()
        self.meeting.barrier.wait()
        found = list(self.meeting.left)
        self.meeting.barrier.wait()
        return found


def on_ranks(size: int, work: Callable[[ThreadGroup], Result]) -> list[Result]:
    """Run `work` on every rank of a new group; return the ranks' results. All ranks must have called the same."""
    meeting = Meeting(size)

    def run(rank: int) -> Result:
        try:
            return work(ThreadGroup(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        tasks = [pool.submit(run, rank) for rank in range(size)]
        errors = [task.exception() for task in tasks]
        cause = next((e for e in errors if e is not None and not isinstance(e, threading.BrokenBarrierError)), None)
        if cause is not None:
            raise cause
        assert all(calls == meeting.calls[0] for calls in meeting.calls)
        return [task.result() for task in tasks]
