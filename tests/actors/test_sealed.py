"""Connections between machines: who is let in, what a changed byte does, and what the scheduler is told of deaths."""

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.lowlevel
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from actorserve.actors import gate
from actorserve.actors.actor import BURST, Context, connect
from actorserve.actors.bridge import Handed, take_over
from actorserve.actors.clocks import Clocks
from actorserve.actors.gate import Gate
from actorserve.actors.lane import MAX_MESSAGE, LaneReceiver, LaneSender, create_lane
from actorserve.actors.link import StandIn
from actorserve.actors.machines import facts_of
from actorserve.actors.messages import (
    Discard,
    Done,
    Fence,
    PeerDown,
    PeerUp,
    Submit,
    SystemMessage,
    Timelines,
    TimelineView,
    WindowView,
)
from actorserve.actors.node_messages import CONTROL, VERSION, Beat, Join, Refusal, Welcome, decode, encode
from actorserve.actors.relay import HIGH, LATE, Relay
from actorserve.actors.sealed import (
    MAGIC,
    MAX_RECORD,
    Frame,
    Keys,
    LinkLost,
    Opener,
    SealedSocket,
    Sealer,
    prove_as_head,
    prove_as_member,
)
from actorserve.actors.topology import MEETING_POINT
from actorserve.config import EngineConfig, ModelInfo
from actorserve.sampler.params import SamplingParams

KEY = b"k" * 32
FRAMES = st.lists(
    st.builds(Frame, st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=3000)), min_size=1, max_size=6
)


def plain(frames: list[Frame]) -> bytes:
    return b"".join(struct.pack("<BII", kind, epoch, len(data)) + data for kind, epoch, data in frames)


# ------------------------------------------------------------------ records


@given(FRAMES, st.lists(st.integers(1, 4000)), st.lists(st.integers(1, 4000)))
def test_frames_survive_any_cut(frames: list[Frame], records: list[int], reads: list[int]) -> None:
    """Into records, and into reads."""
    sealer, opener = Sealer(KEY), Opener(KEY)
    sealed = b"".join(sealer.seal(part) for part in parts(plain(frames), records))
    assert [frame for part in parts(sealed, reads) for frame in opener.feed(part)] == frames


def parts(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    for size in sizes:
        if data[:size]:
            yield data[:size]
        data = data[size:]
    if data:
        yield data


@given(FRAMES, st.data())
def test_a_changed_byte_is_found(frames: list[Frame], data: st.DataObject) -> None:
    """Or a lost, repeated or foreign record; what came before it is whole."""
    sealer = Sealer(KEY)
    records = [sealer.seal(plain([frame])) for frame in frames]
    number = data.draw(st.integers(0, len(records) - 1))
    match data.draw(st.sampled_from(["flip", "drop", "repeat", "foreign"])):
        case "flip":
            place = data.draw(st.integers(0, len(records[number]) - 1))
            bad = bytearray(records[number])
            bad[place] ^= 1 << data.draw(st.integers(0, 7))
            records[number] = bytes(bad)
        case "drop":
            records[number : number + 1] = []
            records.append(Sealer(KEY).seal(b"x" * 9))  # or it would only be shorter
        case "repeat":
            records.insert(number, records[number])
        case "foreign":
            records[number] = Sealer(b"l" * 32).seal(plain([frames[number]]))
    records.append(bytes(20 + MAX_RECORD))  # a longer length would wait for its bytes
    opener, got = Opener(KEY), []
    with pytest.raises(LinkLost):
        for record in records:
            got += opener.feed(record)
    assert got == frames[: len(got)] and len(got) <= number + 1


@given(st.binary(max_size=200))
def test_garbage_is_no_record(garbage: bytes) -> None:
    opener = Opener(KEY)
    try:
        assert list(opener.feed(garbage)) == []
    except LinkLost:
        return
    assert len(garbage) < 20 or struct.unpack_from("<I", garbage)[0] <= MAX_RECORD


@pytest.mark.parametrize("size", [0, MAX_RECORD + 1, 2**32 - 1])
def test_a_record_of_no_size_is_refused_at_its_head(size: int) -> None:
    with pytest.raises(LinkLost, match=f"a record of {size} bytes"):
        Opener(KEY).feed(struct.pack("<I16s", size, b""))


def test_a_message_that_no_lane_takes_is_refused() -> None:
    with pytest.raises(LinkLost, match=f"a message of {MAX_MESSAGE + 1} bytes"):
        Opener(KEY).feed(Sealer(KEY).seal(struct.pack("<BII", 1, 0, MAX_MESSAGE + 1)))


def test_large_messages_and_a_reader_that_lags() -> None:
    """What the kernel does not take is kept, and comes out whole."""
    ends = socket.socketpair()
    one, other = (SealedSocket(sock, Keys(KEY, KEY)) for sock in ends)
    sent = [Frame(i, i, os.urandom(300_000 * i)) for i in range(4)]
    for frame in sent:
        one.put(*frame)
    one.flush()
    assert one.backlog > 0
    got: list[Frame] = []
    while len(got) < len(sent):
        got += other.receive()
        one.flush()
    assert got == sent and one.backlog == 0
    one.close()
    with pytest.raises(LinkLost, match="closed"):
        other.receive()
    other.close()


# ------------------------------------------------------------------ who is there


async def meet(head: bytes, member: bytes) -> tuple[Any, Any]:
    """What both sides get: their keys, or an error."""
    one, other = trio.testing.memory_stream_pair()
    results: dict[str, Any] = {}

    async def side(name: str, prove: Callable[..., Any], stream: Any, key: bytes) -> None:
        try:
            results[name] = await prove(stream, key)
        except LinkLost as error:
            results[name] = error
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(side, "head", prove_as_head, one, head)
        nursery.start_soon(side, "member", prove_as_member, other, member)
    return results["head"], results["member"]


def test_both_must_have_the_key() -> None:
    first, again = (trio.run(meet, KEY, KEY) for _ in range(2))
    for head, member in (first, again):
        assert (head.sending, head.receiving) == (member.receiving, member.sending)
    assert len({*first[0], *again[0]}) == 4, "each connection and direction has its own"
    head, member = trio.run(meet, KEY, b"l" * 32)
    assert "another key" in str(head) and "refuses our --node-key-file" in str(member)


def test_a_head_without_the_key_learns_nothing_to_answer_with() -> None:
    """Nor one that sends the member's own proof back."""

    async def main() -> None:
        one, other = trio.testing.memory_stream_pair()

        async def mirror() -> None:
            await one.send_all(MAGIC + bytes(32))
            answer = await one.receive_some(72)
            await one.send_all(answer[-32:])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(mirror)
            with pytest.raises(LinkLost, match="another key"):
                await prove_as_member(other, KEY)

    trio.run(main)


# ------------------------------------------------------------------ the gate


@pytest.fixture
def model(tmp_path: Path) -> ModelInfo:
    (tmp_path / "config.json").write_text("{}")
    facts: dict[str, Any] = {"model_type": "llama", "vocab_size": 9, "context_length": 9, "eos_ids": (2,)}
    return ModelInfo(name="m", path=str(tmp_path), **facts)


class World:
    """A gate that listens, and the socket behind it that replica 1's bridge would have."""

    def __init__(self, model: ModelInfo, tmp: Path) -> None:
        (tmp / "key").write_bytes(KEY)
        self.config = EngineConfig(dp_size=2, nnodes=2, node_key_file=str(tmp / "key"))
        self.facts = facts_of(self.config, model)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sends, self.receives = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        files = {MEETING_POINT: self.listener.fileno(), "sched.1": self.sends.fileno()}
        self.context = Context("gate", self.config, model, SystemMessage, files=files)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            self.context.host({}, nursery)
            await Gate(self.context).start()
            yield
            nursery.cancel_scope.cancel()
        self.context.close()
        for sock in (self.listener, self.sends, self.receives):
            sock.close()

    async def join(self, message: Any, key: bytes = KEY) -> Any:
        """What a machine with this first message is told, be it that the connection is closed."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream:
            keys = await prove_as_member(stream, key)
            sock = SealedSocket(socket.socket(fileno=os.dup(stream.socket.fileno())), keys)
            sock.put(CONTROL, 0, message if isinstance(message, bytes) else encode(message))
            sock.flush()
            with trio.fail_after(60):
                await trio.lowlevel.wait_readable(sock.fileno())
            try:
                (frame,) = sock.receive()
            except LinkLost:
                return "closed"
            finally:
                sock.close()
            return decode(frame.payload)

    async def enter(self, message: Any) -> Handed:
        """How a machine with this first message is handed on."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.join, message)
            with trio.fail_after(60):
                await trio.lowlevel.wait_readable(self.receives.fileno())
            return self.handed()

    def handed(self) -> Handed:
        connection, handed = take_over(self.receives)
        connection.close()
        return handed


def test_the_gate_lets_in_who_is_the_same(model: ModelInfo, tmp_path: Path) -> None:
    world = World(model, tmp_path)

    async def main() -> None:
        async with world.open():
            right = Join(VERSION, 1, 1, world.facts)
            assert (await world.enter(right)).machine == 1
            refused = [
                (msgspec.structs.replace(right, version=9), "it speaks version 9"),
                (msgspec.structs.replace(right, facts=world.facts | {"--dtype": "float16"}),
                 "it differs in --dtype (float16, on node 0 auto)"),
                (msgspec.structs.replace(right, facts={}), "it differs in --nnodes (none, on node 0 2)"),
                (msgspec.structs.replace(right, replica=0), "node 0 has replica 0 itself"),
                (msgspec.structs.replace(right, replica=7), "node 0 has replica 7 itself, or there is none"),
                (msgspec.structs.replace(right, machine=0), "replica 1 is of node 1"),
            ]  # fmt: skip
            for message, text in refused:
                answer = await world.join(message)
                assert isinstance(answer, Refusal) and answer.final and answer.text.startswith(text), answer
            for message in (Beat(), Welcome(1), b"\xc1garbage"):
                assert await world.join(message) == "closed"
            with pytest.raises(LinkLost, match="refuses our --node-key-file"):
                await world.join(right, b"l" * 32)
            with pytest.raises(BlockingIOError):
                world.handed()
            # A bridge that takes none: who comes is told to try again.
            with pytest.raises(BlockingIOError):
                while True:
                    world.sends.send(b"", socket.MSG_DONTWAIT)
            answer = await world.join(right)
            assert isinstance(answer, Refusal) and not answer.final, answer

    trio.run(main)


def test_the_gate_waits_for_nobody(model: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More who say nothing than there are places; who says nothing for too long is sent away."""
    monkeypatch.setattr(gate, "PENDING", 8)
    world = World(model, tmp_path)

    async def main() -> None:
        async with world.open():
            monkeypatch.setattr(gate, "SECONDS", 0.3)
            slow = [await trio.open_tcp_stream("127.0.0.1", world.port) for _ in range(20)]
            with trio.fail_after(60):
                got = {slow[-1]: await slow[-1].receive_some()}
                monkeypatch.setattr(gate, "SECONDS", 60.0)  # for one who does say it, however slowly
                assert (await world.enter(Join(VERSION, 1, 1, world.facts))).machine == 1
                with contextlib.suppress(trio.BrokenResourceError):  # sent away already
                    await slow[-1].send_all(MAGIC)
                for stream in slow:
                    greeting = got.get(stream, b"")
                    with contextlib.suppress(trio.BrokenResourceError):  # it had not read what we said
                        while more := await stream.receive_some():
                            greeting += more
                    assert greeting[:8] == MAGIC and len(greeting) == 40
                    await stream.aclose()

    trio.run(main)


@pytest.mark.parametrize("size", [MAX_RECORD + 1, 2**32 - 1])
def test_the_gate_reads_no_large_record(
    model: ModelInfo, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even of one who has the key."""
    monkeypatch.setattr(gate, "SECONDS", 3600.0)
    world = World(model, tmp_path)

    async def main() -> None:
        async with world.open():
            stream = await trio.open_tcp_stream("127.0.0.1", world.port)
            async with stream:
                await prove_as_member(stream, KEY)
                await stream.send_all(struct.pack("<I16s", size, b""))
                with trio.fail_after(60):
                    assert await stream.receive_some() == b""

    trio.run(main)


# ------------------------------------------------------------------ lanes over a connection


class Middle(Relay):
    """Between text's lane and a connection."""

    def receive(self, message: Any, source: str) -> None:
        if isinstance(message, msgspec.Raw):
            self.pass_on(1, 0, message)

    def came(self, frame: Frame) -> None:
        self.hand(self.context.ref("text"), frame.payload)

    def told(self, message: Any) -> None:
        raise AssertionError(message)


class Ends:
    """A relay, its neighbour text, and the other end of its connection."""

    def __init__(self, seconds: float = 60) -> None:
        config = EngineConfig(node_timeout=seconds)
        facts: dict[str, Any] = {"model_type": "m", "vocab_size": 9, "context_length": 9, "eos_ids": ()}
        model = ModelInfo(name="m", path="/m", **facts)
        self.text = Context("text", config, model, Done, sends_to=["sched.1"])
        self.context = Context("sched.1", config, model, msgspec.Raw, sends_to=["text"])
        connect(self.text, self.context, codec=True)
        ours, theirs = socket.socketpair()
        self.relay = Middle(self.context)
        self.relay.line = SealedSocket(ours, Keys(KEY, KEY))
        self.relay.other = "node 7"
        self.there = SealedSocket(theirs, Keys(KEY, KEY))

    def close(self) -> None:
        assert self.relay.line is not None
        self.relay.line.close()
        self.there.close()
        self.text.close()
        self.context.close()


def test_a_slow_connection_is_waited_for() -> None:
    """With no more in between than a few messages; all of them come, in order."""
    ends = Ends()

    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ends.relay.run)
                texts = [f"{i:05}" * 8000 for i in range(4 * BURST)]
                for text in texts:
                    ends.text.ref("sched.1").post(Done(1, text))
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert ends.relay.line is not None
                assert HIGH / 2 < ends.relay.line.backlog < HIGH + (BURST + 1) * 41_000 < 4 * BURST * 40_000 / 2
                got: list[Frame] = []
                while len(got) < len(texts):
                    await trio.lowlevel.wait_readable(ends.there.fileno())
                    got += [frame for frame in ends.there.receive() if frame.kind != CONTROL]
                assert [msgspec.msgpack.decode(frame.payload, type=Done).text for frame in got] == texts
                nursery.cancel_scope.cancel()

    trio.run(main)
    ends.close()


def test_a_slow_lane_is_waited_for() -> None:
    ends = Ends()
    lane = create_lane(4096)
    ends.context.ref("text").connect(LaneSender(lane.dup()), 1)
    reader = LaneReceiver(lane)

    async def main() -> None:
        count, got = 20_000, []
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ends.relay.run)
                for number in range(count):
                    ends.there.put(1, 0, encode(Done(number, "x" * 100)))
                for _ in range(20):
                    ends.there.flush()
                    await trio.sleep(0.01)
                assert ends.context.ref("text").backlog < LATE + 256 * 1024 / 100
                assert ends.there.backlog > 0
                while len(got) < count:
                    reader.refresh()
                    while (message := reader.next()) is not None:
                        got.append(msgspec.msgpack.decode(message, type=Done).rid)
                    ends.there.flush()
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert got == list(range(count))

    trio.run(main)
    reader.close()
    ends.close()


@pytest.mark.parametrize("end", ["silence", "closed", "garbage", "beats"])
def test_how_a_connection_ends(end: str) -> None:
    """Who says nothing is lost; whoever beats is not."""
    ends = Ends(0.2)

    async def main() -> bool:
        lost = False
        try:
            with trio.move_on_after(1.0 if end == "beats" else 60.0):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ends.relay.run)
                    if end == "closed":
                        ends.there.close()
                    while end in ("beats", "garbage"):
                        ends.there.put(CONTROL, 0, encode(Beat()) if end == "beats" else b"\xc1")
                        ends.there.flush()
                        await trio.sleep(0.05)
        except* LinkLost:
            lost = True
        return lost

    assert trio.run(main) == (end != "beats")
    ends.close()


# ------------------------------------------------------------------ what the scheduler is told


class FakeRef:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def post(self, message: Any) -> None:
        self.got.append(message)


def raw(message: Any) -> msgspec.Raw:
    return msgspec.Raw(encode(message))


def test_what_was_said_to_the_dead_is_dropped() -> None:
    ref = FakeRef()
    fsm = StandIn(ref, "fsm")  # type: ignore[arg-type]
    fsm.up(3)  # before there is a scheduler
    fsm.scheduler_up()
    assert ref.got == [Fence(1)]
    assert not fsm.passes(raw(Discard(1))), "it speaks to whom it was told of first, who is nobody"
    assert not fsm.passes(raw(Fence(1)))
    assert ref.got[1:] == [PeerUp("fsm", 3)]
    assert fsm.passes(raw(Discard(1))) and fsm.told == 3
    assert fsm.passes(raw(Fence(1))), "only the one that is waited for"
    down = PeerDown("fsm", 3, "killed", at_work=(7,))
    fsm.down(down)
    fsm.up(4)
    assert ref.got[2:] == [down, Fence(2)]
    assert not fsm.passes(raw(Discard(1)))
    fsm.down(PeerDown("fsm", 4, "killed"))  # again, before the scheduler knew that it was back
    fsm.up(5)
    assert not fsm.passes(raw(Fence(2)))
    assert ref.got[4:] == [PeerUp("fsm", 5)]
    assert fsm.passes(raw(Discard(2))) and fsm.told == 5


def test_times_of_one_machine_are_told_as_the_other_s() -> None:
    clocks = Clocks()
    clocks.heard(1000, 51_050, 1100)
    assert clocks.ahead_ns == 50_000
    submit = Submit(1, memoryview(b"abcd"), SamplingParams(max_new_tokens=1, seed=1), arrival_ns=60_000)
    here = msgspec.msgpack.decode(clocks.from_head(encode(submit)), type=Submit)
    assert (here.arrival_ns, here.tokenized_ns, bytes(here.ids)) == (10_000, 0, b"abcd")
    view = TimelineView(1, 10_000, 0, 11_000, 0, 0, 0, 0, 0, 3, 0, 0, 0, [WindowView(1, 2, 3, 4, 12_000, 0)])
    told = msgspec.msgpack.decode(bytes(clocks.to_head(memoryview(encode(Timelines(1, [view]))))), type=Timelines)
    (there,) = told.timelines
    assert (there.arrival_ns, there.tokenized_ns, there.queued_ns) == (60_000, 0, 61_000)
    assert there.windows == [WindowView(1, 2, 3, 4, 62_000, 0)] and there.prompt_tokens == 3
    other = encode(Discard(1))
    assert clocks.from_head(other) is other
