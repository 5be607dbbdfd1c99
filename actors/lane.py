"""One direction between two actors in different processes: a ring of bytes in shared memory, one sender, one receiver.

The sender end lives in a `Ref`, the receiver end in an `Inbox`, and the supervisor creates both and reads the header
page of every lane. What is done per message is in ring.py; here are the descriptors, credit, and messages larger than
a frame. Invariant: what the receiver looks at was written completely before, and a sender that is killed at any instant
leaves either a whole frame or nothing. Every number that comes from the other side is checked before it is used: a
broken or hostile peer causes LaneCorrupt, never an access outside the mapping.

    page 0     header: constants, then the sender's and the receiver's words on cache lines of their own
    page 1..   the ring: frames of [u64 length | flags][u64 send time, ns][payload][padding to 8 bytes]

A frame never wraps: a padding frame fills the end of the ring. A frame takes at most a quarter of the ring, so it fits
as soon as the receiver caught up, because credit comes back each quarter, in the counter of an eventfd. A larger
message travels as consecutive fragments, the first one preceded by the total length, and is joined again by the
receiver (one copy). Lanes have no name, so nothing can be left behind in /dev/shm, and a lane is never reused: a
restarted peer gets a new one.
"""

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable
from typing import NamedTuple

from . import ring
from .ring import FIRST, FRAME_HEADER, HEADER, REST

MAX_MESSAGE = 64 << 20
"""Largest message in bytes, in fragments or not."""
DEFAULT_CAPACITY = 1 << 20

_MAGIC = 0x3245_4E41_4C54_4341  # "ACTLANE2"
# u64 indices into the header page; ring.py has the others
_W_MAGIC, _W_CAPACITY, _W_EPOCH = 0, 1, 2
_W_FULL = 18

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034

_SEALS = 0x0001 | 0x0002 | 0x0004  # SEAL, SHRINK, GROW: the peer cannot cut the file under us (SIGBUS)


def check_size(message: bytes | memoryview) -> None:
    """Raise ValueError for an encoded message that no lane takes."""
    if len(message) > MAX_MESSAGE:
        raise ValueError(f"message of {len(message)} bytes; a lane takes at most {MAX_MESSAGE}")


class LaneCorrupt(Exception):
    """The other side of a lane broke the format."""


class LaneFds(NamedTuple):
    """What a lane is made of; travels by SCM_RIGHTS. `data` and `credit` are eventfds.

    `data` wakes the receiver and is never read: who waits for it takes its edges. `credit` counts bytes.
    """

    memory: int
    data: int
    credit: int

    def dup(self) -> "LaneFds":
        """The same lane in descriptors of its own, to be handed to the other end."""
        return LaneFds(os.dup(self.memory), os.dup(self.data), os.dup(self.credit))

    def close(self) -> None:
        """For a holder that never made an end of it."""
        for descriptor in self:
            os.close(descriptor)


def create_lane(capacity: int = DEFAULT_CAPACITY, epoch: int = 0) -> LaneFds:
    """A fresh lane. `capacity` in bytes, a power of two of at least 4096; raises ValueError otherwise."""
    if capacity & (capacity - 1) or capacity < 4096:
        raise ValueError(f"lane capacity must be a power of two of at least 4096, not {capacity}")
    memory = os.memfd_create("actorserve-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, HEADER + capacity)
    fcntl.fcntl(memory, _F_ADD_SEALS, _SEALS)
    with mmap.mmap(memory, HEADER) as page, memoryview(page) as raw, raw.cast("Q") as words:
        words[_W_CAPACITY], words[_W_EPOCH], words[_W_MAGIC] = capacity, epoch, _MAGIC
        words[ring.BELL] = ring.ALWAYS
    flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
    return LaneFds(memory, os.eventfd(0, flags), os.eventfd(0, flags))


class _End:
    """What both ends share: the mapping and its life. Takes ownership of the descriptors."""

    __slots__ = ("_bytes", "_map", "_words", "capacity", "closed", "epoch", "fds")

    def __init__(self, fds: LaneFds) -> None:
        self.fds = fds
        self.closed = False
        size = os.fstat(fds.memory).st_size
        if size <= HEADER or fcntl.fcntl(fds.memory, _F_GET_SEALS) & _SEALS != _SEALS:
            raise LaneCorrupt("not a sealed lane")
        self._map = mmap.mmap(fds.memory, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)  # no page faults while it runs
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self.capacity = size - HEADER
        self.epoch = self._words[_W_EPOCH]
        if self._words[_W_MAGIC] != _MAGIC or self._words[_W_CAPACITY] != self.capacity:
            raise LaneCorrupt("not a lane")
        if self.capacity & (self.capacity - 1):
            raise LaneCorrupt("capacity is not a power of two")

    def _let_go(self) -> None:
        """Close what else uses the mapping."""
        raise NotImplementedError

    def metrics(self) -> "LaneMetrics":
        """What the header page shows, to whoever has an end of the lane."""
        return _read_header(self._words)

    def close(self) -> None:
        """Give up this end. Views that somebody still holds stay readable: the mapping goes with the last one."""
        if self.closed:
            return
        self.closed = True
        self._let_go()
        self._words.release()
        try:
            self._bytes.release()
            self._map.close()
        except BufferError:
            del self._bytes, self._map  # a borrowed view is alive and keeps the mapping
        self.fds.close()


class LaneSender(_End):
    """The sending end; used by one thread."""

    __slots__ = ("_acknowledged", "_full", "_rest", "_rest_sent", "_writer", "send")

    def __init__(self, fds: LaneFds) -> None:
        super().__init__(fds)
        self._writer = ring.types().Writer(self._map, fds.data, LaneCorrupt)
        self.send: Callable[[bytes | bytearray | memoryview], bool] = self._writer.send
        """`try_send` without its slow ways: False means that it may still succeed there."""
        self._acknowledged = self._full = 0
        self._rest = memoryview(b"")  # a large message that is under way
        self._rest_sent = 0

    @property
    def busy(self) -> bool:
        """A large message is under way: call `pump` when credit comes."""
        return self._writer.busy  # type: ignore[no-any-return]

    @property
    def max_frame(self) -> int:
        """Payload bytes of the largest frame; more goes in fragments."""
        return (self.capacity >> 2) - FRAME_HEADER

    def try_send(self, payload: bytes | bytearray | memoryview, publish: bool = True) -> bool:
        """Copy one message in. False: no room now; wait until `fds.credit` is readable and try again.

        True for a message larger than a frame means that it is accepted; `payload` must then stay unchanged until
        `busy` ends. With publish=False the receiver sees it at the next publish. Raises ValueError above MAX_MESSAGE,
        LaneCorrupt when the receiver gave credit for more than it got.
        """
        if publish and self.send(payload):
            return True
        if self.busy and not self.pump():
            return False
        if len(payload) > self.max_frame:
            return self._start_fragments(memoryview(payload).cast("B"))
        if not self._put(payload, 0):
            return False
        if publish:
            self.publish()
        return True

    def publish(self) -> None:
        """Let the receiver see what was sent with publish=False."""
        self._writer.publish()

    def pump(self) -> bool:
        """Go on with a large message. True when nothing is left of it."""
        while self._rest_sent < len(self._rest):
            part = self._rest[self._rest_sent : self._rest_sent + self.max_frame]
            if not self._put(part, REST):
                return False
            self._rest_sent += len(part)
            self.publish()  # each fragment: the receiver joins while we wait for credit
        self._rest, self._rest_sent, self._writer.busy = memoryview(b""), 0, False
        return True

    def _start_fragments(self, payload: memoryview) -> bool:
        check_size(payload)
        if not self._put(len(payload).to_bytes(8, "little"), FIRST):
            return False
        self.publish()
        self._rest, self._writer.busy = payload, True
        self.pump()
        return True

    def _put(self, payload: bytes | bytearray | memoryview, flags: int) -> bool:
        """One frame; sees what credit came back if it must, which makes `fds.credit` unreadable."""
        writer = self._writer
        if writer.put(payload, flags):
            return True
        with contextlib.suppress(BlockingIOError):
            self._acknowledged += os.eventfd_read(self.fds.credit)
        if self._acknowledged > writer.position:
            raise LaneCorrupt("credit for more than was sent")
        writer.free_until = self._acknowledged + self.capacity
        if writer.put(payload, flags):
            return True
        self.publish()
        self._full += 1
        self._words[_W_FULL] = self._full
        return False

    def _let_go(self) -> None:
        self._writer.close()


class LaneReceiver(_End):
    """The receiving end; used by one thread."""

    __slots__ = ("_joined", "_joined_size", "next", "reader", "refresh")

    def __init__(self, fds: LaneFds) -> None:
        super().__init__(fds)
        self.reader = ring.types().Reader(self._map, fds.credit, self._join, LaneCorrupt)
        """For a ring.Watch."""
        self.next: Callable[[], memoryview | None] = self.reader.next
        """The next whole message, or None. The view aliases the ring (except for a joined message) and is valid until
        the next call. Raises LaneCorrupt."""
        self.refresh: Callable[[], bool] = self.reader.refresh
        """See what was published. True if there is any frame."""
        self._joined: bytearray | None = None
        self._joined_size = 0

    def _join(self, flags: int, view: memoryview) -> memoryview | None:
        if flags == FIRST:
            total = int.from_bytes(view, "little")
            if self._joined is not None or len(view) != 8 or total > MAX_MESSAGE or not total:
                raise LaneCorrupt("first fragment out of place")
            self._joined, self._joined_size, self.reader.joining = bytearray(total), 0, True
            return None
        joined = self._joined
        if joined is None or flags != REST or not len(view) or len(view) > len(joined) - self._joined_size:
            raise LaneCorrupt("fragment out of place")
        joined[self._joined_size : self._joined_size + len(view)] = view
        self._joined_size += len(view)
        if self._joined_size < len(joined):
            return None
        self._joined, self.reader.joining = None, False
        return memoryview(joined)

    def _let_go(self) -> None:
        self.reader.close()


class LaneMetrics(NamedTuple):
    """A lane as its header page shows it, each word a moment old."""

    depth_bytes: int
    depth_frames: int
    sent: int
    received: int
    full: int
    """How often the sender found no room."""
    capacity: int


def _read_header(w: memoryview) -> LaneMetrics:
    """Depths are never negative although the words are read one after another."""
    received, tail = w[ring.RECEIVED], w[ring.TAIL]
    sent, head = w[ring.SENT], w[ring.HEAD]
    return LaneMetrics(max(head - tail, 0), max(sent - received, 0), sent, received, w[_W_FULL], w[_W_CAPACITY])


class LaneGauge:
    """A read-only look at a lane's header page, for the supervisor: metrics and the hang watchdog."""

    __slots__ = ("_map", "_raw", "_words")

    def __init__(self, fds: LaneFds) -> None:
        """Borrows `fds`: they may be closed afterwards."""
        self._map = mmap.mmap(fds.memory, HEADER, prot=mmap.PROT_READ)
        self._raw = memoryview(self._map)
        self._words = self._raw.cast("Q")

    def read(self) -> LaneMetrics:
        """What the header page shows."""
        return _read_header(self._words)

    def close(self) -> None:
        self._words.release()
        self._raw.release()
        self._map.close()
