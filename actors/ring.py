"""The work of a lane per message: Writer and Reader of one ring, and Watch, which looks at all rings of an inbox.

Used by lane.py and inbox.py, in C (ring.c) where a compiler and Python's headers are found, else as written here: the
same memory, checks and results, so the two ends may differ. Invariant: a reader sees only what was written completely
before, and none sleeps on what is there.

    words of the header page (u64)         written by
    HEAD, SENT          16, 17             the writer: bytes and frames published since the start
    TAIL, RECEIVED      32, 33             the reader: the same of what it took; hints, for metrics
    BELL                48                 the reader: what a writer has to do after it published

Order between the processes. The payload is written before HEAD and read after it: in C by release and acquire, in
Python because x86 keeps stores in order, and loads; elsewhere by the kernel (`_fence`). A reader sets BELL to ASLEEP
before it looks at HEAD for the last time, a writer looks at BELL after it moved HEAD: with full fences, which C has,
one of them sees the other, so a writer rings only for a reader that is asleep. x86 does not give that order by itself
and Python cannot ask for it: here a reader leaves BELL at ALWAYS, and a writer always rings. The bell is the lane's
data eventfd; that it is written also orders what came before for whom it wakes.
"""

import ctypes
import functools
import importlib.util
import os
import platform
import select
import struct
import time
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from ..errors import StartupError

HEADER: Final = 4096
FRAME_HEADER: Final = 16
BUCKETS: Final = 65
"""Of a histogram of times: as many as a u64 can have bits, and 0."""
HEAD, SENT, TAIL, RECEIVED, BELL = 16, 17, 32, 33, 48
"""u64 indices into the header page."""
AWAKE, ASLEEP, ALWAYS = 0, 1, 2
"""What BELL says: do not ring; ring, and set it to AWAKE; ring, and leave it."""

PAD: Final = 1 << 32
FIRST: Final = 1 << 33
REST: Final = 1 << 34
"""Flags of a frame, beside its length."""
_LENGTH = (1 << 32) - 1
_FLAGS = (0, FIRST, REST)
_pack_pair = struct.Struct("=QQ").pack_into

Payload = bytes | bytearray | memoryview


def _ring(eventfd: int, count: int, corrupt: type[Exception], what: str) -> None:
    try:
        os.eventfd_write(eventfd, count)
    except BlockingIOError:
        raise corrupt(f"the {what} counter was driven to its limit") from None


class Writer:
    """The writing end. `memory` is an mmap of header page and ring; `corrupt` is raised when the reader cheats."""

    __slots__ = (
        "_bytes",
        "_capacity",
        "_corrupt",
        "_eventfd",
        "_published",
        "_sent",
        "_words",
        "busy",
        "free_until",
        "position",
    )

    def __init__(self, memory: Any, eventfd: int, corrupt: type[Exception]) -> None:
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")
        self._capacity = len(self._bytes) - HEADER
        self._eventfd, self._corrupt = eventfd, corrupt
        self.position = self._published = self._sent = 0
        self.free_until = self._capacity
        """The position up to which the reader is known to have made room."""
        self.busy = False
        """A large message is under way: `send` refuses."""

    def send(self, payload: Payload) -> bool:
        """Put and publish one message; False, and nothing done, without known room, or if it is too large or `busy`."""
        if self.busy or not self.put(payload, 0):
            return False
        self.publish()
        return True

    def put(self, payload: Payload, flags: int) -> bool:
        """Copy one frame in, after padding where the ring ends; False, and nothing done, if there is no known room."""
        size, position, capacity = len(payload), self.position, self._capacity
        need = (size + (FRAME_HEADER + 7)) & ~7
        offset = position & (capacity - 1)
        pad = capacity - offset if need > capacity - offset else 0
        if need > capacity >> 2 or position + pad + need > self.free_until:
            return False
        start = HEADER + offset
        if pad:
            self._words[start >> 3] = PAD
            start = HEADER
        self._bytes[start + FRAME_HEADER : start + FRAME_HEADER + size] = payload
        _pack_pair(self._bytes, start, size | flags, time.monotonic_ns())
        self.position = position + pad + need
        self._sent += 1
        return True

    def publish(self) -> None:
        """Show the reader all that was put, and wake it."""
        if self._published != self.position:
            self._published = position = self.position
            if _fence is not None:
                _fence()
            words = self._words
            words[SENT] = self._sent
            words[HEAD] = position  # one store of eight bytes
            if words[BELL] == ASLEEP:
                words[BELL] = AWAKE  # so the reader knows that there is a wake-up to forget
            _ring(self._eventfd, 1, self._corrupt, "data")

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._bytes.release()


class Reader:
    """The reading end. Every number that the writer wrote is checked before it is used: else `corrupt` is raised."""

    __slots__ = (
        "_bytes",
        "_capacity",
        "_corrupt",
        "_credit",
        "_eventfd",
        "_histogram",
        "_join",
        "_limit",
        "_position",
        "_received",
        "_wait_ns",
        "_words",
        "joining",
        "received_ns",
        "sent_ns",
    )

    def __init__(
        self, memory: Any, eventfd: int, join: Callable[[int, memoryview], memoryview | None], corrupt: type[Exception]
    ) -> None:
        """`eventfd` takes the credit. `join(flags, view)` is given each fragment, and any frame while `joining`; it
        returns the message that is whole then, or None."""
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")
        self._capacity = len(self._bytes) - HEADER
        self._eventfd, self._join, self._corrupt = eventfd, join, corrupt
        self._position = self._limit = self._credit = self._received = 0
        self.joining = False
        self.sent_ns = self.received_ns = 0
        """CLOCK_MONOTONIC at which the message of the last `next` was sent, and handed out."""
        self._wait_ns = 0
        self._histogram = [0] * BUCKETS

    @property
    def drained(self) -> bool:
        """All that was seen is taken, and there is no credit to give: `next` need not be called before news."""
        return self._position == self._limit and self._credit < self._capacity >> 2

    def refresh(self) -> bool:
        """See what was published. True if there is any frame."""
        self._limit = limit = self._words[HEAD]
        if _fence is not None:
            _fence()
        if not 0 <= limit - self._position <= self._capacity or limit & 7:
            raise self._corrupt("more published than fits")
        return limit != self._position

    def next(self) -> memoryview | None:
        """The next whole message, or None. The view aliases the ring until the next call, unless it was joined.

        Everything taken before may be overwritten from now on; the writer is told so a quarter ring at a time.
        """
        while True:
            if self._credit >= self._capacity >> 2:
                credit, self._credit = self._credit, 0
                _ring(self._eventfd, credit, self._corrupt, "credit")
            if self._position == self._limit and not self.refresh():
                return None
            flags, view = self._take()
            message = self._join(flags, view) if flags or self.joining else view
            if message is not None:
                self.received_ns = now = time.monotonic_ns()
                waited = max(now - self.sent_ns, 0)
                self._wait_ns += waited
                self._histogram[waited.bit_length()] += 1
                return message

    def waits(self) -> tuple[int, tuple[int, ...]]:
        """How long messages waited from sending to `next`: the sum in ns, and how many 2**(i-1) to 2**i - 1 ns."""
        return self._wait_ns, tuple(self._histogram)

    def _take(self) -> tuple[int, memoryview]:
        position, capacity = self._position, self._capacity
        offset = position & (capacity - 1)
        word = self._words[(HEADER + offset) >> 3]
        if word == PAD:
            pad = capacity - offset
            if not offset or self._limit - position <= pad:
                raise self._corrupt("padding out of place")
            position += pad
            self._credit += pad
            offset = 0
            word = self._words[HEADER >> 3]
        size = word & _LENGTH
        need = (size + (FRAME_HEADER + 7)) & ~7
        if need > capacity - offset or need > self._limit - position or word - size not in _FLAGS:
            raise self._corrupt("frame out of range")
        self._position = position = position + need
        self._credit += need
        self._received += 1
        _pack_pair(self._bytes, TAIL * 8, position, self._received)
        start = HEADER + offset
        self.sent_ns = self._words[(start >> 3) + 1]
        return word - size, self._bytes[start + FRAME_HEADER : start + FRAME_HEADER + size]

    @property
    def has_news(self) -> bool:
        """The writer published something that was not taken."""
        return self._words[HEAD] != self._position

    def close(self) -> None:
        """Let go of the memory. Views that were handed out stay readable."""
        self._words.release()
        try:
            self._bytes.release()
        except BufferError:
            del self._bytes


class Watch:
    """Looks at many readers, each with an owner, whatever it is; for one thread that serves and waits for them all."""

    __slots__ = ("_epoll", "_of", "others")
    rings_always = True
    """Writers ring also while nobody sleeps, so there may be old wake-ups whenever one begins to."""

    def __init__(self, epoll: select.epoll) -> None:
        """`epoll` knows the data eventfds of all readers, edge-triggered, and what else there is to wait for."""
        self._epoll = epoll
        self.others: list[int] | None = None
        """Descriptors beside those that were ready after the last `wait`, if there were any."""
        self._of: list[tuple[Reader, int, Any]] = []

    def add(self, reader: Reader, data: int, owner: Any) -> None:
        """From now on its writer rings `data` once after each `sleep`; always, as before, if `rings_always`."""
        self._of.append((reader, data, owner))

    def remove(self, reader: Reader) -> None:
        """Before it is closed."""
        self._of = [one for one in self._of if one[0] is not reader]

    def news(self) -> list[Any] | None:
        """The owners of readers that have news; None: nothing new."""
        return [owner for reader, _, owner in self._of if reader.has_news] or None

    def sleep(self) -> bool:
        """Before one sleeps on the data eventfds: what comes from now on rings. False: there are news already."""
        return not any(reader.has_news for reader, _, _ in self._of)

    def wake(self) -> bool:
        """After `sleep`: nothing needs to ring any more. True: it may have done so, the eventfds say."""
        return True

    def wait(self, milliseconds: int) -> list[Any] | None:
        """Sleep as long as told (negative: for ever) or until a descriptor is ready, then `wake`; returns `news`."""
        ready = self._epoll.poll(milliseconds / 1000 if milliseconds >= 0 else None, 64)
        data = {data for _, data, _ in self._of}
        self.others = [descriptor for descriptor, _ in ready if descriptor not in data] or None
        return self.news()

    def spin(self, longest: int, disturbed: int) -> bool | None:
        """Look until there are news, for at most `longest` ns; None: there came none.

        True: no two looks were more than `disturbed` ns apart, so this core was ours alone.
        """
        before = time.monotonic_ns()
        deadline, undisturbed = before + longest, True
        while not any(reader.has_news for reader, _, _ in self._of):
            now = time.monotonic_ns()
            if now - before > disturbed:
                undisturbed = False
            if now >= deadline:
                return None
            before = now
        return undisturbed


# ------------------------------------------------------------------ what this machine has


@functools.cache
def native() -> ModuleType | None:
    """ring.c, compiled at the first use on a machine; None where that cannot be done."""
    from ..models.c_library import compile_library, include_python

    try:
        path = compile_library(Path(__file__).with_name("ring.c"), options=include_python())
        spec = importlib.util.spec_from_loader("ring", ExtensionFileLoader("ring", str(path)))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (StartupError, ImportError):
        return None
    return module


def types() -> Any:
    """A namespace with the Writer, Reader and Watch to use."""
    made = native()
    if made is not None:
        return made
    if _fence is None and platform.machine() not in _KEEPS_ORDER:
        raise StartupError(
            f"on {platform.machine()} the lanes between processes need a C compiler and Python's headers"
        )
    return PYTHON


class _Python:
    Writer, Reader, Watch = Writer, Reader, Watch


PYTHON = _Python()
"""What is written above."""
_KEEPS_ORDER = ("x86_64", "i686", "AMD64")
_MEMBARRIER, _REGISTER, _BARRIER = 283, 1 << 4, 1 << 3


def _find_fence() -> Callable[[], object] | None:
    """A full fence between what comes before and after, by the kernel (membarrier); None: not needed or not there."""
    if platform.machine() not in ("aarch64", "riscv64"):
        return None
    system_call = ctypes.CDLL(None).syscall
    if system_call(_MEMBARRIER, _REGISTER, 0, 0) != 0:
        return None
    return functools.partial(system_call, _MEMBARRIER, _BARRIER, 0, 0)


_fence = _find_fence()
