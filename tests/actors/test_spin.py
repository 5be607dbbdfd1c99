"""The decision to watch before sleeping, told by invented times; and an inbox that looks, watches and sleeps."""

import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from rings import rings  # noqa: F401 (each test runs in all ways)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from test_inbox import Pair, collect, contexts, note, numbers, readable

from actorserve.actors.actor import connect
from actorserve.actors.inbox import TURN
from actorserve.actors.lane import LaneSender
from actorserve.actors.ring import ALWAYS, ASLEEP, AWAKE, BELL, HEAD
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


# ------------------------------------------------------------------ looking, watching, sleeping


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def word(ring: LaneSender, index: int) -> int:
    """A u64 of the header page."""
    return int.from_bytes(os.pread(ring.fds.memory, 8, index * 8), sys.byteorder)


def set_word(ring: LaneSender, index: int, value: int) -> None:
    os.pwrite(ring.fds.memory, value.to_bytes(8, sys.byteorder), index * 8)


def ring_of(pair: Pair) -> LaneSender:
    assert pair.ref._ring is not None
    return pair.ref._ring


def send_without_ring(pair: Pair, number: int) -> None:
    """As by a sender that is killed after it published and before it wakes us."""
    ring = ring_of(pair)
    bell = word(ring, BELL)
    set_word(ring, BELL, AWAKE)
    pair.ref.post(note(number))
    set_word(ring, BELL, bell)


def test_a_sender_that_dies_before_it_rings_is_heard_at_the_next_look(pair: Pair) -> None:
    for number in range(3 * TURN):
        send_without_ring(pair, number)
        pair.inbox._spin.on = True
        pair.inbox.wait_in_thread(0)
        assert numbers(pair.inbox) == [number]


def test_a_late_wakeup_for_a_message_that_was_taken_is_forgotten(pair: Pair) -> None:
    """The sender published, we looked and fell asleep again; only then does it ring, for a bell that it took along."""
    ring = ring_of(pair)
    for number in range(2 * TURN):
        send_without_ring(pair, 2 * number)
        assert numbers(pair.inbox) == [2 * number]
        if word(ring, BELL) == ASLEEP:
            set_word(ring, BELL, AWAKE)
        os.eventfd_write(ring.fds.data, 1)
        assert readable(pair.inbox.fileno())
        if number % 2:
            pair.inbox.wait_in_thread(0)
        assert pair.inbox.poll() is None and not readable(pair.inbox.fileno())
        pair.ref.post(note(2 * number + 1))
        assert readable(pair.inbox.fileno()), "it rings again"
        assert numbers(pair.inbox) == [2 * number + 1]


def test_under_trio_a_late_wakeup_does_not_keep_awake(pair: Pair) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, pair.inbox, 1)
            for _ in range(3):
                os.eventfd_write(ring_of(pair).fds.data, 1)
                await trio.testing.wait_all_tasks_blocked()
            pair.ref.post(note(1))

    trio.run(main)


def test_a_sender_rings_once_for_one_that_sleeps(pair: Pair, rings: tuple[str, str]) -> None:  # noqa: F811
    if rings != ("c", "c"):
        pytest.skip("without fences it always rings")
    ring = ring_of(pair)
    rung = os.dup(ring.fds.data)
    assert pair.inbox.poll() is None and word(ring, BELL) == ASLEEP
    for number in range(5):
        pair.ref.post(note(number))
        assert word(ring, BELL) == AWAKE
    assert os.eventfd_read(rung) == 1 and numbers(pair.inbox) == [*range(5)]
    assert word(ring, BELL) == ASLEEP, "the None of poll promises that the descriptor tells"
    pair.ref.post(note(1))
    assert pair.inbox.poll() and pair.inbox.poll(look=False) is None and word(ring, BELL) == AWAKE
    pair.inbox.listen()
    assert word(ring, BELL) == ASLEEP
    os.close(rung)


def test_a_ring_in_python_is_always_rung(pair: Pair, rings: tuple[str, str]) -> None:  # noqa: F811
    if rings[1] == "python":
        assert word(ring_of(pair), BELL) == ALWAYS
    for number in range(3):
        assert pair.inbox.poll() is None and not readable(pair.inbox.fileno())
        pair.ref.post(note(number))
        assert readable(pair.inbox.fileno()) and numbers(pair.inbox) == [number]


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


def test_a_lane_that_breaks_while_it_is_watched_is_given_up(pair: Pair) -> None:
    told: list[str] = []
    pair.inbox.on_corrupt = lambda source, _: told.append(source)
    set_word(ring_of(pair), HEAD, 12)
    pair.inbox._spin.on = True
    pair.inbox.wait_in_thread(0)
    assert pair.inbox.poll() is None and told == ["here"]


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


def test_a_signal_amid_the_sleep_is_no_error(pair: Pair) -> None:
    """Whatever its handler does to errno."""

    def handler(*_: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.stat("/nowhere")
        pair.ref.post(note(1))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        while not (found := numbers(pair.inbox)):
            pair.inbox.wait_in_thread()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert found == [1]


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
