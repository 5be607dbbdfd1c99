"""What a message between two processes costs: our lanes against pyzmq + pickle, multiprocessing and a unix socket.

    python -m actorserve.perf.lanes [--rounds 5] [--cores own shared] [--json FILE]

Two processes, on a core each ("own", as actors are on a server) or both on one ("shared"); left to itself the kernel
moves between the two in the middle of a run. Like is compared with like: a receiver that blocks in a plain thread, one
that serves four peers (a bare socket serves one only, an inbox any number), and one in a trio loop, as actors are. Per
size: one way to a receiver that sleeps and to one that polls (medians over messages sent 1 ms apart), the round trip,
a stream without pauses, and the CPU time of both processes per message, in the round trips (every message finds the
other side waiting) and in the stream. Rounds go over all transports in turn, so that a noisy neighbour hits all of
them; medians over rounds are shown, and in brackets how many times better the lane used in the same way is. The
comparators are treated kindly: pickle gets a tuple of an int and bytes, zmq no asyncio, sockets a buffer that fits.
"""

import argparse
import json
import math
import multiprocessing
import os
import pickle
import queue
import select
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import trio
import zmq

from ..actors.inbox import Inbox
from ..actors.lane import LaneReceiver, LaneSender, create_lane
from ..actors.ref import Ref

SIZES = {100: 4000, 1024: 4000, 65536: 800}
"""Payload bytes -> messages in the stream."""
LARGEST = 65536 + 4096
"""Bytes that a comparator's buffer takes: the largest message fits, and malloc does not need to map memory for it."""
ROUND_TRIPS = 1000
PACED = 100
WARM_UP = 30


class Batch(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """The message of lanes and of the unix socket."""

    stamp: int
    ids: memoryview


class Channel(Protocol):
    """One side of a transport, made in the process that uses it."""

    def send(self, stamp: int, payload: bytes | memoryview) -> None:
        """Waits when there is no room."""

    def receive(self) -> tuple[int, bytes | memoryview]:
        """Waits."""

    def poll(self) -> tuple[int, bytes | memoryview] | None:
        """Does not wait."""


Open = Callable[[int], Channel]
"""Makes the channel of side 0 (ours) or 1 (the forked child's)."""


class LaneChannel:
    """Ref and Inbox."""

    def __init__(self, out: Any, into: Any) -> None:
        self.inbox = Inbox(Batch)
        self.inbox.add_ring("peer", LaneReceiver(into.dup()))
        self.ref = Ref("peer", self.inbox)
        self.ref.connect(LaneSender(out.dup()), 1)
        self.room = select.poll()
        self.room.register(out.credit, select.POLLIN)

    def send(self, stamp: int, payload: bytes | memoryview) -> None:
        message = Batch(stamp, memoryview(payload))
        while not self.ref.try_send(message):
            self.room.poll()

    def receive(self) -> tuple[int, bytes | memoryview]:
        while (item := self.inbox.poll(look=False)) is None:
            self.inbox.wait_in_thread()
        return item[0].stamp, item[0].ids

    def poll(self) -> tuple[int, bytes | memoryview] | None:
        item = self.inbox.poll()
        return item and (item[0].stamp, item[0].ids)

    async def receive_on_trio(self) -> AsyncIterator[tuple[int, memoryview]]:
        while True:
            await self.inbox.wait()
            item = self.inbox.poll()
            while item is not None:
                yield item[0].stamp, item[0].ids
                item = self.inbox.poll(look=False)


class LanesChannel(LaneChannel):
    """The same among three other peers, which are silent."""

    def __init__(self, out: Any, into: Any) -> None:
        super().__init__(out, into)
        for number in range(3):
            self.inbox.add_ring(f"silent {number}", LaneReceiver(create_lane()))


class ZmqChannel:
    """A PAIR socket over ipc://, with pickle."""

    def __init__(self, address: str, side: int) -> None:
        self.socket = zmq.Context().socket(zmq.PAIR)
        if side:
            self.socket.connect(address)
        else:
            self.socket.bind(address)

    def send(self, stamp: int, payload: bytes | memoryview) -> None:
        self.socket.send(pickle.dumps((stamp, payload), 5))

    def receive(self) -> tuple[int, bytes | memoryview]:
        return pickle.loads(self.socket.recv())  # type: ignore[no-any-return]  # noqa: S301 (what we compare with)

    def poll(self) -> tuple[int, bytes | memoryview] | None:
        try:
            return pickle.loads(self.socket.recv(zmq.NOBLOCK))  # type: ignore[no-any-return]  # noqa: S301
        except zmq.Again:
            return None


class QueueChannel:
    """multiprocessing.Queue in each direction."""

    def __init__(self, out: Any, into: Any) -> None:
        self.out, self.into = out, into

    def send(self, stamp: int, payload: bytes | memoryview) -> None:
        self.out.put((stamp, payload))

    def receive(self) -> tuple[int, bytes | memoryview]:
        return self.into.get()  # type: ignore[no-any-return]

    def poll(self) -> tuple[int, bytes | memoryview] | None:
        try:
            return self.into.get_nowait()  # type: ignore[no-any-return]
        except queue.Empty:
            return None


class PipeChannel:
    """multiprocessing.Pipe."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def send(self, stamp: int, payload: bytes | memoryview) -> None:
        self.connection.send((stamp, payload))

    def receive(self) -> tuple[int, bytes | memoryview]:
        return self.connection.recv()  # type: ignore[no-any-return]

    def poll(self) -> tuple[int, bytes | memoryview] | None:
        return self.connection.recv() if self.connection.poll() else None


class SocketChannel:
    """A SOCK_SEQPACKET pair with msgspec."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.decode = msgspec.msgpack.Decoder(Batch).decode

    def send(self, stamp: int, payload: bytes | memoryview) -> None:
        self.socket.send(msgspec.msgpack.encode(Batch(stamp, memoryview(payload))))

    def receive(self) -> tuple[int, bytes | memoryview]:
        message = self.decode(self.socket.recv(LARGEST))
        return message.stamp, message.ids

    def poll(self) -> tuple[int, bytes | memoryview] | None:
        try:
            message = self.decode(self.socket.recv(LARGEST, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return None
        return message.stamp, message.ids

    async def receive_on_trio(self) -> AsyncIterator[tuple[int, memoryview]]:
        sock = trio.socket.from_stdlib_socket(self.socket.dup())
        while True:
            message = self.decode(await sock.recv(LARGEST))
            yield message.stamp, message.ids


class SocketInboxChannel(SocketChannel):
    """The same among three other peers, which are silent: an inbox of sockets."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.others = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        self.peers = {one.fileno(): one for one in [sock, *(pair[0] for pair in self.others)]}
        self.epoll = select.epoll()
        for descriptor in self.peers:
            self.epoll.register(descriptor, select.EPOLLIN)

    def receive(self) -> tuple[int, bytes | memoryview]:
        return self.take(-1) or self.receive()

    def poll(self) -> tuple[int, bytes | memoryview] | None:
        return self.take(0)

    def take(self, timeout: float) -> tuple[int, bytes | memoryview] | None:
        for descriptor, _ in self.epoll.poll(timeout, 1):
            message = self.decode(self.peers[descriptor].recv(LARGEST, socket.MSG_DONTWAIT))
            return message.stamp, message.ids
        return None


def open_lanes() -> Open:
    """Two fresh lanes of the usual size."""
    lanes = create_lane(), create_lane()
    return lambda side: LaneChannel(lanes[side], lanes[1 - side])


def open_lanes_of_four() -> Open:
    """Two fresh lanes, received among others."""
    lanes = create_lane(), create_lane()
    return lambda side: LanesChannel(lanes[side], lanes[1 - side])


def open_zmq() -> Open:
    """A fresh address."""
    address = f"ipc://{tempfile.mkdtemp()}/socket"
    return lambda side: ZmqChannel(address, side)


def open_queues() -> Open:
    """Two queues of the default (spawn-safe) kind."""
    queues = multiprocessing.Queue(), multiprocessing.Queue()  # type: ignore[var-annotated]
    return lambda side: QueueChannel(queues[side], queues[1 - side])


def open_pipe() -> Open:
    """A duplex pipe."""
    ends = multiprocessing.Pipe()
    return lambda side: PipeChannel(ends[side])


def open_socket() -> Open:
    """A socket pair."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return lambda side: SocketChannel(ends[side])


def open_sockets() -> Open:
    """A socket pair, received among others."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return lambda side: SocketInboxChannel(ends[side])


def poll_until(channel: Channel) -> int:
    """Poll without pause; the time from sending to receiving."""
    while (received := channel.poll()) is None:
        continue
    return time.monotonic_ns() - received[0]


def serve(channel: Channel, streamed: int) -> dict[str, Any]:
    """The child: the same phases as `measure`, seen from the other side."""
    for _ in range(WARM_UP):
        channel.send(*channel.receive())
    cpu = time.process_time_ns()
    for _ in range(ROUND_TRIPS):
        channel.send(*channel.receive())
    cpu_trips = time.process_time_ns() - cpu
    waits = [-channel.receive()[0] + time.monotonic_ns() for _ in range(PACED)]
    polls = [poll_until(channel) for _ in range(PACED)]
    cpu = time.process_time_ns()
    for _ in range(streamed):
        channel.receive()
    channel.send(0, b"")
    return {"cpu_trips": cpu_trips, "cpu_stream": time.process_time_ns() - cpu, "waits": waits, "polls": polls}


def serve_on_trio(channel: Channel, streamed: int) -> dict[str, Any]:
    """The child as an actor is: in a trio loop that other tasks could use too."""
    assert isinstance(channel, LaneChannel | SocketChannel)
    receive = channel.receive_on_trio()
    waits: list[int] = []
    marks: list[int] = []

    async def main() -> dict[str, Any]:
        count = 0
        async for stamp, payload in receive:
            count += 1
            if count <= WARM_UP + ROUND_TRIPS:
                channel.send(stamp, payload)
            elif count <= WARM_UP + ROUND_TRIPS + PACED:
                waits.append(time.monotonic_ns() - stamp)
            if count in (WARM_UP, WARM_UP + ROUND_TRIPS, WARM_UP + ROUND_TRIPS + 2 * PACED):
                marks.append(time.process_time_ns())
            if count == WARM_UP + ROUND_TRIPS + 2 * PACED + streamed:
                break
        channel.send(0, b"")
        return {"cpu_trips": marks[1] - marks[0], "cpu_stream": time.process_time_ns() - marks[2], "waits": waits}

    return trio.run(main)


@dataclass(frozen=True)
class Transport:
    """A row of the table."""

    name: str
    open: Callable[[], Open]
    serve: Callable[[Channel, int], dict[str, Any]] = serve
    against: str = "lane"
    """The lane that is used in the same way: the ratios are to this one."""


TRIO, FOUR = "lane, receiver on trio", "lanes of 4 peers"
TRANSPORTS = (
    Transport("lane", open_lanes),
    Transport("unix seqpacket + msgspec", open_socket),
    Transport("multiprocessing.Pipe", open_pipe),
    Transport("multiprocessing.Queue", open_queues),
    Transport("pyzmq ipc + pickle", open_zmq),
    Transport(FOUR, open_lanes_of_four, against=FOUR),
    Transport("unix seqpackets of 4 peers + msgspec", open_sockets, against=FOUR),
    Transport(TRIO, open_lanes, serve_on_trio, TRIO),
    Transport("unix seqpacket + msgspec, receiver on trio", open_socket, serve_on_trio, TRIO),
)
MEASURES = {
    "one_way_us": "one way, asleep",
    "polled_us": "one way, polling",
    "round_trip_us": "round trip",
    "messages_per_s": "stream, msg/s",
    "cpu_trip_us": "CPU, each woken",
    "cpu_stream_us": "CPU in stream",
}


def measure(transport: Transport, size: int, shared: bool) -> dict[str, float]:
    """One round of one transport at one payload size; times in us per message."""
    streamed = SIZES[size]
    opened = transport.open()
    reading, writing = os.pipe()
    cores = sorted(os.sched_getaffinity(0))
    child = os.fork()
    os.sched_setaffinity(0, {cores[0] if child or shared else cores[-1]})
    if child == 0:
        try:
            found = transport.serve(opened(1), streamed)
            os.write(writing, json.dumps(found).encode())
            signal.pause()  # a queue's feeder thread may still have to send
        finally:
            os._exit(0)
    channel, payload = opened(0), os.urandom(size)
    for _ in range(WARM_UP):
        channel.send(0, payload)
        channel.receive()
    trips, cpu = [], time.process_time_ns()
    for _ in range(ROUND_TRIPS):
        start = time.monotonic_ns()
        channel.send(start, payload)
        channel.receive()
        trips.append(time.monotonic_ns() - start)
    cpu_trips = time.process_time_ns() - cpu
    for _ in range(2 * PACED):
        time.sleep(0.001)
        channel.send(time.monotonic_ns(), payload)
    time.sleep(0.005)
    cpu, start = time.process_time_ns(), time.monotonic_ns()
    for _ in range(streamed):
        channel.send(0, payload)
    channel.receive()
    elapsed, cpu_stream = time.monotonic_ns() - start, time.process_time_ns() - cpu
    theirs = json.loads(os.read(reading, 1 << 20))
    os.sched_setaffinity(0, cores)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for descriptor in (reading, writing):
        os.close(descriptor)
    return {
        "one_way_us": statistics.median(theirs["waits"]) / 1e3,
        "polled_us": statistics.median(theirs.get("polls", [math.nan])) / 1e3,
        "round_trip_us": statistics.median(trips) / 1e3,
        "messages_per_s": streamed / elapsed * 1e9,
        "cpu_trip_us": (cpu_trips + theirs["cpu_trips"]) / (2 * ROUND_TRIPS) / 1e3,
        "cpu_stream_us": (cpu_stream + theirs["cpu_stream"]) / streamed / 1e3,
    }


def run(rounds: int, shared: bool) -> dict[int, dict[str, dict[str, float]]]:
    """Medians over interleaved rounds: size -> transport -> measure."""
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for size in SIZES:
            for transport in TRANSPORTS:
                found.setdefault((size, transport.name), []).append(measure(transport, size, shared))
    return {
        size: {
            transport.name: {
                name: statistics.median(one[name] for one in found[size, transport.name]) for name in MEASURES
            }
            for transport in TRANSPORTS
        }
        for size in SIZES
    }


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown, with the lane's advantage in brackets."""
    lines = [f"| bytes | transport | {' | '.join(MEASURES.values())} |", "|--:|---" + "|--:" * len(MEASURES) + "|"]
    for size, rows in results.items():
        for transport in TRANSPORTS:
            name, cells = transport.name, []
            row, base = rows[name], rows[transport.against]
            for measure_name, value in row.items():
                rate = measure_name == "messages_per_s"
                ratio = base[measure_name] / value if rate else value / base[measure_name]
                shown = f"{value / 1e3:,.0f} k" if rate else f"{value:.1f} us"
                cells.append("" if math.isnan(value) else shown if row is base else f"{shown} ({ratio:.1f}x)")
            lines.append(f"| {size} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the medians there")
    parser.add_argument("--cores", nargs="+", choices=["own", "shared"], default=["own", "shared"])
    parser.add_argument("--realtime", action="store_true", help="SCHED_RR: on a busy machine (root)")
    arguments = parser.parse_args()
    if arguments.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    results: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for cores in arguments.cores:
        results[cores] = run(arguments.rounds, cores == "shared")
        where = "the same core" if cores == "shared" else "a core of its own"
        print(f"\nEach process on {where}:\n\n{table(results[cores])}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {"rounds": arguments.rounds, "python": sys.version.split()[0], "results": results}, file, indent=1
            )


if __name__ == "__main__":
    main()
