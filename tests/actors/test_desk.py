"""What an actor notes of its work is there when it has died, and two deaths of one request are enough."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from actorserve.actors.desk import NOBODY, Desk, Suspects, make_page, read_page
from actorserve.actors.messages import PeerDown


@pytest.fixture
def page():  # type: ignore[no-untyped-def]
    descriptor = make_page()
    yield descriptor
    os.close(descriptor)


VICTIM = """
import os, signal, sys
from actorserve.actors.desk import Desk
desk = Desk(int(sys.argv[1]))
desk.end(desk.begin(5))
desk.now(6)
desk.now(0)
desk.begin(1 << 62)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_notes_outlive_a_killed_process(page: int) -> None:
    done = subprocess.run([sys.executable, "-c", VICTIM, str(page)], pass_fds=[page])
    assert done.returncode == -signal.SIGKILL
    assert read_page(page) == [0, 1 << 62]


def test_threads_have_notes_of_their_own(page: int) -> None:
    """More than there is room for are not lost, only not noted."""
    desk, started, ended = Desk(page), threading.Barrier(101), threading.Barrier(101)

    def work(rid: int) -> None:
        note = desk.begin(rid)
        started.wait()
        ended.wait()
        desk.end(note)

    threads = [threading.Thread(target=work, args=(rid,)) for rid in range(100)]
    for thread in threads:
        thread.start()
    started.wait()
    desk.now(200)
    seen = read_page(page)
    assert len(seen) == 64 and seen[-1] == 200 and set(seen[:-1]) < set(range(100))
    ended.wait()
    for thread in threads:
        thread.join()
    desk.now(NOBODY)
    assert read_page(page) == []
    desk.close()
    desk.now(3)
    assert read_page(page) == []


def test_two_deaths_are_enough() -> None:
    suspects = Suspects()

    def died(*rids: int, fault: bool = True) -> list[int]:
        return suspects.guilty(PeerDown("text", 1, "x", fault, rids))

    assert died() == died(1, 2) == died(1, 3, fault=False) == []
    assert died(3, 1) == [1]
    assert died(2, 3) == [2, 3]
    assert died(1) == [], "its id is nobody's now"
