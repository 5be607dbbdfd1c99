"""The ring's two forms: which one a machine gets, and what both refuse. Their work is tested through the lanes."""

import mmap
from collections.abc import Iterator
from typing import Any

import pytest
from rings import rings  # noqa: F401 (each test runs in all ways)

from actorserve.actors import ring
from actorserve.actors.lane import LaneCorrupt, LaneReceiver, LaneSender, create_lane
from actorserve.errors import StartupError
from actorserve.models import c_library

real_types = ring.types


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def find_compiler() -> str:
        raise StartupError("there is no C compiler")

    monkeypatch.setattr(c_library, "find_compiler", find_compiler)
    ring.native.cache_clear()
    yield
    ring.native.cache_clear()


def test_without_a_compiler_it_is_python(no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert ring.native() is None and real_types() is ring.PYTHON


def test_without_a_compiler_a_machine_that_reorders_needs_a_fence(
    no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "ppc64le")
    with pytest.raises(StartupError, match="ppc64le"):
        real_types()
    monkeypatch.setattr(ring, "_fence", lambda: None)
    assert real_types() is ring.PYTHON


def test_the_fence_comes_between_payload_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that reorders: each side calls it between the two accesses that must stay in order."""
    fds = create_lane(4096)
    memory = mmap.mmap(fds.memory, 0)
    heads: list[int] = []
    monkeypatch.setattr(ring, "_fence", lambda: heads.append(int.from_bytes(memory[ring.HEAD * 8 :][:8], "little")))
    writer = ring.Writer(memory, fds.data, LaneCorrupt)
    reader = ring.Reader(memory, fds.credit, lambda _, view: view, LaneCorrupt)
    assert writer.send(b"payload") and heads == [0]
    assert bytes(reader.next() or b"") == b"payload" and heads == [0, writer.position]
    for end in (writer, reader):
        end.close()
    memory.close()
    fds.close()


def test_an_end_that_is_closed_refuses() -> None:
    fds = create_lane(4096)
    sender, receiver = LaneSender(fds.dup()), LaneReceiver(fds)
    sender.close()
    receiver.close()
    with pytest.raises(ValueError, match=r"closed|released"):
        sender.send(b"x")
    with pytest.raises(ValueError, match=r"closed|released"):
        receiver.next()


def test_the_waits_of_messages_are_counted() -> None:
    fds = create_lane(4096)
    sender, receiver = LaneSender(fds.dup()), LaneReceiver(fds)
    for _ in range(3):
        assert sender.try_send(b"x")
    sent_ns: list[int] = []
    while receiver.next() is not None:
        sent_ns.append(receiver.reader.received_ns - receiver.reader.sent_ns)
    wait_ns, histogram = receiver.reader.waits()
    assert wait_ns == sum(sent_ns) and sum(histogram) == 3 and len(histogram) == ring.BUCKETS
    assert all(histogram[waited.bit_length()] for waited in sent_ns)
    sender.close()
    receiver.close()


@pytest.mark.parametrize("size", [0, 100, ring.HEADER, ring.HEADER + 4095, ring.HEADER + 6000])
def test_the_c_form_takes_the_memory_of_lanes_only(size: int) -> None:
    made: Any = ring.native()
    if made is None:
        pytest.skip("there is no C compiler here, or no headers of Python")
    with pytest.raises((ValueError, TypeError)):
        made.Writer(bytearray(size), 0, LaneCorrupt)
