"""Actors for the runtime's tests: echo through two hops (driver -> middle -> leaf -> middle -> driver), and trouble.

Node processes import them by name: the tests put this folder on PYTHONPATH.
"""

import os
import time
from typing import Any, ClassVar, TypeAlias

import msgspec

from actorserve.actors.actor import Actor, Context
from actorserve.actors.messages import PeerDown, PeerUp, SystemMessage
from actorserve.actors.ref import Gone
from actorserve.actors.topology import ActorSpec, Kind, LaneSpec, NodeSpec, Topology
from actorserve.config import EngineConfig, ModelInfo
from actorserve.errors import StartupError

MODEL = ModelInfo(name="demo", path="/nowhere", model_type="llama", vocab_size=16, context_length=64, eos_ids=(0,))


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=100):
    number: int
    payload: memoryview


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=101):
    number: int
    payload: memoryview
    pids: list[int]
    peers_seen: int = 0


class Trouble(msgspec.Struct, frozen=True, array_like=True, tag=102):
    """raise, hang, return: what the leaf does next."""

    kind: str


class Stray(msgspec.Struct, frozen=True, array_like=True, tag=103):
    """In nobody's inbox."""


DemoInbox: TypeAlias = SystemMessage | Ping | Pong | Trouble


class Echo(Actor):
    """The leaf: answers, or misbehaves on request."""

    inbox_type: ClassVar[Any] = DemoInbox

    def receive(self, message: Any, source: str) -> None:
        match message:
            case Ping():
                self.context.ref(source).post(Pong(message.number, message.payload, [os.getpid()]))
            case Trouble("raise"):
                self.context.log.error("about to raise")
                self.context.desk.now(NOTED)
                raise ValueError("simulated fault")
            case Trouble("hang"):
                time.sleep(600)
            case Trouble("stray"):
                self.context.ref(source).post(Stray())


NOTED = 77
"""The request that Echo says to work on when it raises."""


class Returning(Echo):
    """Its run ends by itself."""

    async def run(self) -> None:
        return


class FileReader(Echo):
    """Answers with what it reads from its file."""

    def receive(self, message: Any, source: str) -> None:
        if isinstance(message, Ping):
            content = memoryview(os.read(self.context.files["listen"], 1))
            self.context.ref(source).post(Pong(message.number, content, [os.getpid()]))


class EchoOnAsyncio(Echo):
    """The same on uvloop."""

    loop = "asyncio"


class Middle(Actor):
    """Passes pings and trouble on to the leaf, and pongs back; a ping that finds the leaf down is dropped."""

    inbox_type: ClassVar[Any] = DemoInbox

    def receive(self, message: Any, source: str) -> None:
        match message:
            case Ping() | Trouble():
                try:
                    self.context.ref("leaf").post(copied(message))
                except Gone:
                    return
            case Pong():
                pids = [*message.pids, os.getpid()]
                self.context.ref("driver").post(Pong(message.number, bytes_view(message.payload), pids))


class Slow(Echo):
    """Reports progress, then starts."""

    async def start(self) -> None:
        for part in range(4):
            await self.context.progress("weights", (part + 1) / 4)


class Broken(Echo):
    """A model file that cannot be read."""

    async def start(self) -> None:
        raise StartupError("model.safetensors is truncated")


class Crashing(Echo):
    """A bug in start."""

    async def start(self) -> None:
        raise RuntimeError("bug in start")


class Silent(Echo):
    """Never gets ready."""

    async def start(self) -> None:
        time.sleep(600)  # noqa: ASYNC251


class Driver(Actor):
    """The test's end: keeps what it gets."""

    inbox_type: ClassVar[Any] = DemoInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.pongs: list[Pong] = []
        self.log: list[tuple[str, str, int]] = []
        self.reasons: list[str] = []
        self.blamed: list[tuple[bool, tuple[int, ...]]] = []
        """Of each death, whether it was a fault, and the requests that were at work."""
        drivers.append(self)

    def receive(self, message: Any, source: str) -> None:
        match message:
            case Pong():
                self.pongs.append(copied(message))
            case PeerUp(name, epoch):
                self.log.append(("up", name, epoch))
            case PeerDown(name, epoch, reason, fault, at_work):
                self.blamed.append((fault, at_work))
                self.log.append(("down", name, epoch))
                self.reasons.append(reason)

    def ping(self, number: int, size: int = 3) -> None:
        self.context.ref("middle").post(Ping(number, memoryview(bytes([number % 256]) * size)))


drivers: list[Driver] = []


def bytes_view(view: memoryview) -> memoryview:
    return memoryview(bytes(view))


def copied(message: Any) -> Any:
    """The message with arrays of its own."""
    if isinstance(message, Trouble):
        return message
    return msgspec.structs.replace(message, payload=bytes_view(message.payload))


def demo_config(**settings: Any) -> EngineConfig:
    return EngineConfig(log_level="error", **settings)


def demo_topology(leaf: str = "Echo", kind: Kind = "process", driver: Kind = "inline", **leaf_spec: Any) -> Topology:
    """driver <-> middle <-> leaf; `kind` is that of middle and leaf, `leaf` the leaf's class."""
    actors = {name: ActorSpec(name, f"demo_actors:{cls}") for name, cls in (("middle", "Middle"), ("leaf", leaf))}
    if kind == "inline":
        nodes: tuple[NodeSpec, ...] = (NodeSpec("both", (actors["leaf"], actors["middle"]), kind),)
    else:
        nodes = (NodeSpec("leaf", (actors["leaf"],), kind, **leaf_spec), NodeSpec("middle", (actors["middle"],), kind))
    lanes = [("driver", "middle"), ("middle", "driver"), ("middle", "leaf"), ("leaf", "middle")]
    return Topology(
        (*nodes, NodeSpec("driver", (ActorSpec("driver", "demo_actors:Driver"),), driver)),
        tuple(LaneSpec(source, target, 1 << 16) for source, target in lanes),
    )
