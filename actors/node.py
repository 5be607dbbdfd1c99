"""The node's side of supervision: it joins through a control socket, hosts actors, and leaves when told to.

`NodeCore` is the whole protocol, synchronous and non-blocking. Its drivers: `run_node` (trio: in a process or in the
supervisor's loop), `main` (the entry of a process, trio or uvloop), and attach.py (a guest on any loop). Invariant:
a lane to another node exists only between PeerUp and PeerDown of the peer, and both are queued in the inbox in the
very step in which the lane comes and goes.
"""

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import trio

from ..errors import StartupError
from .actor import Actor, Context, connect
from .control import (
    Boot,
    ControlClosed,
    ControlSocket,
    Corrupt,
    Down,
    DrainUntil,
    Failed,
    Hello,
    Ping,
    Pong,
    Progress,
    Ready,
    Stop,
    Stopped,
    Stuck,
    Wire,
    node_decoder,
)
from .desk import DESK, Desk
from .lane import LaneFds, LaneReceiver, LaneSender
from .messages import Drain, PeerDown, PeerUp

_LOST = 3  # exit code of a node whose supervisor is gone
_PR_SET_PDEATHSIG = 1


class NodeCore:
    """A node without a loop: call `on_control_readable`, and tell it how far the actors are."""

    def __init__(self, control: ControlSocket) -> None:
        self.control = control
        self.boot: Boot | None = None
        self.stop: Stop | None = None
        self.on_stop: Callable[[], None] = lambda: None
        """Called when `stop` is set."""
        self.contexts: dict[str, Context] = {}
        self.actors: dict[str, Actor] = {}
        self._files: dict[str, int] = {}
        self._desk = Desk()
        self._up: dict[tuple[str, str], int] = {}  # (actor, peer) -> the peer's epoch
        control.send(Hello(os.getpid()), patient=True)

    def on_control_readable(self) -> None:
        """Handle all that the supervisor said. Raises ControlClosed when it is gone."""
        while (item := self.control.receive(node_decoder)) is not None:
            message, fds = item
            match message:
                case Boot():
                    self._files = dict(zip(message.files, fds, strict=True))
                    self.boot = message
                case Wire():
                    self._wire(message, fds)
                case Down():
                    for actor, peer in [pair for pair in self._up if pair[1] in message.actors]:
                        self._peer_down(actor, peer, message.reason, message.fault, message.at_work)
                case DrainUntil():
                    for context in self.contexts.values():
                        context.inbox.put_system(Drain(message.deadline_ns))
                case Ping():
                    with contextlib.suppress(ControlClosed, BlockingIOError):  # then it knows more than we
                        self.control.send(Pong())
                case Stop():
                    self.stop = message
                    self.on_stop()

    def classes(self) -> dict[str, type[Actor]]:
        """After Boot: the actors' classes, imported."""
        assert self.boot is not None
        found = {}
        for actor in self.boot.actors:
            module, _, name = actor.class_path.partition(":")
            found[actor.name] = getattr(importlib.import_module(module), name)
        return found

    def build(self, make: Callable[[str, Context], Actor], inbox_type: Callable[[str], Any]) -> None:
        """After Boot: make the contexts and the actors; both arguments are asked by actor name."""
        boot = self.boot
        assert boot is not None
        self._desk = desk = Desk(self._files.get(DESK))
        for spec in boot.actors:
            context = Context(
                spec.name,
                boot.config,
                boot.model,
                inbox_type(spec.name),
                sends_to=spec.sends_to,
                epoch=boot.epoch,
                files=self._files,
                desk=desk,
            )
            context.reporter = functools.partial(self._report, spec.name)
            context.accuser = functools.partial(self._accuse, spec.name)
            context.inbox.on_corrupt = functools.partial(self._corrupt, spec.name)
            for peer in context.peers():
                context.ref(peer).on_corrupt = context.inbox.on_corrupt
            self.contexts[spec.name] = context
            self.actors[spec.name] = make(spec.name, context)

    def build_from_classes(self, nursery: trio.Nursery | None = None) -> None:
        """`build` with the classes named in Boot."""
        classes = self.classes()
        self.build(lambda name, context: classes[name](context), lambda name: classes[name].inbox_type)
        for context in self.contexts.values():
            context.host(self.actors, nursery)

    def ready(self) -> None:
        """All actors started: connect those of this node, and ask for the lanes to the others."""
        assert self.boot is not None
        for source, target in self.boot.local_lanes:
            connect(self.contexts[source], self.contexts[target], codec=self.boot.codec)
        self.control.send(Ready(), patient=True)

    def failed(self, error: BaseException) -> None:
        """An actor raised."""
        leaf = innermost(error)
        text = "".join(traceback.format_exception(leaf))[-8000:]
        summary = f"{type(leaf).__name__}: {leaf}"[:2000]
        startup = str(leaf)[:2000] if isinstance(leaf, StartupError) else None
        with contextlib.suppress(ControlClosed, BlockingIOError):
            self.control.send(Failed(summary, text, startup), patient=True)

    def stopped(self) -> None:
        """The actors said goodbye."""
        with contextlib.suppress(ControlClosed, BlockingIOError):
            self.control.send(Stopped(), patient=True)

    def all_down(self, reason: str) -> None:
        """Every peer is gone, as if the supervisor had said so of each."""
        for actor, peer in list(self._up):
            self._peer_down(actor, peer, reason, fault=False, at_work=())

    def close(self) -> None:
        """Close the lanes, the files and the control socket."""
        for context in self.contexts.values():
            context.close()
        self._desk.close()
        for descriptor in self._files.values():
            with contextlib.suppress(OSError):  # the actor may have closed it
                os.close(descriptor)
        self.control.close()

    def _wire(self, message: Wire, fds: list[int]) -> None:
        for index, end in enumerate(message.ends):
            lane = LaneFds(*fds[3 * index : 3 * index + 3])
            context = self.contexts[end.actor]
            if end.sends:
                context.ref(end.peer).connect(LaneSender(lane), message.epoch)
            else:
                context.inbox.add_ring(end.peer, LaneReceiver(lane))
        for pair in dict.fromkeys((end.actor, end.peer) for end in message.ends):
            self._up[pair] = message.epoch
            self.contexts[pair[0]].inbox.put_system(PeerUp(pair[1], message.epoch))

    def _peer_down(self, actor: str, peer: str, reason: str, fault: bool, at_work: tuple[int, ...]) -> None:
        context, epoch = self.contexts[actor], self._up.pop((actor, peer))
        if peer in context.peers():
            context.ref(peer).disconnect()
        context.inbox.drop(peer)
        context.inbox.put_system(PeerDown(peer, epoch, reason, fault, at_work))

    def _report(self, actor: str, stage: str, fraction: float) -> None:
        with contextlib.suppress(ControlClosed, BlockingIOError):
            self.control.send(Progress(actor, stage, fraction))

    def _accuse(self, actor: str, peer: str, detail: str) -> None:
        with contextlib.suppress(ControlClosed, BlockingIOError):
            self.control.send(Stuck(actor, peer, detail))

    def _corrupt(self, actor: str, peer: str, detail: str) -> None:
        self.contexts[actor].log.error("broken lane with %s: %s", peer, detail)
        with contextlib.suppress(ControlClosed, BlockingIOError):
            self.control.send(Corrupt(actor, peer, detail[:2000]), patient=True)


def innermost(error: BaseException) -> BaseException:
    """The exception that explains a group: its first leaf that is not a cancellation."""
    while isinstance(error, BaseExceptionGroup):
        rest = [one for one in error.exceptions if not isinstance(innermost(one), trio.Cancelled)]
        error = (rest or error.exceptions)[0]
    return error


# ------------------------------------------------------------------ on trio


async def run_node(control: ControlSocket, on_ready: Callable[[], None] = lambda: None) -> None:
    """Host the node that `control` asks for in this trio loop, until Stop (returns) or an actor raises."""
    core = NodeCore(control)
    try:
        while core.boot is None:
            await trio.lowlevel.wait_readable(control.fileno())
            core.on_control_readable()
        await _host_on_trio(core, on_ready)
    finally:
        core.close()


async def _host_on_trio(core: NodeCore, on_ready: Callable[[], None]) -> None:
    stop = trio.Event()
    core.on_stop = stop.set
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, core)
            core.build_from_classes(nursery)
            for actor in core.actors.values():
                await actor.start()
            core.ready()
            on_ready()
            for actor in core.actors.values():
                nursery.start_soon(_run_forever, actor)
            await stop.wait()
            assert core.stop is not None
            with trio.move_on_after(core.stop.grace):
                for actor in reversed(core.actors.values()):
                    await actor.stop()
            core.stopped()
            nursery.cancel_scope.cancel()
    except BaseException as error:
        if not isinstance(innermost(error), trio.Cancelled | ControlClosed):
            core.failed(error)
        raise


async def _obey(core: NodeCore) -> None:
    while True:
        await trio.lowlevel.wait_readable(core.control.fileno())
        core.on_control_readable()


async def _run_forever(actor: Actor) -> None:
    await actor.run()
    raise RuntimeError(f"{actor.context.name}: run() returned before the engine stopped")


# ------------------------------------------------------------------ on asyncio


async def _host_on_asyncio(core: NodeCore, on_ready: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    core.on_stop = stop.set
    loop.add_reader(core.control.fileno(), _obey_or_exit, core)
    try:
        core.build_from_classes()
        for context in core.contexts.values():
            context.inbox.wait_readable = _asyncio_readable
        for actor in core.actors.values():
            await actor.start()
        core.ready()
        on_ready()
        stopping = asyncio.create_task(stop.wait())
        running = [asyncio.create_task(_run_forever(actor)) for actor in core.actors.values()]
        await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            if task.done():
                task.result()
        assert core.stop is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(core.stop.grace):
                for actor in reversed(core.actors.values()):
                    await actor.stop()
        core.stopped()
    except BaseException as error:
        core.failed(error)
        raise


async def _asyncio_readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)


def _obey_or_exit(core: NodeCore) -> None:
    try:
        core.on_control_readable()
    except ControlClosed:
        os._exit(_LOST)


# ------------------------------------------------------------------ in a process


def main() -> None:
    """Entry of a node's process: `python -c "...; main()" CONTROL_FD SUPERVISOR_PID`. Never returns.

    Exit code 0 after Stop, 1 after an exception (reported to the supervisor), 3 when the supervisor is gone.
    """
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # terminals and init systems signal everybody; we wait for Stop
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    code = 0
    try:
        _serve(NodeCore(ControlSocket(socket.socket(fileno=descriptor))))
    except ControlClosed:
        code = _LOST
    except BaseException as error:
        code = _LOST if isinstance(innermost(error), ControlClosed) else 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no finalizers: threads and device contexts of the actors may hang in them


def _serve(core: NodeCore) -> None:
    waiting = select.poll()
    waiting.register(core.control.fileno(), select.POLLIN)
    while core.boot is None:
        waiting.poll()
        core.on_control_readable()
    boot = core.boot
    configure_logging(boot.node, boot.config.log_level)
    try:
        loops = {actor.loop for actor in core.classes().values()}
        if len(loops) > 1:
            raise RuntimeError(f"actors of {boot.node} want different loops")
    except BaseException as error:
        core.failed(error)
        raise
    if "asyncio" in loops:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_host_on_asyncio(core, gc.freeze))
    else:
        trio.run(_host_on_trio, core, gc.freeze)


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the thread that spawned us ends, and leave if it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(_LOST)


def configure_logging(node: str, level: str) -> None:
    """Log to stderr, each line with the name of the actor, or of the node if it comes from elsewhere."""

    def name_actor(record: logging.LogRecord) -> bool:
        prefix, _, actor = record.name.partition(".")
        record.actor = actor if prefix == "actorserve" and actor else node
        return True

    handler = logging.StreamHandler()
    handler.addFilter(name_actor)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(actor)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
