"""The link: on a machine with --node-rank above 0, the stand-in of the head's text and fsm actors, for one scheduler.

Two actors of one node, by the names of those that they stand for: Link, which has the connection, and LinkedFsm. A
life of theirs is one connection: with it the scheduler loses both, drops what it had of them, and waits. The head's
actors may also die while the connection stays, and the scheduler is told so (StandIn). Invariant: what the scheduler
said to one incarnation of a head's actor is never taken for said to the next.
"""

import contextlib
import os
import socket
import time
from typing import Any, ClassVar, Final

import msgspec
import trio

from ..errors import StartupError
from .actor import Actor, Context
from .clocks import Clocks
from .machines import address_of, facts_of, read_key
from .messages import Drain, Fence, PeerDown, PeerUp
from .node import innermost
from .node_messages import CONTROL, PEERS, VERSION, Control, Join, Refusal, Serving, Welcome, decode, encode
from .ref import Gone, Ref
from .relay import Relay
from .sealed import Frame, LinkLost, SealedSocket, prove_as_member
from .topology import replica_of, schedulers_among

PAUSE: Final = 1.0
"""Seconds between two tries to reach the head."""
_HANDSHAKE: Final = 10.0


class StandIn:
    """One of the head's actors, as the scheduler is told of it.

    Between its PeerDown and the next PeerUp a Fence goes to the scheduler and comes back: what comes before that was
    said to the one that died, or to none, and is dropped.
    """

    def __init__(self, ref: Ref, name: str) -> None:
        """`ref`: the scheduler, from the actor that stands for `name`."""
        self.name = name
        self.told = 0
        """The incarnation that the scheduler may speak to; 0: none."""
        self.ref = ref
        self._epoch = 0
        """The one that is up on the head; 0: none."""
        self._fences = 0
        self._expected = b""
        """The Fence that has not come back; before there is a scheduler none can."""
        self._open = False

    def scheduler_up(self) -> None:
        """It was told that we are up: it shall wait for whom we stand for."""
        self._fence()

    def up(self, epoch: int) -> None:
        """The head's actor is (again) up."""
        self._epoch = epoch
        self._tell()

    def down(self, m: PeerDown) -> None:
        """The head's actor died."""
        self._epoch = 0
        if self.told:
            self.told = 0
            self._post(m)
            self._fence()

    def passes(self, message: msgspec.Raw) -> bool:
        """Take a message of the scheduler; whether it is for the head's actor."""
        if self._expected and bytes(message) == self._expected:
            self._expected, self._open = b"", True
            self._tell()
            return False
        return self.told > 0

    def _fence(self) -> None:
        self._open = False
        self._fences += 1
        fence = Fence(self._fences)
        self._expected = encode(fence)
        self._post(fence)

    def _tell(self) -> None:
        if self._open and self._epoch and not self.told:
            self.told = self._epoch
            self._post(PeerUp(self.name, self._epoch))

    def _post(self, message: Fence | PeerUp | PeerDown) -> None:
        try:
            self.ref.post(message)
        except Gone:
            return  # its PeerDown ends us


class Link(Relay):
    """Stands for text, and has the connection."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        (name,) = schedulers_among(context.peers())
        self.other = "node 0"
        self.scheduler = context.ref(name)
        self.clocks = Clocks()
        self.stand_ins = {"text": StandIn(self.scheduler, "text")}
        self._key = read_key(context.config)
        self._said = ""

    async def start(self) -> None:
        """Connect, however long it takes. Raises StartupError where the head refuses us for good."""
        with contextlib.suppress(KeyError):  # without a tokenizer there is none
            fsm = self.context.local("fsm")
            assert isinstance(fsm, LinkedFsm)
            fsm.link = self
            self.stand_ins["fsm"] = fsm.stand_in
            self.refs.append(fsm.stand_in.ref)
        while self.line is None:
            try:
                with trio.fail_after(_HANDSHAKE + self.context.config.node_timeout):
                    self.line = await self._connected()
            except (LinkLost, OSError, trio.TooSlowError, trio.BrokenResourceError) as error:
                self._say(_why(error))
                await trio.sleep(PAUSE)
        self.context.log.info("joined node 0 at %s", self.context.config.dist_init_addr)

    async def stop(self) -> None:
        """Say why we leave: what runs here goes on elsewhere."""
        if self.line is not None:
            self._leave(PeerDown(self.scheduler.name, self.context.epoch, "its machine was stopped", fault=False))

    def receive(self, message: Any, source: str) -> None:
        match message:
            case PeerUp():
                self.stand_ins["text"].scheduler_up()
                self.tell(Serving())
            case PeerDown():
                self._leave(message)
                raise LinkLost(f"{message.name} is down: {message.reason}")
            case Drain():
                pass  # the head's fronts send nothing new
            case _:
                self.forward("text", message)

    def forward(self, name: str, message: msgspec.Raw) -> None:
        """A message of the scheduler, for the head's actor of this name."""
        stand_in = self.stand_ins[name]
        if stand_in.passes(message):
            data = memoryview(message)
            self.pass_on(PEERS[name], stand_in.told, self.clocks.to_head(data) if name == "text" else data)

    def came(self, frame: Frame) -> None:
        if frame.kind not in (PEERS[name] for name in self.stand_ins):
            raise LinkLost("node 0 sent something of nobody")
        if frame.kind == PEERS["text"]:
            self.hand(self.scheduler, self.clocks.from_head(frame.payload))
        else:
            self.hand(self.stand_ins["fsm"].ref, frame.payload)

    def told(self, message: Control) -> None:
        match message:
            case PeerUp(name=name, epoch=epoch) if name in self.stand_ins:
                self.stand_ins[name].up(epoch)
            case PeerDown(name=name) if name in self.stand_ins:
                self.stand_ins[name].down(message)
            case _:
                raise LinkLost("node 0 sent what only other machines may")

    # ------------------------------------------------------------------ the connection

    async def _connected(self) -> SealedSocket:
        """Raises LinkLost, OSError; StartupError."""
        config = self.context.config
        host, port = address_of(config)
        self.context.report(f"waiting for node 0 at {config.dist_init_addr}", 0.0)
        stream = await trio.open_tcp_stream(host, port)
        try:
            keys = await prove_as_member(stream, self._key)
            line = SealedSocket(socket.socket(fileno=os.dup(stream.socket.fileno())), keys)
        finally:
            await trio.aclose_forcefully(stream)
        try:
            facts = facts_of(config, self.context.model)
            join = Join(VERSION, config.node_rank, replica_of(self.scheduler.name), facts)
            asked = time.monotonic_ns()
            line.put(CONTROL, 0, encode(join))
            line.flush()
            await self._welcomed(line, asked)
        except BaseException:
            line.close()
            raise
        return line

    async def _welcomed(self, line: SealedSocket, asked_ns: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(line.fileno())
            for frame in line.receive():
                match decode(frame.payload) if frame.kind == CONTROL else None:
                    case Welcome(now_ns=now_ns):
                        self.clocks.heard(asked_ns, now_ns, time.monotonic_ns())
                        return
                    case Refusal(text=text, final=True):
                        raise StartupError(f"node 0 at {self.context.config.dist_init_addr} refuses this one: {text}")
                    case Refusal(text=text):
                        raise LinkLost(text)
                    case _:
                        raise LinkLost("it does not answer as node 0 would")

    def _leave(self, last: PeerDown) -> None:
        """Our last words: whoever hears them need not wait."""
        with contextlib.suppress(LinkLost):
            self.tell(last)

    def _say(self, text: str) -> None:
        """In the log, when it is news."""
        if text != self._said:
            self._said = text
            self.context.log.warning("node 0 at %s: %s", self.context.config.dist_init_addr, text)


class LinkedFsm(Actor):
    """Stands for fsm, over the connection of its node's Link."""

    inbox_type: ClassVar[Any] = msgspec.Raw

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        (name,) = schedulers_among(context.peers())
        self.stand_in = StandIn(context.ref(name), "fsm")
        self.link: Link | None = None

    def receive(self, message: Any, source: str) -> None:
        match message:
            case PeerUp():
                self.stand_in.scheduler_up()
            case PeerDown() | Drain():
                pass  # Link sees to it
            case _:
                assert self.link is not None, "it started before us"
                self.link.forward("fsm", message)

    def flush(self) -> None:
        """Send what waits."""
        if self.link is not None:
            self.link.flush()

    async def run(self) -> None:
        """Until the node ends."""
        while True:
            await self.context.inbox.wait()
            self.drain()
            assert self.link is not None, "it started before us"
            await self.link.room()


def _why(error: BaseException) -> str:
    """For people."""
    if isinstance(error, trio.TooSlowError):
        return "it does not answer"
    if isinstance(error, OSError) and error.__cause__ is not None:
        error = innermost(error.__cause__)  # of the addresses that were tried
    return f"{getattr(error, 'strerror', None) or error}"
