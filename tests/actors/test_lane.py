"""The ring: order and content against a deque, hostile memory, a producer that is killed while it writes.

Each test runs with the ring in C, in Python, and with one end in each.
"""

import contextlib
import os
import random
import select
import signal
import struct
import sys
import zlib
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rings import rings  # noqa: F401 (each test runs in all ways)

from actorserve.actors.lane import (
    FRAME_HEADER,
    HEADER,
    MAX_MESSAGE,
    LaneCorrupt,
    LaneFds,
    LaneGauge,
    LaneReceiver,
    LaneSender,
    create_lane,
)
from actorserve.actors.ring import HEAD

CAPACITY = 4096


def make_lane(capacity: int = CAPACITY) -> tuple[LaneSender, LaneReceiver]:
    fds = create_lane(capacity, epoch=7)
    return LaneSender(fds.dup()), LaneReceiver(fds)


def publish_falsely(sender: LaneSender, count: int) -> None:
    """Say in the header page that `count` bytes more were published."""
    head = int.from_bytes(os.pread(sender.fds.memory, 8, HEAD * 8), sys.byteorder)
    os.pwrite(sender.fds.memory, ((head + count) % 2**64).to_bytes(8, sys.byteorder), HEAD * 8)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


sizes = st.one_of(st.integers(0, 64), st.integers(900, 1100), st.integers(1, 20_000))
steps = st.lists(
    st.one_of(st.tuples(st.just("send"), sizes, st.booleans()), st.tuples(st.just("take"), st.integers(1, 9))),
    max_size=80,
)


@settings(deadline=None, max_examples=60)
@given(steps, st.sampled_from([4096, 8192]))
def test_any_sequence_equals_a_queue(steps: list[tuple], capacity: int) -> None:
    sender, receiver = make_lane(capacity)
    model: deque[bytes] = deque()
    number = 0
    for kind, count, *publish in steps:
        if kind == "send":
            number += 1
            payload = (number.to_bytes(4, "little") * (count // 4 + 1))[:count]
            if sender.try_send(payload, *publish):
                model.append(payload)
        else:
            receiver.refresh()
            sender.pump()
            for _ in range(count):
                view = receiver.next()
                if view is None:
                    break
                assert bytes(view) == model.popleft()
    while model:
        sender.publish()
        sender.pump()
        receiver.refresh()
        while (view := receiver.next()) is not None:
            assert bytes(view) == model.popleft()
    assert sender.pump() and receiver.next() is None
    assert sender.try_send(b"x" * sender.max_frame), "an emptied ring takes the largest frame"
    sender.close()
    receiver.close()


def test_a_full_lane_refuses_and_takes_again_after_credit() -> None:
    sender, receiver = make_lane()
    sent = 0
    while sender.try_send(bytes(200)):
        sent += 1
    assert sent == CAPACITY // (FRAME_HEADER + 200)
    credit = select.poll()
    credit.register(sender.fds.credit, select.POLLIN)
    assert not credit.poll(0)
    receiver.refresh()
    for _ in range(sent):
        assert receiver.next() is not None
    assert receiver.next() is None
    assert credit.poll(0), "a quarter of the ring is free: the sender is told"
    assert sender.try_send(bytes(200))
    sender.close()
    receiver.close()


def test_unpublished_frames_are_invisible() -> None:
    sender, receiver = make_lane()
    sender.try_send(b"one", publish=False)
    assert not receiver.refresh()
    sender.publish()
    assert receiver.refresh() and bytes(receiver.next() or b"") == b"one"
    sender.close()
    receiver.close()


def test_no_frame_is_larger_than_a_quarter() -> None:
    sender, receiver = make_lane()
    gauge = LaneGauge(receiver.fds)
    assert sender.try_send(bytes(sender.max_frame)) and gauge.read().sent == 1
    assert sender.try_send(bytes(sender.max_frame + 1)) and gauge.read().sent > 2
    gauge.close()
    sender.close()
    receiver.close()


def test_a_message_of_many_rings_goes_through_in_fragments() -> None:
    sender, receiver = make_lane()
    message = random.Random(1).randbytes(1_000_003)
    assert sender.try_send(message)
    assert sender.busy
    assert not sender.try_send(b"next"), "fragments of one message are contiguous"
    view = None
    while view is None:
        sender.pump()
        receiver.refresh()
        view = receiver.next()
    assert bytes(view) == message and not sender.busy
    assert sender.try_send(b"next")
    receiver.refresh()
    assert bytes(receiver.next() or b"") == b"next"
    assert bytes(view) == message, "a joined message is a copy: it does not die with the next one"
    with pytest.raises(ValueError, match="at most"):
        sender.try_send(bytes(MAX_MESSAGE + 1))
    sender.close()
    receiver.close()


@settings(deadline=None, max_examples=120)
@given(
    st.binary(max_size=400),
    st.integers(0, CAPACITY - 400).map(lambda offset: offset & ~7),
    st.one_of(st.integers(0, CAPACITY + 64), st.integers(1, 2**63)),
    st.sampled_from([0, 8, 100, 1008, 4080]),
)
def test_hostile_memory_and_counters_raise_lane_corrupt(junk: bytes, offset: int, published: int, before: int) -> None:
    """Whatever the other process writes, the receiver returns views inside of the ring or raises LaneCorrupt."""
    sender, receiver = make_lane()
    if before <= sender.max_frame:
        sender.try_send(bytes(before))
    os.pwrite(sender.fds.memory, junk, HEADER + offset)
    publish_falsely(sender, published)
    try:
        for _ in range(CAPACITY):
            receiver.refresh()
            view = receiver.next()
            if view is None:
                break
            assert len(view) <= CAPACITY - FRAME_HEADER
    except LaneCorrupt:
        pass
    sender.close()
    receiver.close()


@pytest.mark.parametrize(
    ("words", "published"),
    [
        ([CAPACITY], 64),  # a length beyond the ring
        ([100], 64),  # a length beyond what is published
        ([1 << 32], 64),  # padding at the start
        ([1 << 40], 64),  # an unknown flag
        ([8 | 1 << 34], 24),  # a fragment without a first one
        ([8 | 1 << 33, 0, MAX_MESSAGE + 1], 24),  # a total beyond the limit
        ([8 | 1 << 33, 0, 4, 8 | 1 << 34, 0, 0], 48),  # more fragments than the total
        ([0], CAPACITY + 8),  # more published than fits
        ([0], 12),  # not a multiple of 8
    ],
)
def test_each_check_of_a_frame(words: list[int], published: int) -> None:
    sender, receiver = make_lane()
    os.pwrite(sender.fds.memory, struct.pack(f"{len(words)}Q", *words), HEADER)
    publish_falsely(sender, published)
    with pytest.raises(LaneCorrupt):
        receiver.refresh()
        receiver.next()
    sender.close()
    receiver.close()


def test_a_frame_beyond_the_end_of_the_ring_is_corrupt() -> None:
    """Published bytes suffice, but the frame would cross the end of the mapping."""
    sender, receiver = make_lane()
    for _ in range(CAPACITY // 64 - 1):
        assert sender.try_send(bytes(64 - FRAME_HEADER))
        receiver.refresh()
        assert receiver.next() is not None and receiver.next() is None
    os.pwrite(sender.fds.memory, struct.pack("Q", 100), HEADER + CAPACITY - 64)
    publish_falsely(sender, 256)
    receiver.refresh()
    with pytest.raises(LaneCorrupt, match="out of range"):
        receiver.next()
    sender.close()
    receiver.close()


def test_credit_for_more_than_was_sent_is_corrupt() -> None:
    sender, receiver = make_lane()
    while sender.try_send(bytes(200)):
        os.eventfd_write(sender.fds.credit, 1 << 40)
        with pytest.raises(LaneCorrupt):
            while sender.try_send(bytes(200)):
                continue
        break
    sender.close()
    receiver.close()


def test_only_a_sealed_lane_of_the_right_size_is_accepted() -> None:
    fds = create_lane(CAPACITY)
    with pytest.raises(PermissionError):
        os.ftruncate(fds.memory, 100)
    fds.close()
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, HEADER + CAPACITY)
    with pytest.raises(LaneCorrupt):
        LaneReceiver(LaneFds(loose, -1, -1))
    os.close(loose)
    for wrong in (0, 1000, 5000):
        with pytest.raises(ValueError, match="power of two"):
            create_lane(wrong)


def test_gauge_shows_depth_and_fullness() -> None:
    sender, receiver = make_lane()
    gauge = LaneGauge(receiver.fds)
    for _ in range(3):
        sender.try_send(bytes(100))
    seen = gauge.read()
    assert (seen.sent, seen.received, seen.depth_frames, seen.capacity) == (3, 0, 3, CAPACITY)
    assert seen.depth_bytes == 3 * (FRAME_HEADER + 104)
    receiver.refresh()
    receiver.next()
    assert gauge.read().depth_frames == 2, "a frame counts as received when it is handed out"
    while receiver.next() is not None:
        continue
    assert gauge.read().depth_bytes == 0
    while sender.try_send(bytes(100)):
        continue
    assert gauge.read().full == 1
    gauge.close()
    sender.close()
    receiver.close()


def test_closing_leaves_borrowed_views_readable_and_no_descriptor() -> None:
    before = open_fds()
    sender, receiver = make_lane()
    sender.try_send(b"kept")
    receiver.refresh()
    view = receiver.next()
    sender.close()
    receiver.close()
    receiver.close()
    assert view is not None and bytes(view) == b"kept"
    del view
    assert open_fds() == before


def produce(fds: LaneFds) -> None:
    """Frames and fragments with a checksum, as fast as possible, for ever."""
    sender, source, number = LaneSender(fds), random.Random(os.getpid()), 0
    room = select.poll()
    room.register(fds.credit, select.POLLIN)
    while True:
        body = source.randbytes(source.choice((1, 7, 100, 900, 4000, 16_000, 50_000)))
        message = struct.pack("<IQ", zlib.crc32(body), number) + body
        while not sender.try_send(message, source.random() < 0.7):
            room.poll(100)
        while not sender.pump():
            room.poll(100)
        number += 1


def consume_until_killed(child: int, receiver: LaneReceiver, lifetime: int) -> int:
    """Kill the producer after `lifetime` messages; the number of whole messages in order that came out."""
    expected, killed = 0, False
    arrival = select.poll()
    arrival.register(receiver.fds.data, select.POLLIN)
    while True:
        if not killed and expected >= lifetime:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed = True
        if not arrival.poll(0 if killed else 1000):
            assert killed, "the producer stalled"
            return expected
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(receiver.fds.data)
        receiver.refresh()
        while (view := receiver.next()) is not None:
            checksum, number = struct.unpack_from("<IQ", view)
            assert number == expected and zlib.crc32(view[12:]) == checksum
            expected += 1
            if not killed and expected >= lifetime:
                break  # kill at once, somewhere inside of its next writes


def test_a_killed_producer_leaves_whole_messages_only() -> None:
    before, shm = open_fds(), sorted(os.listdir("/dev/shm"))
    source = random.Random(5)
    for _ in range(8):
        fds = create_lane(1 << 16)
        child = os.fork()
        if child == 0:
            try:
                produce(fds)
            finally:
                os._exit(1)
        receiver = LaneReceiver(fds)
        lifetime = source.randrange(1, 300)
        assert consume_until_killed(child, receiver, lifetime) >= lifetime
        receiver.close()
    assert open_fds() == before and sorted(os.listdir("/dev/shm")) == shm
