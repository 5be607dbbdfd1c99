"""One direction between two actors in different processes: a ring of bytes in shared memory, one sender, one receiver.

The sender end lives in a `Ref`, the receiver end in an `Inbox`, and the supervisor creates both and reads the header
page of every lane. Invariant: publication and credit travel in two eventfd counters, never in shared indices, so what
the receiver looks at was written completely before (the kernel's lock orders it on every architecture), and a sender
that is killed at any instant leaves either a whole frame or nothing. The words of the header page are hints for
metrics, the hang watchdog and where to look first; no frame is read because of them. Every number that comes from the
other side is checked before it is used: a broken or hostile peer causes LaneCorrupt, never an access outside the
mapping.

    page 0     header: constants, then the sender's and the receiver's hints on cache lines of their own
    page 1..   the ring: frames of [u64 length | flags][u64 send time, ns][payload][padding to 8 bytes]

A frame never wraps: a padding frame fills the end of the ring. A frame takes at most a quarter of the ring, so it fits
as soon as the receiver caught up, because credit comes back each quarter. A larger message travels as consecutive
fragments, the first one preceded by the total length, and is joined again by the receiver (one copy). Lanes have no
name, so nothing can be left behind in /dev/shm, and a lane is never reused: a restarted peer gets a new one.
"""

import contextlib
import fcntl
import mmap
import os
import struct
import time
from typing import NamedTuple

HEADER = 4096
FRAME_HEADER = 16
MAX_MESSAGE = 64 << 20
"""Largest message in bytes, in fragments or not."""
DEFAULT_CAPACITY = 1 << 20

_MAGIC = 0x3145_4E41_4C54_4341  # "ACTLANE1"
# u64 indices into the header page
_W_MAGIC, _W_CAPACITY, _W_EPOCH = 0, 1, 2
_W_HEAD, _W_SENT, _W_FULL = 16, 17, 18
_W_TAIL, _W_RECEIVED = 32, 33

_PAD = 1 << 32
_FIRST = 1 << 33
_REST = 1 << 34
_LENGTH = (1 << 32) - 1
_FLAGS = (0, _FIRST, _REST)
_PAIR = struct.Struct("=QQ")  # two words at once, native order: one call is cheaper than two items of a memoryview
_pack_pair = _PAIR.pack_into

_OVERRUN = "the data counter was driven to its limit"

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEALS = 0x0001 | 0x0002 | 0x0004  # SEAL, SHRINK, GROW: the peer cannot cut the file under us (SIGBUS)


class LaneCorrupt(Exception):
    """The other side of a lane broke the format."""


class LaneFds(NamedTuple):
    """What a lane is made of; travels by SCM_RIGHTS. `data` and `credit` are eventfds."""

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

    def metrics(self) -> "LaneMetrics":
        """What the header page shows, to whoever has an end of the lane."""
        return _read_header(self._words)

    def close(self) -> None:
        """Give up this end. Views that somebody still holds stay readable: the mapping goes with the last one."""
        if self.closed:
            return
        self.closed = True
        self._words.release()
        try:
            self._bytes.release()
            self._map.close()
        except BufferError:
            del self._bytes, self._map  # a borrowed view is alive and keeps the mapping
        self.fds.close()


class LaneSender(_End):
    """The sending end; used by one thread."""

    __slots__ = (
        "_acknowledged",
        "_doorbell",
        "_free_until",
        "_full",
        "_position",
        "_quarter",
        "_rest",
        "_rest_sent",
        "_sent",
        "_unpublished",
        "busy",
    )

    def __init__(self, fds: LaneFds) -> None:
        super().__init__(fds)
        self._position = self._acknowledged = self._unpublished = self._sent = self._full = 0
        self._doorbell = fds.data
        self._free_until = self.capacity  # the position up to which the receiver is known to have made room
        self._quarter = self.capacity >> 2
        self._rest = memoryview(b"")  # a large message that is under way
        self._rest_sent = 0
        self.busy = False
        """A large message is under way: call `pump` when credit comes."""

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
        size = len(payload)
        position = self._position
        offset = position & (self.capacity - 1)
        need = (size + (FRAME_HEADER + 7)) & ~7
        if need > self._quarter or need > self.capacity - offset or position + need > self._free_until or self.busy:
            return self._try_slowly(payload, size, publish)
        start = HEADER + offset
        self._bytes[start + FRAME_HEADER : start + FRAME_HEADER + size] = payload
        _pack_pair(self._bytes, start, size, time.monotonic_ns())
        self._position = position = position + need
        self._sent = sent = self._sent + 1
        self._unpublished += need
        if publish:
            try:
                os.eventfd_write(self._doorbell, self._unpublished)
            except BlockingIOError:
                raise LaneCorrupt(_OVERRUN) from None
            self._unpublished = 0
            _pack_pair(self._bytes, _W_HEAD * 8, position, sent)
        return True

    def _try_slowly(self, payload: bytes | bytearray | memoryview, size: int, publish: bool) -> bool:
        """`try_send` at the ring's end, without known room, in fragments or behind them."""
        if self.busy and not self.pump():
            return False
        if size > self.max_frame:
            return self._start_fragments(memoryview(payload).cast("B"))
        if not self._put(payload, size, 0):
            return False
        if publish:
            self.publish()
        return True

    def publish(self) -> None:
        """Let the receiver see what was sent with publish=False."""
        count = self._unpublished
        if count:
            self._unpublished = 0
            try:
                os.eventfd_write(self._doorbell, count)
            except BlockingIOError:
                raise LaneCorrupt(_OVERRUN) from None
            _pack_pair(self._bytes, _W_HEAD * 8, self._position, self._sent)

    def pump(self) -> bool:
        """Go on with a large message. True when nothing is left of it."""
        while self._rest_sent < len(self._rest):
            part = self._rest[self._rest_sent : self._rest_sent + self.max_frame]
            if not self._put(part, len(part), _REST):
                return False
            self._rest_sent += len(part)
            self.publish()  # each fragment: the receiver joins while we wait for credit
        self._rest, self._rest_sent, self.busy = memoryview(b""), 0, False
        return True

    def _start_fragments(self, payload: memoryview) -> bool:
        if len(payload) > MAX_MESSAGE:
            raise ValueError(f"message of {len(payload)} bytes; a lane takes at most {MAX_MESSAGE}")
        if not self._put(len(payload).to_bytes(8, "little"), 8, _FIRST):
            return False
        self.publish()
        self._rest, self.busy = payload, True
        self.pump()
        return True

    def _put(self, payload: bytes | bytearray | memoryview, size: int, flags: int) -> bool:
        position, capacity = self._position, self.capacity
        need = (size + FRAME_HEADER + 7) & ~7
        offset = position & (capacity - 1)
        if need > capacity - offset:
            need += capacity - offset  # padding first
        if position + need > self._free_until and not self._has_credit_for(need):
            return False
        if need > capacity - offset:
            self._words[(HEADER + offset) >> 3] = _PAD
            offset = 0
        start = HEADER + offset + FRAME_HEADER
        self._bytes[start : start + size] = payload
        _pack_pair(self._bytes, HEADER + offset, size | flags, time.monotonic_ns())
        self._position = position + need
        self._unpublished += need
        self._sent += 1
        return True

    def _has_credit_for(self, need: int) -> bool:
        """The slow path: see what came back, which makes `fds.credit` unreadable."""
        with contextlib.suppress(BlockingIOError):
            self._acknowledged += os.eventfd_read(self.fds.credit)
        if self._acknowledged > self._position:
            raise LaneCorrupt("credit for more than was sent")
        self._free_until = self._acknowledged + self.capacity
        if self._position + need <= self._free_until:
            return True
        self.publish()
        self._full += 1
        self._words[_W_FULL] = self._full
        return False


class LaneReceiver(_End):
    """The receiving end; used by one thread."""

    __slots__ = (
        "_credit",
        "_doorbell",
        "_joined",
        "_joined_size",
        "_limit",
        "_position",
        "_quarter",
        "_received",
        "sent_ns",
    )

    def __init__(self, fds: LaneFds) -> None:
        super().__init__(fds)
        self._position = self._limit = self._credit = self._received = 0
        self._doorbell = fds.data
        self._quarter = self.capacity >> 2
        self._joined: bytearray | None = None
        self._joined_size = 0
        self.sent_ns = 0
        """CLOCK_MONOTONIC at which the message of the last `next` was sent."""

    @property
    def hinted(self) -> bool:
        """The sender's header words speak of frames that were not taken: `refresh` is likely to find some.

        Costs a look into memory. Only a hint: the words may be late, or never come when the sender dies.
        """
        return self._words[_W_SENT] != self._received

    @property
    def drained(self) -> bool:
        """`next` would return None and has no credit to give: it need not be called before the next `refresh`."""
        return self._position == self._limit and self._credit < self._quarter

    def refresh(self) -> bool:
        """Learn what was published since; this also makes `fds.data` unreadable. True if there is any frame."""
        try:
            self._limit += os.eventfd_read(self._doorbell)
        except BlockingIOError:
            return self._limit != self._position
        if self._limit - self._position > self.capacity or self._limit & 7:
            raise LaneCorrupt("more published than fits")
        return True

    def next(self) -> memoryview | None:
        """The next whole message, or None when all that `refresh` saw is taken.

        The view aliases the ring (except for a joined message) and is valid until the next call of `next`.
        Raises LaneCorrupt.
        """
        while True:
            if self._credit >= self._quarter:
                self._give_credit()
            position = self._position
            if position == self._limit:
                return None
            words = self._words
            offset = position & (self.capacity - 1)
            start = HEADER + offset
            size = words[start >> 3]  # each shared word is read once
            need = (size + (FRAME_HEADER + 7)) & ~7
            if need > self.capacity - offset or need > self._limit - position or self._joined is not None:
                joined = self._next_slowly(size)  # flags make `size` huge
                if joined is None:
                    continue
                return joined
            self._position = position = position + need
            self._credit += need
            self._received = received = self._received + 1
            _pack_pair(self._bytes, _W_TAIL * 8, position, received)
            self.sent_ns = words[(start >> 3) + 1]
            start += FRAME_HEADER
            return self._bytes[start : start + size]

    def _next_slowly(self, word: int) -> memoryview | None:
        """A frame that is not simply a message; None if the message is not whole yet."""
        flags, view = self._frame(word)
        if not flags and self._joined is None:
            return view
        return self._join(flags, view)

    def _frame(self, word: int) -> tuple[int, memoryview]:
        """Take the frame that begins with `word`. All numbers are range-checked before use."""
        position, capacity = self._position, self.capacity
        offset = position & (capacity - 1)
        if word == _PAD:
            pad = capacity - offset
            if not offset or self._limit - position <= pad:
                raise LaneCorrupt("padding out of place")
            position += pad
            self._credit += pad
            offset = 0
            word = self._words[HEADER >> 3]
        size = word & _LENGTH
        need = (size + FRAME_HEADER + 7) & ~7
        if need > capacity - offset or need > self._limit - position or word - size not in _FLAGS:
            raise LaneCorrupt("frame out of range")
        self._position = position + need
        self._credit += need
        self._received += 1
        _pack_pair(self._bytes, _W_TAIL * 8, self._position, self._received)
        start = HEADER + offset
        self.sent_ns = self._words[(start >> 3) + 1]
        start += FRAME_HEADER
        return word - size, self._bytes[start : start + size]

    def _join(self, flags: int, view: memoryview) -> memoryview | None:
        if flags == _FIRST:
            total = int.from_bytes(view, "little")
            if self._joined is not None or len(view) != 8 or total > MAX_MESSAGE or not total:
                raise LaneCorrupt("first fragment out of place")
            self._joined, self._joined_size = bytearray(total), 0
            return None
        joined = self._joined
        if joined is None or flags != _REST or not len(view) or len(view) > len(joined) - self._joined_size:
            raise LaneCorrupt("fragment out of place")
        joined[self._joined_size : self._joined_size + len(view)] = view
        self._joined_size += len(view)
        if self._joined_size < len(joined):
            return None
        self._joined = None
        return memoryview(joined)

    def _give_credit(self) -> None:
        """Everything taken so far may be overwritten. Told a quarter ring at a time: fewer wake-ups."""
        credit, self._credit = self._credit, 0
        try:
            os.eventfd_write(self.fds.credit, credit)
        except BlockingIOError:
            raise LaneCorrupt("the credit counter was driven to its limit") from None


class LaneMetrics(NamedTuple):
    """A lane as its header page shows it: hints, each a moment old."""

    depth_bytes: int
    depth_frames: int
    sent: int
    received: int
    full: int
    """How often the sender found no room."""
    capacity: int


def _read_header(w: memoryview) -> LaneMetrics:
    """Depths are never negative although the words are read one after another."""
    received, tail = w[_W_RECEIVED], w[_W_TAIL]
    sent, head = w[_W_SENT], w[_W_HEAD]
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
