"""Inbox and Ref together: order, backlog, fairness, wake-ups on trio and asyncio, trouble."""

import asyncio
import os
import random
import select
import signal
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from rings import rings  # noqa: F401 (each test runs in all ways)

from actorserve.actors.actor import BURST, Actor, Context, connect, disconnect
from actorserve.actors.inbox import TURN, Inbox
from actorserve.actors.lane import MAX_MESSAGE, LaneCorrupt, LaneReceiver, LaneSender, create_lane
from actorserve.actors.messages import Drain, PeerUp, SystemMessage
from actorserve.actors.ref import Gone, Ref
from actorserve.actors.ring import HEAD
from actorserve.config import EngineConfig, ModelInfo


class Note(msgspec.Struct, frozen=True, array_like=True, tag=100):
    number: int
    payload: memoryview = memoryview(b"")


class Stray(msgspec.Struct, frozen=True, array_like=True, tag=101):
    pass


Letters = SystemMessage | Note
MODEL = ModelInfo(name="m", path="", model_type="llama", vocab_size=8, context_length=8, eos_ids=(0,))


class Pair:
    """A sender's inbox and ref, and the receiver's inbox, joined by a ring as nodes would."""

    def __init__(self, capacity: int = 4096) -> None:
        fds = create_lane(capacity)
        self.outbox = Inbox(Letters)
        self.inbox = Inbox(Letters)
        self.ref = Ref("there", self.outbox)
        self.inbox.add_ring("here", LaneReceiver(fds.dup()))
        self.ref.connect(LaneSender(fds), 1)

    def close(self) -> None:
        self.ref.disconnect()
        self.outbox.close()
        self.inbox.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def numbers(inbox: Inbox) -> list[int]:
    """All that is there."""
    found = []
    while (item := inbox.poll()) is not None:
        found.append(item[0].number)
    return found


def readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def note(number: int, size: int = 0) -> Note:
    return Note(number, memoryview(bytes(size)))


actions = st.lists(st.tuples(st.sampled_from(["post", "try", "receive", "credit"]), st.integers(0, 3000)), max_size=60)


@settings(deadline=None, max_examples=50)
@given(actions)
def test_order_is_kept_between_post_and_try_send(actions: list[tuple[str, int]]) -> None:
    pair, accepted, got = Pair(), [], []
    for number, (action, size) in enumerate(actions):
        if action == "post":
            pair.ref.post(note(number, size))
            accepted.append(number)
        elif action == "try":
            if pair.ref.try_send(note(number, size)):
                accepted.append(number)
        elif action == "receive":
            got += numbers(pair.inbox)
        else:
            assert pair.outbox.poll() is None
    while len(got) < len(accepted):
        pair.outbox.poll()
        got += numbers(pair.inbox)
    assert got == accepted and pair.ref.backlog == 0
    pair.close()


def test_try_send_refuses_while_older_messages_wait(pair: Pair) -> None:
    while pair.ref.try_send(note(0, 500)):
        continue
    pair.ref.post(note(1, 500))
    pair.ref.post(note(2, 9000))
    assert pair.ref.backlog == 2 and not pair.ref.try_send(note(3))
    assert not readable(pair.outbox.fileno())
    first = numbers(pair.inbox)
    assert set(first) == {0} and readable(pair.outbox.fileno()), "credit wakes the sender's inbox"
    got: list[int] = []
    while len(got) < 2:
        assert pair.outbox.poll() is None
        got += numbers(pair.inbox)
    assert got == [1, 2] and pair.ref.backlog == 0
    assert pair.ref.try_send(note(3))
    pair.outbox.poll()
    numbers(pair.inbox)
    assert not readable(pair.outbox.fileno()), "nothing waits: credit is not watched any more"


def test_fileno_is_readable_exactly_when_something_arrived() -> None:
    pair = Pair()
    sender = Context("near", EngineConfig(), MODEL, Letters)
    local = pair.inbox.add_local("near", 10, False)
    sender.add_ref("there").connect(local, 1)
    for send in (
        lambda: pair.ref.post(note(1)),
        lambda: sender.ref("there").post(note(1)),
        lambda: pair.inbox.put_system(Drain(1)),
        lambda: pair.inbox.ring(),
    ):
        assert pair.inbox.poll() is None and not readable(pair.inbox.fileno())
        send()
        assert readable(pair.inbox.fileno())
        while pair.inbox.poll() is not None:
            continue
        assert not readable(pair.inbox.fileno())
    sender.close()
    pair.close()


def test_a_busy_lane_does_not_starve_others(pair: Pair) -> None:
    quiet_fds = create_lane(4096)
    quiet = Ref("there", pair.outbox)
    quiet.connect(LaneSender(quiet_fds.dup()), 1)
    pair.inbox.add_ring("quiet", LaneReceiver(quiet_fds))
    local = pair.inbox.add_local("local", 10, False)
    for count in range(1, 20 * TURN):
        while pair.ref.try_send(note(0)):
            continue  # the busy lane is never empty
        item = pair.inbox.poll()
        assert item is not None
        if count == TURN + 1:
            quiet.post(note(1))
            local.put(note(2))
        if count > TURN + 1 and item[1] != "here":
            assert count <= 5 * TURN
            if item[1] == "local":
                break
    else:
        pytest.fail("the quiet lanes were never served")
    quiet.disconnect()


def test_all_room_comes_back_when_the_inbox_is_emptied(pair: Pair) -> None:
    """The credit for the last quarter too, although no message follows that would give it."""
    for _ in range(3):
        sent = 0
        while pair.ref.try_send(note(sent, 490)):  # frames of 512 bytes, two to the quarter
            sent += 1
        assert sent == 8 and numbers(pair.inbox) == [*range(8)]


def test_system_messages_come_first(pair: Pair) -> None:
    pair.ref.post(note(1))
    pair.inbox.put_system(PeerUp("here", 1))
    pair.inbox.put_system(Drain(5))
    assert [pair.inbox.poll() for _ in range(3)] == [
        (PeerUp("here", 1), "supervisor"),
        (Drain(5), "supervisor"),
        (note(1), "here"),
    ]


def test_views_are_valid_until_the_next_poll(pair: Pair) -> None:
    """The sender may fill the whole rest of the ring meanwhile, but not the message that is looked at."""
    for number in range(200):
        pair.ref.post(Note(number, memoryview(bytes([number]) * 700)))
        item = pair.inbox.poll()
        assert item is not None
        while pair.ref.try_send(Note(255, memoryview(b"\xff" * 100))):
            continue
        assert bytes(item[0].payload) == bytes([number]) * 700
        numbers(pair.inbox)


@pytest.mark.parametrize("garbage", [msgspec.msgpack.encode(Stray()), b"\xc1", b"\x92\x64\xa1\xff", b"\x91" * 5000])
def test_a_message_that_cannot_be_decoded_closes_its_lane(garbage: bytes) -> None:
    fds = create_lane(1 << 16)
    inbox, sender = Inbox(Letters), LaneSender(fds.dup())
    inbox.add_ring("here", LaneReceiver(fds))
    told: list[tuple[str, str]] = []
    inbox.on_corrupt = lambda source, detail: told.append((source, detail))
    sender.try_send(msgspec.msgpack.encode(note(1)))
    sender.try_send(garbage)
    sender.try_send(msgspec.msgpack.encode(note(2)))
    assert numbers(inbox) == [1]
    assert [source for source, _ in told] == ["here"]
    assert inbox.statistics().decode_errors == 1
    sender.try_send(msgspec.msgpack.encode(note(3)))
    assert inbox.poll() is None
    sender.close()
    inbox.close()


def test_a_broken_ring_closes_its_lane(pair: Pair) -> None:
    told: list[str] = []
    lane = next(iter(pair.inbox._rings.values())).receiver
    os.pwrite(lane.fds.memory, (12).to_bytes(8, sys.byteorder), HEAD * 8)
    with pytest.raises(LaneCorrupt, match="here"):
        pair.inbox.poll()
    assert pair.inbox.statistics().corrupt_lanes == 1
    pair.ref.on_corrupt = lambda name, _: told.append(name)
    assert pair.ref._ring is not None
    os.eventfd_write(pair.ref._ring.fds.credit, 1 << 40)
    with pytest.raises(Gone):
        while True:
            pair.ref.post(note(1, 500))
    assert told == ["there"] and not pair.ref.up


def test_gone_before_and_after_the_connection(pair: Pair) -> None:
    lonely = Ref("nobody", pair.outbox)
    assert not lonely.up
    for send in (lonely.post, lonely.try_send):
        with pytest.raises(Gone):
            send(note(1))
    while pair.ref.try_send(note(1, 500)):
        continue
    pair.ref.post(note(2))
    pair.ref.disconnect()
    assert pair.ref.backlog == 0 and not pair.ref.up
    with pytest.raises(Gone):
        pair.ref.post(note(3))
    assert pair.outbox.poll() is None


def test_statistics_count(pair: Pair) -> None:
    for number in range(10):
        pair.ref.post(note(number))
    numbers(pair.inbox)
    seen = pair.inbox.statistics()
    assert seen.received == 10 == sum(seen.wait_histogram) and seen.wait_ns > 0
    with pytest.raises(AttributeError):
        seen.received = 0  # type: ignore[misc]


# ------------------------------------------------------------------ trio


async def collect(inbox: Inbox, count: int) -> list[int]:
    got: list[int] = []
    while len(got) < count:
        await inbox.wait()
        got += numbers(inbox)
    return got


def test_send_waits_for_room_and_keeps_order_with_post(pair: Pair) -> None:
    async def send(first: int) -> None:
        for number in range(first, first + 100):
            await pair.ref.send(note(number, random.Random(number).randrange(3000)))

    async def post(first: int) -> None:
        for number in range(first, first + 100):
            pair.ref.post(note(number, random.Random(number).randrange(3000)))
            await trio.lowlevel.checkpoint()

    async def flush() -> None:
        while True:
            await pair.outbox.wait()
            pair.outbox.poll()

    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flush)
                nursery.start_soon(send, 0)
                nursery.start_soon(send, 1000)
                nursery.start_soon(post, 2000)
                got = await collect(pair.inbox, 300)
                nursery.cancel_scope.cancel()
        for first in (0, 1000, 2000):
            assert [number for number in got if first <= number < first + 100] == [*range(first, first + 100)]

    trio.run(main)


def test_send_ends_with_the_peer_or_a_cancellation(pair: Pair) -> None:
    async def main() -> None:
        while pair.ref.try_send(note(0, 500)):
            continue
        with trio.move_on_after(0) as scope:
            await pair.ref.send(note(1))
        assert scope.cancelled_caught
        assert set(numbers(pair.inbox)) == {0}, "the cancelled message was not sent"
        while pair.ref.try_send(note(0, 500)):
            continue
        async with trio.open_nursery() as nursery:

            async def sender() -> None:
                with pytest.raises(Gone):
                    await pair.ref.send(note(2))

            nursery.start_soon(sender)
            await trio.testing.wait_all_tasks_blocked()
            pair.ref.post(note(3))
            pair.ref.disconnect()

    trio.run(main)


@pytest.mark.parametrize("waiting", [0, 3])
def test_what_no_lane_takes_is_refused_at_once(pair: Pair, waiting: int) -> None:
    """Also behind messages that wait for room: not when it is its turn, amid the sender's poll."""
    while pair.ref.backlog < waiting:
        pair.ref.post(note(1, 500))
    before = pair.ref.backlog
    with pytest.raises(ValueError, match="a lane takes at most"):
        pair.ref.post(note(2, MAX_MESSAGE))
    assert pair.ref.backlog == before and pair.ref.up
    while pair.ref.backlog:
        numbers(pair.inbox)
        pair.outbox.poll()
    pair.ref.post(note(3))
    assert numbers(pair.inbox)[-1] == 3


def test_wait_returns_for_what_is_there_already_and_is_a_checkpoint(pair: Pair) -> None:
    async def main() -> None:
        for _ in range(2 * TURN):
            pair.ref.post(note(1))
        with trio.fail_after(60):
            await pair.inbox.wait()
            assert pair.inbox.poll() is not None
            await pair.inbox.wait()
        with trio.CancelScope() as scope:
            scope.cancel()
            await pair.inbox.wait()
        assert scope.cancelled_caught

    trio.run(main)


def test_wait_on_asyncio(pair: Pair) -> None:
    from actorserve.actors.node import _asyncio_readable

    async def main() -> None:
        pair.inbox.wait_readable = _asyncio_readable
        receiving = asyncio.ensure_future(collect(pair.inbox, 50))
        for number in range(50):
            await asyncio.sleep(0)
            pair.ref.post(note(number))
        assert await asyncio.wait_for(receiving, 20) == [*range(50)]

    asyncio.run(main())


# ------------------------------------------------------------------ local lanes


def contexts() -> tuple[Context, Context]:
    config = EngineConfig()
    return (
        Context("left", config, MODEL, Letters, sends_to=["right"]),
        Context("right", config, MODEL, Letters, sends_to=["left"], epoch=4),
    )


@pytest.mark.parametrize("codec", [False, True])
def test_local_lanes_behave_as_rings_do(codec: bool) -> None:
    left, right = contexts()
    with pytest.raises(Gone):
        left.ref("right").post(note(1))
    connect(left, right, limit=3, codec=codec)
    connect(right, left, limit=3, codec=codec)
    assert left.inbox.poll() == (PeerUp("right", 4), "supervisor") and left.inbox.poll() is None
    assert right.inbox.poll() == (PeerUp("left", 1), "supervisor") and right.inbox.poll() is None
    ref = left.ref("right")
    sent = note(0, 5)
    assert ref.up and all(ref.try_send(message) for message in (sent, note(1), note(2)))
    assert not ref.try_send(note(3))
    ref.post(note(4))
    item = right.inbox.poll()
    assert item == (sent, "left") and (item[0] is sent) != codec
    assert numbers(right.inbox) == [1, 2, 4]
    disconnect(left, right)
    with pytest.raises(Gone):
        ref.post(note(1))
    left.close()
    right.close()


def test_codec_refuses_what_the_receiver_does_not_know() -> None:
    left, right = contexts()
    connect(left, right, codec=True)
    with pytest.raises(msgspec.ValidationError):
        left.ref("right").post(Stray())
    left.close()
    right.close()


def test_send_over_a_full_local_lane_waits() -> None:
    left, right = contexts()
    connect(left, right, limit=2)

    async def main() -> None:
        async def send() -> None:
            for number in range(20):
                await left.ref("right").send(note(number))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                right.inbox.poll()
                assert await collect(right.inbox, 20) == [*range(20)]

            async with trio.open_nursery() as nursery:

                async def stuck() -> None:
                    with pytest.raises(Gone):
                        while True:
                            await left.ref("right").send(note(0))

                nursery.start_soon(stuck)
                await trio.testing.wait_all_tasks_blocked()
                disconnect(left, right)

    trio.run(main)
    left.close()
    right.close()


# ------------------------------------------------------------------ actors


class Counting(Actor):
    inbox_type = Letters

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.events: list[Any] = []

    def receive(self, message: Any, source: str) -> None:
        self.events.append(source)

    def flush(self) -> None:
        self.events.append(None)


def test_drain_flushes_after_each_burst_and_leaves_the_rest_readable(pair: Pair) -> None:
    left, right = contexts()
    actor = Counting(right)
    connect(left, right)
    for _ in range(BURST):
        left.ref("right").post(note(1))
    actor.drain()
    assert actor.events == ["supervisor"] + ["left"] * (BURST - 1) + [None]
    assert readable(right.inbox.fileno())
    actor.drain()
    assert actor.events[-2:] == ["left", None] and not readable(right.inbox.fileno())

    async def main() -> None:
        left.ref("right").post(note(1))
        with trio.move_on_after(60) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(actor.run)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught

    before = len(actor.events)
    trio.run(main)
    assert actor.events[before:] == ["left", None]
    left.close()
    right.close()


def test_a_burst_looks_at_other_lanes_too(pair: Pair) -> None:
    """In one drain of a lane that is never empty, what comes by another lane meanwhile is seen."""
    right = Context("right", EngineConfig(), MODEL, Letters)
    fds, other = create_lane(1 << 16), create_lane(4096)
    busy, quiet = Ref("right", pair.outbox), Ref("right", pair.outbox)
    busy.connect(LaneSender(fds.dup()), 1)
    quiet.connect(LaneSender(other.dup()), 1)
    right.inbox.add_ring("busy", LaneReceiver(fds))
    right.inbox.add_ring("quiet", LaneReceiver(other))

    class Refilling(Counting):
        def receive(self, message: Any, source: str) -> None:
            super().receive(message, source)
            busy.try_send(note(0))
            if len(self.events) == 1:
                quiet.post(note(1))

    actor = Refilling(right)
    for _ in range(BURST):
        busy.try_send(note(0))
    actor.drain()
    assert "quiet" in actor.events and readable(right.inbox.fileno())
    for ref in (busy, quiet):
        ref.disconnect()
    right.close()


def test_a_context_knows_its_peers_only() -> None:
    left, right = contexts()
    assert tuple(left.peers()) == ("right",) and left.ref("right") is left.ref("right")
    with pytest.raises(KeyError):
        left.ref("elsewhere")
    with pytest.raises(RuntimeError, match="nursery"):
        _ = left.nursery
    left.close()
    right.close()


# ------------------------------------------------------------------ two processes


def echo(there: Pair, back: Pair, seed: int) -> None:
    """The child: answers each message, falling asleep in a way drawn at random before each."""
    for number in range(EXCHANGES):
        assert receive_somehow(there.inbox, random.Random(seed + number)) == number
        back.ref.post(note(number))


def receive_somehow(inbox: Inbox, source: random.Random) -> int:
    """The next message's number; fails if none comes for long although one was sent."""
    while True:
        for _ in range(source.randrange(3)):
            if (item := inbox.poll(look=source.random() < 0.5)) is not None:
                return item[0].number  # type: ignore[no-any-return]
        inbox._spin.on = source.random() < 0.2
        if source.random() < 0.3:
            inbox.listen()
            assert select.select([inbox.fileno()], [], [], 60)[0], "a wake-up was lost"
        else:
            before = inbox.statistics().parks
            inbox.wait_in_thread(60)
            if inbox.statistics().parks > before and (item := inbox.poll()) is not None:
                return item[0].number  # type: ignore[no-any-return]


EXCHANGES = 3000


def test_no_wakeup_is_lost_between_two_processes() -> None:
    """Each message finds the other side asleep, awake, or in between; a lost wake-up stops the exchange for good."""
    there, back = Pair(), Pair()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            echo(there, back, 1000)
            code = 0
        finally:
            os._exit(code)
    try:
        for number in range(EXCHANGES):
            there.ref.post(note(number))
            assert receive_somehow(back.inbox, random.Random(number)) == number
        assert os.waitpid(child, 0)[1] == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        there.close()
        back.close()
