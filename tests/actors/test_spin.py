"""The decision to watch before sleeping, told by invented times; and an inbox that looks and watches by hints."""

import os
import pathlib
import sys
from collections.abc import Iterator

import msgspec
import pytest
import trio
import trio.testing

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from test_inbox import Pair, collect, contexts, note, numbers, readable

from actorserve.actors.actor import connect
from actorserve.actors.inbox import TURN
from actorserve.actors.lane import _W_SENT, LaneReceiver, LaneSender, create_lane
from actorserve.actors.spin import CAUTION, DEAR, LONGEST, MISSES, STREAK, Spin


def sleep(spin: Spin, gap: int, cost: int, times: int = 1) -> None:
    """`times` waits that slept; the message was sent `gap` ns after the wait began and took `cost` ns."""
    for _ in range(times):
        spin.slept(1000, 1000 + gap, 1000 + gap + cost)


def miss(spin: Spin) -> None:
    for _ in range(MISSES):
        spin.watched(False)


def test_quick_answers_that_wake_dearly_make_it_watch() -> None:
    spin = Spin()
    sleep(spin, LONGEST - 1, DEAR + 1, STREAK - 1)
    assert not spin.on
    sleep(spin, LONGEST - 1, DEAR + 1)
    assert spin.on


def test_what_comes_rarely_or_wakes_cheaply_never_does() -> None:
    spin = Spin()
    sleep(spin, LONGEST, DEAR + 1, 10 * CAUTION)
    sleep(spin, LONGEST - 1, DEAR, 10 * CAUTION)
    assert not spin.on


def test_one_that_would_not_have_paid_begins_the_count_anew() -> None:
    spin = Spin()
    for _ in range(100):
        sleep(spin, 0, 2 * DEAR, STREAK - 1)
        sleep(spin, 1_000_000, 2 * DEAR)
    assert not spin.on


def test_it_stops_after_misses_in_a_row_only() -> None:
    spin = Spin()
    sleep(spin, 0, 2 * DEAR, STREAK)
    for _ in range(100):
        spin.watched(False)
        spin.watched(True)
    assert spin.on
    miss(spin)
    assert not spin.on


def test_attempts_in_vain_become_rare_and_success_forgives() -> None:
    spin, needed = Spin(), []
    for _ in range(12):
        count = 0
        while not spin.on:
            sleep(spin, 0, 2 * DEAR)
            count += 1
        needed.append(count)
        miss(spin)
    assert needed[:3] == [STREAK, 2 * STREAK, 4 * STREAK] and needed[-1] == CAUTION
    sleep(spin, 0, 2 * DEAR, CAUTION)
    for _ in range(CAUTION + 1):
        spin.watched(True)
    miss(spin)
    sleep(spin, 0, 2 * DEAR, STREAK)
    assert spin.on


# ------------------------------------------------------------------ hints and watching


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def hint(ring: LaneSender, sent: int) -> None:
    """Write into the header page how many frames were sent, as the sender does after each publication."""
    os.pwrite(ring.fds.memory, sent.to_bytes(8, sys.byteorder), _W_SENT * 8)


def test_a_sender_that_dies_before_its_hint_is_heard(pair: Pair) -> None:
    """Published in the kernel's counter, but the header words do not say so."""
    assert pair.ref._ring is not None
    for sent in range(3 * TURN):
        pair.ref.post(note(sent))
        hint(pair.ref._ring, sent)
        pair.inbox._spin.on = True
        assert readable(pair.inbox.fileno())
        pair.inbox.wait_in_thread(0)
        assert numbers(pair.inbox) == [sent]


def test_a_false_hint_is_no_message(pair: Pair) -> None:
    assert pair.ref._ring is not None
    hint(pair.ref._ring, 5)
    pair.inbox._spin.on = True
    assert pair.inbox.poll() is None
    pair.inbox.wait_in_thread(0)
    assert pair.inbox.poll() is None and pair.inbox.statistics().caught == 0
    pair.ref.post(note(1))
    assert numbers(pair.inbox) == [1]


def test_under_trio_a_false_hint_does_not_keep_awake(pair: Pair) -> None:
    assert pair.ref._ring is not None
    hint(pair.ref._ring, 5)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, pair.inbox, 1)
            await trio.testing.wait_all_tasks_blocked()
            pair.ref.post(note(1))

    trio.run(main)


def test_watching_finds_messages_without_sleep(pair: Pair) -> None:
    for number in range(5 * TURN):
        pair.inbox._spin.on = True
        pair.ref.post(note(number))
        pair.inbox.wait_in_thread()
        item = pair.inbox.poll(look=False)
        assert item is not None and item[0].number == number
        assert pair.inbox.poll(look=False) is None
    seen = pair.inbox.statistics()
    assert (seen.caught, seen.parks) == (5 * TURN, 0)


def test_busy_lanes_with_hints_do_not_hide_one_without(pair: Pair) -> None:
    fds = create_lane(4096)
    silent = LaneSender(fds.dup())
    pair.inbox.add_ring("silent", LaneReceiver(fds))
    silent.try_send(msgspec.msgpack.encode(note(1)))
    hint(silent, 0)
    for _ in range(TURN + 2):
        pair.ref.post(note(0))
        item = pair.inbox.poll()
        assert item is not None
        if item[1] == "silent":
            break
        assert pair.inbox.poll(look=False) is None
    else:
        pytest.fail("the lane without a hint was never looked at")
    silent.close()


def test_a_lane_that_breaks_while_it_is_watched_is_given_up(pair: Pair) -> None:
    told: list[str] = []
    pair.inbox.on_corrupt = lambda source, _: told.append(source)
    assert pair.ref._ring is not None
    os.eventfd_write(pair.ref._ring.fds.data, 12)
    hint(pair.ref._ring, 1)
    pair.inbox._spin.on = True
    pair.inbox.wait_in_thread(0)
    assert told == ["here"] and pair.inbox.poll() is None


@pytest.mark.parametrize("watching", [False, True])
def test_what_is_there_already_is_a_checkpoint_and_nothing_is_lost(pair: Pair, watching: bool) -> None:
    async def main() -> None:
        got: list[int] = []
        ran: list[int] = []

        async def other(number: int) -> None:
            ran.append(number)

        for number in range(3 * TURN):
            pair.inbox._spin.on = watching
            pair.ref.post(note(number))
            with trio.CancelScope() as scope:
                scope.cancel()
                await pair.inbox.wait()
            assert scope.cancelled_caught and readable(pair.inbox.fileno())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other, number)
                await pair.inbox.wait()
                await trio.lowlevel.checkpoint()
                assert ran[-1] == number, "other tasks have their turn"
            got += numbers(pair.inbox)
        assert got == [*range(3 * TURN)] and pair.inbox.statistics().caught == 3 * TURN

    trio.run(main)


class Recording(Spin):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int, int]] = []

    def slept(self, began_ns: int, sent_ns: int, received_ns: int) -> None:
        self.told.append((began_ns, sent_ns, received_ns))


def test_messages_of_the_same_node_tell_nothing_of_wakeups() -> None:
    left, right = contexts()
    connect(left, right)
    right.inbox.poll()
    right.inbox._spin = spin = Recording()
    right.inbox.wait_in_thread(0)
    left.ref("right").post(note(1))
    assert numbers(right.inbox) == [1] and not spin.told
    left.close()
    right.close()


def test_each_wait_that_slept_is_told_once(pair: Pair) -> None:
    pair.inbox._spin = spin = Recording()
    told = spin.told
    for count in range(1, 4):
        pair.inbox.wait_in_thread(0)
        pair.ref.post(note(1))
        pair.ref.post(note(2))
        assert numbers(pair.inbox) == [1, 2] and len(told) == count
        assert told[-1] == tuple(sorted(told[-1]))
    pair.ref.post(note(3))
    pair.inbox.wait_in_thread()
    assert numbers(pair.inbox) == [3] and len(told) == 3, "it did not sleep"
