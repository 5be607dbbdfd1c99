"""Work lets others go first and gives way when it takes long; the next begins with the same priority again."""

import os
import threading
import time

import pytest

from actorserve.actors import courtesy
from actorserve.actors.courtesy import Courteous, politely

pytestmark = pytest.mark.timeout(60)


def policy() -> int:
    """Of this thread."""
    return os.sched_getscheduler(threading.get_native_id())


def niceness() -> int:
    """Of this thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def work_until_idle() -> int:
    """Keep a core busy until this thread gives way, 30 s at most."""
    end = time.monotonic() + 30
    while policy() != os.SCHED_IDLE and time.monotonic() < end:
        pass
    return policy()


def work_for(seconds: float) -> str:
    """Take so many seconds of a core."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return "made"


def yes(_: object) -> bool:
    return True


def no(_: object) -> bool:
    return False


def test_long_work_gives_way_and_short_work_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courtesy, "MOST", 0.05)
    own, worker = policy(), Courteous()
    assert worker.do(policy, no) == own != os.SCHED_IDLE
    assert worker.do(work_until_idle, no) == os.SCHED_IDLE
    assert worker.do(policy, no) == own, "the next begins as the first did"
    assert worker.do(niceness, no) == min(19, niceness() + courtesy.NICE)
    assert policy() == own, "who waits gives no way"


def test_what_was_wasted_is_won_back_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courtesy, "REFILL", 0.0)
    worker = Courteous()
    worker.do(lambda: work_for(0.1), no)
    assert worker.saved() == courtesy.MOST, "nothing was wasted"
    worker.do(lambda: work_for(0.1), yes)
    assert 0.0 < worker.saved() <= courtesy.MOST - 0.1
    worker.do(lambda: work_for(0.6), yes)
    assert worker.saved() == 0.0
    monkeypatch.setattr(courtesy, "REFILL", 1e6)
    time.sleep(0.001)
    assert worker.saved() == courtesy.MOST


def test_after_much_was_wasted_work_gives_way_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courtesy, "REFILL", 0.0)
    worker = Courteous()
    worker.do(lambda: work_for(0.6), yes)

    def took() -> float:
        before = time.thread_time()
        work_until_idle()
        return time.thread_time() - before

    assert worker.do(took, no) < courtesy.MOST


def test_who_has_work_done_politely_is_no_nicer() -> None:
    own = niceness()
    assert politely(niceness) == min(19, own + courtesy.NICE)
    assert niceness() == own


def test_what_work_raises_comes_back() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        politely(fail)
    with pytest.raises(ValueError, match="wrong"):
        Courteous().do(fail, no)


def test_where_priorities_may_not_change_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    monkeypatch.setattr(os, "nice", refuse)
    monkeypatch.setattr(courtesy, "MOST", 0.01)
    assert Courteous().do(lambda: work_for(0.1) or "made", no) == "made"
