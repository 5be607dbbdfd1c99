"""The node's side against a supervisor played by the test: the protocol, attachments on three loops, failures."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import trio

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import demo_actors
from demo_actors import DemoInbox, Driver, Ping, Pong, Trouble, copied, demo_config

from actorserve.actors.attach import Attachment, Detached, drive
from actorserve.actors.control import (
    ActorBoot,
    Boot,
    ControlClosed,
    ControlMessage,
    ControlSocket,
    Down,
    DrainUntil,
    Failed,
    Hello,
    LaneEnd,
    Progress,
    Ready,
    Stop,
    Stopped,
    Wire,
    control_pair,
    node_decoder,
    supervisor_decoder,
)
from actorserve.actors.inbox import Inbox
from actorserve.actors.lane import LaneReceiver, LaneSender, create_lane
from actorserve.actors.messages import Drain, PeerDown, PeerUp
from actorserve.actors.node import NodeCore, innermost, run_node
from actorserve.actors.ref import Gone, Ref


class FakeSupervisor:
    """The supervisor's end of one node with the actor "middle", whose peer "driver" is the test itself."""

    def __init__(self, class_name: str = "Middle") -> None:
        self.control, self.theirs = control_pair()
        self.class_name = class_name
        self.inbox = Inbox(DemoInbox)
        self.ref = Ref("middle", self.inbox)

    def boot(self, files: dict[str, int] | None = None) -> None:
        actors = [ActorBoot("middle", f"demo_actors:{self.class_name}", ["driver", "leaf"])]
        files = files or {}
        self.control.send(
            Boot("middle", 3, actors, [], False, list(files), demo_config(), demo_actors.MODEL), list(files.values())
        )

    def wire(self, epoch: int) -> None:
        """The neighbour "driver" is up: fresh lanes in both directions."""
        there, back = create_lane(1 << 16, epoch), create_lane(1 << 16, epoch)
        ends = [LaneEnd("middle", "driver", False), LaneEnd("middle", "driver", True)]
        self.control.send(Wire(epoch, ends), [*there, *back])
        self.ref.connect(LaneSender(there), epoch)
        self.inbox.add_ring("middle", LaneReceiver(back))

    def heard(self) -> list[ControlMessage]:
        """All that the node said since, also if it closed its end."""
        found: list[ControlMessage] = []
        with contextlib.suppress(ControlClosed):
            while self.control.fileno() >= 0 and (item := self.control.receive(supervisor_decoder)) is not None:
                found.append(item[0])
        return found

    def close(self) -> None:
        self.ref.disconnect()
        self.inbox.close()
        self.control.close()


def test_control_socket_carries_descriptors_and_sees_the_end() -> None:
    control, theirs = control_pair()
    node = ControlSocket(theirs)
    reading, writing = os.pipe()
    control.send(Wire(1, []), [writing])
    os.close(writing)
    item = node.receive(node_decoder)
    assert item is not None and item[0] == Wire(1, [])
    os.write(item[1][0], b"through")
    assert os.read(reading, 10) == b"through" and not os.get_inheritable(item[1][0])
    assert node.receive(node_decoder) is None
    with pytest.raises(BlockingIOError):
        while True:
            control.send(Down(["a"], 1, "x" * 10_000))
    for descriptor in (reading, item[1][0]):
        os.close(descriptor)
    control.close()
    with pytest.raises(ControlClosed):
        while node.receive(node_decoder) is not None:
            continue
    with pytest.raises(ControlClosed):
        node.send(Ready())
    node.close()


def test_last_words_are_heard_from_a_node_that_left_mail_unread() -> None:
    """The kernel reports a reset first then, and only afterwards what the node had said."""
    control, theirs = control_pair()
    node = ControlSocket(theirs)
    control.send(DrainUntil(1))
    node.send(Failed("ValueError: x", "", None))
    node.close()
    assert control.receive(supervisor_decoder) == (Failed("ValueError: x", "", None), [])
    with pytest.raises(ControlClosed):
        control.receive(supervisor_decoder)
    control.close()


def test_garbage_on_the_control_socket_is_the_end() -> None:
    control, theirs = control_pair()
    theirs.send(b"\xc1garbage")
    with pytest.raises(ControlClosed):
        control.receive(supervisor_decoder)
    theirs.close()
    control.close()


def test_the_protocol_step_by_step() -> None:
    supervisor = FakeSupervisor()
    reading, writing = os.pipe()
    core = NodeCore(ControlSocket(supervisor.theirs))
    assert supervisor.heard() == [Hello(os.getpid())]
    supervisor.boot({"listen": reading})
    core.on_control_readable()
    core.build_from_classes()
    context, actor = core.contexts["middle"], core.actors["middle"]
    assert context.epoch == 3 and context.config == demo_config() and context.model == demo_actors.MODEL
    os.write(writing, b"hi")
    assert os.read(context.files["listen"], 9) == b"hi"
    context.report("weights", 0.5)
    core.ready()
    assert supervisor.heard() == [Progress("middle", "weights", 0.5), Ready()]
    with pytest.raises(Gone):
        context.ref("driver").post(Ping(1, memoryview(b"")))

    for epoch in (1, 2):
        supervisor.wire(epoch)
        supervisor.ref.post(Ping(1, memoryview(b"x")))
        core.on_control_readable()
        assert context.inbox.poll() == (PeerUp("driver", epoch), "supervisor")
        assert context.inbox.poll() == (Ping(1, memoryview(b"x")), "driver")
        context.ref("driver").post(Pong(1, memoryview(b"y"), []))
        assert supervisor.inbox.poll() == (Pong(1, memoryview(b"y"), []), "middle")
        supervisor.ref.post(Ping(2, memoryview(b"lost with the peer")))
        supervisor.control.send(Down(["driver", "other"], epoch, "killed"))
        core.on_control_readable()
        assert context.inbox.poll() == (PeerDown("driver", epoch, "killed"), "supervisor")
        assert context.inbox.poll() is None and not context.ref("driver").up

    supervisor.control.send(DrainUntil(77))
    supervisor.control.send(Stop(0.5))
    stops: list[int] = []
    core.on_stop = lambda: stops.append(1)
    core.on_control_readable()
    assert context.inbox.poll() == (Drain(77), "supervisor") and stops == [1]
    core.stopped()
    assert supervisor.heard() == [Stopped()] and actor.context is context
    core.close()
    supervisor.close()
    for descriptor in (reading, writing):
        os.close(descriptor)


def host(class_name: str, play: Callable[[FakeSupervisor], Any]) -> tuple[list[ControlMessage], BaseException | None]:
    """Host a node on trio, `play` the supervisor once it is ready; what the node said, and its innermost exception."""
    supervisor, said = FakeSupervisor(class_name), []

    async def direct() -> None:
        supervisor.boot()
        while Ready() not in said:
            await trio.lowlevel.wait_readable(supervisor.control.fileno())
            said.extend(supervisor.heard())
        await play(supervisor)

    async def main() -> BaseException | None:
        error = None
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(direct)
                try:
                    await run_node(ControlSocket(supervisor.theirs))
                except Exception as raised:
                    error = innermost(raised)
                nursery.cancel_scope.cancel()
        return error

    error = trio.run(main)
    said.extend(supervisor.heard())
    supervisor.close()
    return said, error


async def wait_for_the_end(supervisor: FakeSupervisor) -> None:
    await trio.sleep_forever()


def test_hosted_on_trio_until_stop() -> None:
    async def play(supervisor: FakeSupervisor) -> None:
        supervisor.wire(1)
        supervisor.ref.post(Ping(7, memoryview(b"abc")))
        await supervisor.inbox.wait()
        item = supervisor.inbox.poll()
        assert item is not None and item[0].number == 7
        supervisor.control.send(Stop(1.0))

    said, error = host("Echo", play)
    assert said[-2:] == [Ready(), Stopped()] and error is None


def test_a_failure_in_a_handler_is_told_with_its_innermost_exception() -> None:
    async def play(supervisor: FakeSupervisor) -> None:
        supervisor.wire(1)
        supervisor.ref.post(Trouble("raise"))

    said, error = host("Echo", play)
    failed = said[-1]
    assert isinstance(failed, Failed) and failed.summary == "ValueError: simulated fault"
    assert "in receive" in failed.traceback and failed.startup_message is None
    assert isinstance(error, ValueError)


def test_run_must_not_return() -> None:
    said, _ = host("Returning", wait_for_the_end)
    failed = said[-1]
    assert isinstance(failed, Failed) and "run() returned" in failed.summary


@pytest.mark.parametrize(
    ("class_name", "summary", "startup"),
    [
        ("Broken", "StartupError: model.safetensors is truncated", "model.safetensors is truncated"),
        ("Crashing", "RuntimeError: bug in start", None),
        ("Nowhere", "AttributeError", None),
    ],
)
def test_start_failures_say_whether_a_user_can_help(class_name: str, summary: str, startup: str | None) -> None:
    said, error = host(class_name, wait_for_the_end)
    failed = said[-1]
    assert isinstance(failed, Failed) and failed.summary.startswith(summary) and failed.startup_message == startup
    assert error is not None


def test_a_node_without_supervisor_ends() -> None:
    async def play(supervisor: FakeSupervisor) -> None:
        supervisor.control.close()

    _, error = host("Echo", play)
    assert isinstance(error, ControlClosed)


# ------------------------------------------------------------------ attachments


@pytest.mark.parametrize("backend", ["trio", "asyncio", "uvloop"])
def test_drive_serves_an_attachment_on_any_loop(backend: str) -> None:
    supervisor = FakeSupervisor()
    attachment = Attachment(supervisor.theirs, Driver, DemoInbox)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = attachment.actor
    attachment.on_inbox_readable()

    async def main() -> Driver:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                supervisor.boot()
                await group.start(drive, attachment)
                guest = attachment.actor
                assert isinstance(guest, Driver)
                assert supervisor.heard() == [Hello(os.getpid()), Ready()]
                supervisor.wire(1)
                for number in range(5):
                    supervisor.ref.post(Pong(number, memoryview(b"abc"), []))
                while len(guest.pongs) < 5:  # noqa: ASYNC110
                    await anyio.sleep(0.001)
                big = Ping(1, memoryview(bytes(500_000)))
                guest.context.ref("driver").post(big)
                while (item := supervisor.inbox.poll()) is None:
                    await anyio.wait_readable(supervisor.inbox.fileno())
                assert copied(item[0]) == big, "its backlog is flushed by the loop"
                supervisor.control.send(Stop(1.0))
        return guest

    guest = anyio.run(
        main,
        backend="trio" if backend == "trio" else "asyncio",
        backend_options={} if backend == "trio" else {"use_uvloop": backend == "uvloop"},
    )
    assert guest.log == [("up", "driver", 1), ("down", "driver", 1)] and guest.reasons == ["the engine stops"]
    assert supervisor.heard() == [Stopped()]
    supervisor.close()


def test_an_attachment_by_hand_sees_the_death_of_the_engine() -> None:
    supervisor = FakeSupervisor()
    attachment = Attachment(supervisor.theirs, Driver, DemoInbox)
    supervisor.boot()
    attachment.on_control_readable()
    supervisor.wire(1)
    supervisor.close()
    with pytest.raises(Detached, match="gone"):
        attachment.on_control_readable()
    attachment.on_inbox_readable()
    assert isinstance(attachment.actor, Driver)
    assert attachment.actor.log == [("up", "driver", 1), ("down", "driver", 1)]
    attachment.close()


def test_attaching_to_nobody_says_so() -> None:
    control, theirs = control_pair()
    control.close()
    with pytest.raises(Detached):
        Attachment(theirs, Driver, DemoInbox)
