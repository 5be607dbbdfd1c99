"""The address of another actor, as its sender holds it: three ways to send, over shared memory or a local queue.

`Context.ref` hands it out; the node connects it when the peer comes up and disconnects it when the peer dies.
Invariant: messages arrive in the order in which they were accepted, whichever of the three ways they took, each at
most once, and nothing is ever sent to an incarnation of the peer other than the connected one.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from .inbox import Inbox, LocalLane
from .lane import LaneCorrupt, LaneMetrics, LaneSender, check_size

_encode = msgspec.msgpack.Encoder().encode


class Gone(Exception):
    """The peer is down; a PeerDown in the inbox says more, PeerUp will follow."""


class Ref:
    """Used from the loop of the sending actor only. Whoever sent a message must not change its arrays afterwards."""

    def __init__(self, name: str, inbox: Inbox) -> None:
        """`inbox` is the sender's own: it watches for credit while messages wait here."""
        self.name = name
        self.epoch = 0
        """The peer's incarnation."""
        self.on_corrupt: Callable[[str, str], None] | None = None
        """Called with (name, detail) when the peer broke the lane."""
        self._inbox = inbox
        self._ring: LaneSender | None = None
        self._quick: Callable[[bytes], bool] = self._refuse  # the ring's `send`
        self._local: LocalLane | None = None
        self._backlog: deque[bytes] = deque()
        self._sending = False  # a task sleeps in send() and is the only one to take credit
        self._turns = trio.StrictFIFOLock()

    @property
    def up(self) -> bool:
        """False: sending raises Gone."""
        return self._ring is not None or (self._local is not None and not self._local.closed)

    @property
    def backlog(self) -> int:
        """Messages that wait here for room in the lane."""
        return len(self._backlog)

    def metrics(self) -> LaneMetrics | None:
        """How full the lane is, what waits here for room in it included; None while the peer is down."""
        lane = self._ring if self._ring is not None else self._local
        if lane is None or not self.up:
            return None
        seen = lane.metrics()
        return seen._replace(depth_frames=seen.depth_frames + len(self._backlog))

    def try_send(self, message: Any) -> bool:
        """Send now, or return False when the lane is full or older messages wait. Raises Gone."""
        local = self._local
        if local is not None and not local.closed:
            if local.full:
                return False
            local.put(message)
            return True
        data = _encode(message)
        try:
            if not self._backlog and not self._sending and self._quick(data):
                return True
        except LaneCorrupt as error:
            self._corrupt(error)
            raise Gone(self.name) from error
        return self._flush() and self._push(data)

    def post(self, message: Any) -> None:
        """Send now, or keep the message, in order, until there is room; never drops, never blocks. Raises Gone, and
        ValueError for a message that no lane takes.

        What waits is sent while the sender's own inbox is polled. It is lost with the peer, as what is in the lane.
        """
        local = self._local
        if local is not None and not local.closed:
            local.put(message)
            return
        data = _encode(message)
        try:
            if not self._backlog and not self._sending and self._quick(data):
                return
        except LaneCorrupt as error:
            self._corrupt(error)
            raise Gone(self.name) from error
        check_size(data)  # not later, when it is its turn
        if not self._flush() or not self._push(data):
            self._backlog.append(data)
            self._watch()

    async def send(self, message: Any) -> None:
        """Under trio: wait for room, then send. Raises Gone, also when the peer dies meanwhile.

        Cancelled: the message was not sent. Not for actors whose peer waits for them the same way: that deadlocks.
        """
        await trio.lowlevel.checkpoint()
        async with self._turns:
            while not self.try_send(message):
                await self._room()

    def pump(self) -> bool:
        """Send what waits; True when nothing waits any more. Called by the inbox when credit came."""
        try:
            return self._flush()
        except Gone:
            return True

    # ------------------------------------------------------------------ for the node

    def connect(self, link: LaneSender | LocalLane, epoch: int) -> None:
        """The peer is up: use this lane from now on."""
        self.disconnect()
        self.epoch = epoch
        if isinstance(link, LocalLane):
            self._local = link
        else:
            self._ring, self._quick = link, link.send

    def disconnect(self) -> None:
        """The peer is gone, and what waits with it."""
        self._local = None
        self._backlog.clear()
        ring, self._ring, self._quick = self._ring, None, self._refuse
        if ring is not None:
            self._inbox.unwatch(ring.fds.credit)
            if self._sending:
                trio.lowlevel.notify_closing(ring.fds.credit)
            ring.close()

    # ------------------------------------------------------------------ inside

    def _refuse(self, data: bytes) -> bool:
        raise Gone(self.name)

    def _flush(self) -> bool:
        """Send what waits. True: nothing waits any more, and a message may go next. Raises Gone."""
        if self._sending:
            return False
        backlog = self._backlog
        while backlog:
            if not self._push(backlog[0]):
                return False
            backlog.popleft()
        ring = self._ring
        return ring is None or not ring.busy or self._finish(ring)

    def _push(self, data: bytes) -> bool:
        ring = self._ring
        if ring is None:
            raise Gone(self.name)
        try:
            sent = ring.try_send(data)
        except LaneCorrupt as error:
            self._corrupt(error)
            raise Gone(self.name) from error
        if ring.busy:
            self._watch()
        return sent

    def _finish(self, ring: LaneSender) -> bool:
        """Go on with the fragments of a large message."""
        try:
            return ring.pump()
        except LaneCorrupt as error:
            self._corrupt(error)
            raise Gone(self.name) from error

    def _watch(self) -> None:
        if self._ring is not None and not self._sending:
            self._inbox.watch(self._ring.fds.credit, self)

    async def _room(self) -> None:
        """Sleep until there may be room. Meanwhile nobody else takes credit, or the wake-up would be lost."""
        local, ring = self._local, self._ring
        if local is not None:
            await local.space.park()
            return
        if ring is None:
            raise Gone(self.name)
        self._inbox.unwatch(ring.fds.credit)
        self._sending = True
        try:
            await trio.lowlevel.wait_readable(ring.fds.credit)
        except trio.ClosedResourceError:
            raise Gone(self.name) from None
        finally:
            self._sending = False
            if self._backlog or (self._ring is ring and ring.busy):
                self._watch()

    def _corrupt(self, error: LaneCorrupt) -> None:
        self.disconnect()
        if self.on_corrupt is None:
            raise error
        self.on_corrupt(self.name, str(error))
