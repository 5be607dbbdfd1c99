"""An actor's one place of arrival: all its lanes under one epoll descriptor, plus a queue for system messages.

Every actor has one Inbox; its node adds and drops lanes, the actor polls it and waits for it from trio, asyncio or
anything that can wait for a descriptor. Invariant: after `poll` returned None, `fileno()` is readable if and only if
something arrived since, be it in shared memory, from an actor of the same node, from the supervisor, or credit for a
message that waits behind a full lane. Lanes take turns, so that a busy one cannot starve another. What is in the rings
is seen by a look into memory (ring.Watch); the kernel is asked only after a sleep, whose wake-up it has to forget, and
for what is not in a ring. Some sleeps are spared by looking for a while first (spin.py).
"""

import operator
import os
import select
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import trio

from . import ring
from .lane import LaneCorrupt, LaneMetrics, LaneReceiver
from .ring import BUCKETS
from .spin import DISTURBED, LONGEST, Spin

SUPERVISOR = "supervisor"
"""Source of PeerUp, PeerDown and Drain."""
TURN = 32
"""Messages a lane may deliver in a row while others wait."""


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

    __slots__ = (
        "closed",
        "codec",
        "feed",
        "histogram",
        "inbox",
        "limit",
        "queue",
        "ready",
        "sent",
        "sent_ns",
        "source",
        "space",
        "wait_ns",
    )

    def __init__(self, source: str, inbox: "Inbox", limit: int, codec: bool) -> None:
        self.source, self.inbox, self.limit, self.codec = source, inbox, limit, codec
        self.queue: deque[tuple[Any, int]] = deque()
        self.ready = self.closed = False
        self.feed = self
        self.sent = self.sent_ns = self.wait_ns = 0
        self.histogram = [0] * BUCKETS
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

    def waits(self) -> tuple[int, tuple[int, ...]]:
        """As a ring's."""
        return self.wait_ns, tuple(self.histogram)

    def next(self) -> Any:
        """The next message, or None."""
        if not self.queue:
            return None
        message, self.sent_ns = self.queue.popleft()
        waited = time.monotonic_ns() - self.sent_ns
        self.wait_ns += waited
        self.histogram[waited.bit_length()] += 1
        if self.space and not self.full:
            self.space.unpark_all()
        return message


class RingLane:
    """A lane from another node; `feed` is the receiver's reader."""

    __slots__ = ("feed", "ready", "receiver", "source")

    def __init__(self, source: str, receiver: LaneReceiver) -> None:
        self.source, self.receiver = source, receiver
        self.feed = receiver.reader
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
        self._watch = ring.types().Watch(self._epoll)
        self._rings_always: bool = self._watch.rings_always
        self._asleep = False  # see _look
        self._locals: dict[str, LocalLane] = {}
        self._credits: dict[int, Watched] = {}
        self._system: deque[Any] = deque()
        self._ready: deque[RingLane | LocalLane] = deque()
        self._turn = 0
        self._spin = Spin()
        self._slept_at = 0  # when the last wait fell asleep; 0 once its first message told how it went
        self._caught = 0
        self._parks = self._decode_errors = self._corrupt_lanes = 0
        self._wait_ns = 0  # of lanes that are gone, and the same in buckets
        self._histogram = [0] * BUCKETS

    # ------------------------------------------------------------------ for the actor

    def poll(self, look: bool = True) -> tuple[Any, str] | None:
        """The next (message, name of the actor that sent it), or None. Never blocks.

        System messages come first, with source "supervisor". memoryview fields of the message are valid until the
        next poll. Without `look` a None means that all is taken which was there; with it, also that `fileno()` will
        become readable, which costs a look into the kernel now and then.
        """
        if self._system:
            return self._system.popleft(), SUPERVISOR
        while True:
            if self._turn <= 0 or not self._ready:
                self._look(look)
                if self._system:
                    return self._system.popleft(), SUPERVISOR
                if not self._ready:
                    return None
            lane = self._ready[0]
            feed: Any = lane.feed
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
            if self._slept_at:
                if feed is not lane:
                    self._spin.slept(self._slept_at, feed.sent_ns, feed.received_ns)
                self._slept_at = 0
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
        if self.wait_readable is trio.lowlevel.wait_readable:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._ready or self._system or self._find_before_sleep():
                await trio.lowlevel.cancel_shielded_checkpoint()  # cheaper than asking the kernel for what we know
                return
        else:
            if not self._asleep:
                self._fall_asleep()
            if self._ready or self._system:
                self.ring()  # the descriptor is readable then, so this is one checkpoint under any loop
        self._parks += 1
        self._slept_at = time.monotonic_ns()
        await self.wait_readable(self._descriptor)
        self._ask_kernel(0)

    def wait_in_thread(self, seconds: float | None = None) -> None:
        """`wait` for a thread without a loop: blocks until `poll` may return something, or for `seconds`."""
        if self._ready or self._system or self._find_before_sleep():
            return
        self._parks += 1
        self._slept_at = time.monotonic_ns()
        self._ask_kernel(-1 if seconds is None else round(seconds * 1000))

    def fileno(self) -> int:
        """A descriptor that is readable when `poll` may return something, for the time until poll returned None."""
        return self._epoll.fileno()

    def ring(self) -> None:
        """Make `fileno()` readable until the next None of `poll`: for who stops polling before that."""
        if not self._rung:
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def listen(self) -> None:
        """Before one waits for `fileno()`, after a None of poll(look=False): it will be readable as after any None."""
        if not (self._asleep or self._ready or self._system):
            self._fall_asleep()
        if self._ready or self._system:
            self.ring()

    def statistics(self) -> InboxStatistics:
        """A snapshot of the counters."""
        wait_ns, histogram = self._wait_ns, self._histogram
        lanes: tuple[RingLane | LocalLane, ...] = (*self._rings.values(), *self._locals.values())
        for lane in lanes:
            more, counts = lane.feed.waits()
            wait_ns += more
            histogram = list(map(operator.add, histogram, counts))
        return InboxStatistics(
            sum(histogram),
            wait_ns,
            tuple(histogram),
            self._parks,
            self._caught,
            self._decode_errors,
            self._corrupt_lanes,
        )

    def lanes(self) -> dict[str, LaneMetrics]:
        """Each connected lane by the name of the actor that sends."""
        found = {lane.source: lane.receiver.metrics() for lane in self._rings.values()}
        return found | {source: lane.metrics() for source, lane in self._locals.items()}

    # ------------------------------------------------------------------ for the node and the refs

    def put_system(self, message: Any) -> None:
        """A message of the supervisor: overtakes what is in the lanes."""
        self._system.append(message)
        self.ring()

    def add_ring(self, source: str, receiver: LaneReceiver) -> None:
        """Listen to a lane of another node; replaces an older one of the same source."""
        self.drop(source)
        lane = self._rings[receiver.fds.data] = RingLane(source, receiver)
        self._epoll.register(receiver.fds.data, select.EPOLLIN | select.EPOLLET)
        self._watch.add(lane.feed, receiver.fds.data, lane)
        self._asleep = True
        if not self._watch.sleep():
            self.ring()

    def add_local(self, source: str, limit: int, codec: bool) -> LocalLane:
        """The lane of an actor of this node; its Ref puts messages into it."""
        self.drop(source)
        lane = self._locals[source] = LocalLane(source, self, limit, codec)
        return lane

    def drop(self, source: str) -> None:
        """Forget the lane of `source` and what is in it."""
        local = self._locals.pop(source, None)
        if local is not None:
            self._keep_waits(local)
            local.closed = True
            local.space.unpark_all()
            self._unready(local)
        for descriptor, lane in list(self._rings.items()):
            if lane.source == source:
                self._drop_ring(descriptor, lane)

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
        for source in [*self._locals, *(lane.source for lane in self._rings.values())]:
            self.drop(source)
        self._epoll.close()
        os.close(self._bell)

    # ------------------------------------------------------------------ inside

    # Awake, we look into the rings ourselves and senders do not ring. Asleep, each sender rings once, so while
    # `_asleep` holds, a lane's bell is set or its wake-up is in the kernel or on its way there. Whoever takes wake-ups
    # from the kernel must therefore end the sleep, and the next one sets all bells anew. A wake-up may come late, for
    # a message that was taken long before: it makes one look for nothing.

    def _look(self, kernel: bool) -> None:
        """See what arrived in which lane. With `kernel`, be sure that the descriptor tells what arrives later."""
        self._turn = TURN
        if self._rung or (self._credits and (kernel or self._ready)):
            self._ask_kernel(0)
        elif self._find():
            self._wake()
        elif self._asleep and kernel:
            self._ask_kernel(0)  # it may have woken who called us
        if kernel and not self._ready and not self._asleep:
            self._fall_asleep()

    def _find(self) -> bool:
        """Queue the rings that have news. True if there are some."""
        found = self._watch.news()
        return found is not None and self._queue(found)

    def _queue(self, found: list[RingLane]) -> bool:
        for lane in found:
            if not lane.ready:
                lane.ready = True
                self._ready.append(lane)
        return True

    def _fall_asleep(self) -> None:
        """From now on each sender rings; what arrived before is queued."""
        if self._rings_always:
            self._ask_kernel(0)
        self._asleep = True
        if not self._watch.sleep():
            self._wake()
            self._find()

    def _wake(self) -> None:
        """End the sleep: senders need not ring any more, and what they rang is forgotten."""
        if self._asleep:
            self._asleep = False
            if self._watch.wake():
                self._ask_kernel(0)

    def _ask_kernel(self, milliseconds: int) -> None:
        """Wait as long as told (negative: for ever), end the sleep, and see what arrived."""
        found = self._watch.wait(milliseconds)
        self._asleep = False
        if found is not None:
            self._queue(found)
        if (self._rung or self._credits) and (others := self._watch.others) is not None:
            for descriptor in others:
                if descriptor == self._bell:
                    os.eventfd_read(self._bell)
                    self._rung = False
                elif (sender := self._credits.get(descriptor)) is not None and sender.pump():
                    self.unwatch(descriptor)

    def _find_before_sleep(self) -> bool:
        """True: no sleep is needed, for there are news or they came while we watched. False: it may begin."""
        if self._find():
            self._wake()
        elif not (self._spin.on and self._spin_for_news()):
            if not self._asleep:
                self._fall_asleep()
            return bool(self._ready)
        self._caught += 1
        return True

    def _spin_for_news(self) -> bool:
        """Look into the rings for at most LONGEST ns. Nothing of this node can come meanwhile, as we are its thread."""
        if self._rung or self._credits:
            return False
        self._wake()
        undisturbed = self._watch.spin(LONGEST, DISTURBED)  # else somebody had our core, perhaps the sender itself
        self._spin.watched(bool(undisturbed))
        return self._find()

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

    def _drop_ring(self, descriptor: int, lane: RingLane) -> None:
        self._epoll.unregister(descriptor)
        del self._rings[descriptor]
        self._unready(lane)
        self._keep_waits(lane)
        self._watch.remove(lane.feed)
        lane.receiver.close()

    def _keep_waits(self, lane: RingLane | LocalLane) -> None:
        """The counters outlive the lane."""
        wait_ns, counts = lane.feed.waits()
        self._wait_ns += wait_ns
        self._histogram = list(map(operator.add, self._histogram, counts))

    def _unready(self, lane: RingLane | LocalLane) -> None:
        if lane.ready:
            lane.ready = False
            self._ready.remove(lane)
