"""An actor's one place of arrival: all its lanes under one epoll descriptor, plus a queue for system messages.

Every actor has one Inbox; its node adds and drops lanes, the actor polls it and waits for it from trio, asyncio or
anything that can wait for a descriptor. Invariant: after `poll` returned None, `fileno()` is readable if and only if
something arrived since, be it in shared memory, from an actor of the same node, from the supervisor, or credit for a
message that waits behind a full lane. Lanes take turns, so that a busy one cannot starve another. A lane's header
words spare most looks into the kernel, and some sleeps (spin.py), but only say where to look first.
"""

import os
import select
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import trio

from .lane import LaneCorrupt, LaneMetrics, LaneReceiver
from .spin import DISTURBED, LONGEST, Spin

SUPERVISOR = "supervisor"
"""Source of PeerUp, PeerDown and Drain."""
TURN = 32
"""Messages a lane may deliver in a row while others wait."""

_BUCKETS = 66  # of any difference of two u64


@dataclass(frozen=True)
class InboxStatistics:
    """Counters of one inbox since its start."""

    received: int
    wait_ns: int
    """Sum over received messages of the time between sending and polling."""
    wait_histogram: tuple[int, ...]
    """[i]: messages that waited 2**(i-1) to 2**i - 1 ns."""
    parks: int
    """How often `wait` really slept."""
    caught: int
    """How often it did not have to, because a look into the lanes' memory before showed a message."""
    decode_errors: int
    corrupt_lanes: int


class Watched(Protocol):
    """Who waits for a descriptor of its own: a Ref for credit, an executor for its device."""

    def pump(self) -> bool:
        """Do what can be done now; True when there is nothing left to wait for."""


class LocalLane:
    """A lane inside a node: a queue of objects. With `codec` each message goes through encode and decode (tests).

    A message goes over as it is, so its arrays belong to the receiver once sent.
    """

    __slots__ = ("closed", "codec", "feed", "inbox", "limit", "queue", "ready", "sent", "sent_ns", "source", "space")

    def __init__(self, source: str, inbox: "Inbox", limit: int, codec: bool) -> None:
        self.source, self.inbox, self.limit, self.codec = source, inbox, limit, codec
        self.queue: deque[tuple[Any, int]] = deque()
        self.ready = self.closed = False
        self.feed = self
        self.sent = self.sent_ns = 0
        self.space = trio.lowlevel.ParkingLot()

    @property
    def full(self) -> bool:
        """More messages than `limit`: as a ring without room."""
        return len(self.queue) >= self.limit

    def put(self, message: Any) -> None:
        """Append; never refuses (the caller looked at `full` if it wants to)."""
        if self.codec:
            message = self.inbox.decode(msgspec.msgpack.encode(message))
        self.queue.append((message, time.monotonic_ns()))
        self.sent += 1
        if not self.ready:
            self.inbox.queue_lane(self)
            self.inbox.ring()

    @property
    def drained(self) -> bool:
        """`next` would return None."""
        return not self.queue

    def metrics(self) -> LaneMetrics:
        """As a ring's, but for bytes: there are none, and `capacity` is in messages."""
        return LaneMetrics(0, len(self.queue), self.sent, self.sent - len(self.queue), 0, self.limit)

    def next(self) -> Any:
        """The next message, or None; when it was sent is `sent_ns`."""
        if not self.queue:
            return None
        message, self.sent_ns = self.queue.popleft()
        if self.space and not self.full:
            self.space.unpark_all()
        return message


class RingLane:
    """A lane from another node."""

    __slots__ = ("feed", "ready", "source")

    def __init__(self, source: str, feed: LaneReceiver) -> None:
        self.source, self.feed = source, feed
        self.ready = False


class Inbox:
    """`message_type` is the union that is decoded, nothing else ever arrives from another node."""

    def __init__(self, message_type: Any) -> None:
        self.decode: Callable[[bytes | memoryview], Any] = msgspec.msgpack.Decoder(message_type).decode
        self.wait_readable: Callable[[int], Awaitable[None]] = trio.lowlevel.wait_readable
        """How `wait` sleeps on a descriptor; a node on asyncio puts its own here."""
        self.on_corrupt: Callable[[str, str], None] | None = None
        """Called with (source, detail) when a lane is given up; without it `poll` raises LaneCorrupt."""
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._descriptor = self._epoll.fileno()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._rung = False
        self._rings: dict[int, RingLane] = {}
        self._locals: dict[str, LocalLane] = {}
        self._credits: dict[int, Watched] = {}
        self._system: deque[Any] = deque()
        self._ready: deque[RingLane | LocalLane] = deque()
        self._turn = 0
        self._spin = Spin()
        self._slept_at = 0  # when the last wait fell asleep; 0 once its first message told how it went
        self._glances = 0  # since everything was looked at
        self._caught = 0
        self._wait_ns = self._parks = self._decode_errors = self._corrupt_lanes = 0
        self._histogram = [0] * _BUCKETS

    # ------------------------------------------------------------------ for the actor

    def poll(self, look: bool = True) -> tuple[Any, str] | None:
        """The next (message, name of the actor that sent it), or None. Never blocks.

        System messages come first, with source "supervisor". memoryview fields of the message are valid until the
        next poll. Costs at most one epoll_wait per turn of 32 messages, and one per None unless look=False: that None
        means that all which was there at the last look is taken, enough for who waits for `fileno()` next.
        """
        if self._system:
            return self._system.popleft(), SUPERVISOR
        while True:
            if self._turn <= 0 or not self._ready:
                if (look or self._ready or self._rung) and not (look and self._glance()):
                    self._look(0)
                if self._system:
                    return self._system.popleft(), SUPERVISOR
                if not self._ready:
                    return None
            lane = self._ready[0]
            feed = lane.feed
            try:
                message = feed.next()
                if message is not None and feed is not lane:
                    message = self.decode(message)
            except (LaneCorrupt, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                self._give_up(lane, error)
                continue
            if message is None:
                self._ready.popleft()
                lane.ready = False
                self._turn = TURN
                continue
            now = time.monotonic_ns()
            waited = now - feed.sent_ns
            if self._slept_at:
                if feed is not lane:
                    self._spin.slept(self._slept_at, feed.sent_ns, now)
                self._slept_at = 0
            self._wait_ns += waited
            self._histogram[waited.bit_length()] += 1
            self._turn -= 1
            if feed.drained:
                self._ready.popleft()
                lane.ready = False
                self._turn = TURN
            elif self._turn <= 0:
                self._ready.rotate(-1)
            return message, lane.source

    async def wait(self) -> None:
        """Return when `poll` may return something; also after credit came. Always a checkpoint."""
        if self._ready or self._system:
            self.ring()  # the descriptor is readable then, so this is one checkpoint under any loop
            await self.wait_readable(self._descriptor)
            return
        if self.wait_readable is trio.lowlevel.wait_readable:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._glance() or (self._spin.on and self._watch()):
                self._caught += 1
                await trio.lowlevel.cancel_shielded_checkpoint()  # cheaper than asking the kernel for what we know
                return
        self._parks += 1
        self._slept_at = time.monotonic_ns()
        await self.wait_readable(self._descriptor)

    def wait_in_thread(self, seconds: float | None = None) -> None:
        """`wait` for a thread without a loop: blocks until `poll` may return something, or for `seconds`."""
        if self._ready or self._system:
            return
        if self._glance() or (self._spin.on and self._watch()):
            self._caught += 1
            return
        self._parks += 1
        self._slept_at = time.monotonic_ns()
        self._look(seconds)

    def fileno(self) -> int:
        """A descriptor that is readable when `poll` may return something, for the time until poll returned None."""
        return self._epoll.fileno()

    def ring(self) -> None:
        """Make `fileno()` readable until the next None of `poll`: for who stops polling before that."""
        if not self._rung:
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def statistics(self) -> InboxStatistics:
        """A snapshot of the counters."""
        return InboxStatistics(
            sum(self._histogram),
            self._wait_ns,
            tuple(self._histogram),
            self._parks,
            self._caught,
            self._decode_errors,
            self._corrupt_lanes,
        )

    def lanes(self) -> dict[str, LaneMetrics]:
        """Each connected lane by the name of the actor that sends."""
        found = {ring.source: ring.feed.metrics() for ring in self._rings.values()}
        return found | {source: lane.metrics() for source, lane in self._locals.items()}

    # ------------------------------------------------------------------ for the node and the refs

    def put_system(self, message: Any) -> None:
        """A message of the supervisor: overtakes what is in the lanes."""
        self._system.append(message)
        self.ring()

    def add_ring(self, source: str, receiver: LaneReceiver) -> None:
        """Listen to a lane of another node; replaces an older one of the same source."""
        self.drop(source)
        self._rings[receiver.fds.data] = RingLane(source, receiver)
        self._epoll.register(receiver.fds.data, select.EPOLLIN)

    def add_local(self, source: str, limit: int, codec: bool) -> LocalLane:
        """The lane of an actor of this node; its Ref puts messages into it."""
        self.drop(source)
        lane = self._locals[source] = LocalLane(source, self, limit, codec)
        return lane

    def drop(self, source: str) -> None:
        """Forget the lane of `source` and what is in it."""
        local = self._locals.pop(source, None)
        if local is not None:
            local.closed = True
            local.space.unpark_all()
            self._unready(local)
        for descriptor, ring in list(self._rings.items()):
            if ring.source == source:
                self._drop_ring(descriptor, ring)

    def watch(self, descriptor: int, sender: Watched) -> None:
        """Call `sender.pump` in poll when `descriptor` is readable, until it returns True."""
        if descriptor not in self._credits:
            self._credits[descriptor] = sender
            self._epoll.register(descriptor, select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Stop that; before the descriptor is closed."""
        if self._credits.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def queue_lane(self, lane: RingLane | LocalLane) -> None:
        """`lane` has something."""
        lane.ready = True
        self._ready.append(lane)

    def close(self) -> None:
        """Close all lanes and descriptors."""
        for source in [*self._locals, *(ring.source for ring in self._rings.values())]:
            self.drop(source)
        self._epoll.close()
        os.close(self._bell)

    # ------------------------------------------------------------------ inside

    def _watch(self) -> bool:
        """Watch the lanes' header words for at most LONGEST ns. True: a message is there.

        Nothing of this node can come meanwhile, as we are its thread.
        """
        if self._rung or self._credits:
            return False
        receivers = [ring.feed for ring in self._rings.values()]
        now = time.monotonic_ns
        before = now()
        deadline, undisturbed = before + LONGEST, True
        while (instant := now()) < deadline:
            if instant - before > DISTURBED:
                undisturbed = False  # somebody else had our core meanwhile, perhaps the sender itself
            before = instant
            for receiver in receivers:
                if receiver.hinted:
                    found = self._glance()
                    self._spin.watched(found and undisturbed)
                    return found
        self._spin.watched(False)
        return False

    def _glance(self) -> bool:
        """Look only at lanes whose header words hint at news. True if there are some; False says nothing.

        Spares the epoll_wait of most wake-ups. Each time after TURN of them everything is looked at, as hints can be
        missing: a sender may be stopped between its publication and its hint.
        """
        if self._rung or self._credits:
            return False
        if self._glances >= TURN:
            self._look(0)
            return bool(self._ready)
        for ring in self._rings.values():
            if ring.feed.hinted and not ring.ready:
                if not self._refresh(ring):
                    return False
                self._glances += 1
                self._turn = TURN
                return True  # other lanes are seen when this one is empty
        return False

    def _refresh(self, ring: RingLane) -> bool:
        """Queue a lane if something arrived in it."""
        try:
            arrived = ring.feed.refresh()
        except LaneCorrupt as error:
            self._give_up(ring, error)
            return False
        if arrived and not ring.ready:
            self.queue_lane(ring)
        return arrived

    def _look(self, timeout: float | None) -> None:
        """See what arrived in which lane."""
        self._turn = TURN
        self._glances = 0
        for descriptor, _ in self._epoll.poll(timeout, 64):
            ring = self._rings.get(descriptor)
            if ring is not None:
                self._refresh(ring)
            elif descriptor == self._bell:
                os.eventfd_read(self._bell)
                self._rung = False
            else:
                sender = self._credits.get(descriptor)
                if sender is not None and sender.pump():
                    self.unwatch(descriptor)

    def _give_up(self, lane: RingLane | LocalLane, error: Exception) -> None:
        """What comes after a broken frame cannot be trusted: the lane is closed, the supervisor restarts its sender."""
        if isinstance(error, LaneCorrupt):
            self._corrupt_lanes += 1
        else:
            self._decode_errors += 1
        self.drop(lane.source)
        detail = f"{type(error).__name__}: {error}"
        if self.on_corrupt is None:
            raise LaneCorrupt(f"lane from {lane.source}: {detail}") from error
        self.on_corrupt(lane.source, detail)

    def _drop_ring(self, descriptor: int, ring: RingLane) -> None:
        self._epoll.unregister(descriptor)
        del self._rings[descriptor]
        self._unready(ring)
        ring.feed.close()

    def _unready(self, lane: RingLane | LocalLane) -> None:
        if lane.ready:
            lane.ready = False
            self._ready.remove(lane)
