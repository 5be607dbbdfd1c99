"""The bridge: on the head (--node-rank 0), the stand-in of a scheduler that is on another machine.

Its node bears the scheduler's name, so text and fsm, and the supervisor, cannot tell it from one. It is up while the
other machine's link (link.py) is connected and its scheduler up, and dies with either. The connection comes from the
gate, which has checked who is there; without one the bridge is "starting", for as long as it takes. Invariant: what the
scheduler sent to an incarnation of text or fsm reaches that one or nobody.
"""

import contextlib
import socket
import struct
import time
from typing import Any, Final

import msgspec
import trio

from .messages import Drain, PeerDown, PeerUp
from .node_messages import CONTROL, PEERS, Control, Refusal, Serving, Welcome, encode
from .relay import Relay
from .sealed import Frame, Keys, LinkLost, SealedSocket
from .topology import HANDED

NAMES: Final = {kind: name for name, kind in PEERS.items()}


class Handed(msgspec.Struct, frozen=True, array_like=True):
    """Beside a connection's descriptor: its keys (Keys of the head) and the machine."""

    sending: bytes
    receiving: bytes
    machine: int


def hand_over(channel: int, connection: socket.socket, keys: Keys, machine: int) -> None:
    """The gate's side. `channel` and the connection stay the caller's. Raises BlockingIOError where too many wait."""
    with socket.socket(fileno=channel, family=socket.AF_UNIX, type=socket.SOCK_DGRAM) as sender:
        try:
            note = msgspec.msgpack.encode(Handed(keys.sending, keys.receiving, machine))
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", connection.fileno()))
            sender.sendmsg([note], [rights], socket.MSG_DONTWAIT)  # send_fds takes flags and forgets them
        finally:
            sender.detach()


def take_over(channel: socket.socket) -> tuple[socket.socket, Handed]:
    """The bridge's side: a connection, which is the caller's. Raises BlockingIOError where none waits."""
    space, flags = socket.CMSG_SPACE(struct.calcsize("i")), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    note, ((_, _, rights), *_), _, _ = channel.recvmsg(4096, space, flags)
    return socket.socket(fileno=struct.unpack("i", rights)[0]), msgspec.msgpack.decode(note, type=Handed)


class Bridge(Relay):
    """See the module's text."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._handed = socket.socket(fileno=context.files[HANDED], family=socket.AF_UNIX, type=socket.SOCK_DGRAM)
        self._serves = trio.Event()

    async def start(self) -> None:
        """Wait for the other machine, then for its scheduler. Raises LinkLost."""
        await self.context.progress("waiting for the machine of this replica", 0.0)
        self.line = await self._newest()
        self.tell(Welcome(time.monotonic_ns()))
        await self.context.progress(f"waiting for the replica on {self.other}", 0.0)
        async with trio.open_nursery() as nursery:
            self.start_tasks(nursery)
            nursery.start_soon(self.listen)
            await self._serves.wait()
            nursery.cancel_scope.cancel()
        self.context.log.info("the replica on %s serves", self.other)

    async def run(self) -> None:
        """As every Relay; and turn away who else says to be this replica's machine."""
        self.context.nursery.start_soon(self._turn_away)
        await super().run()

    def receive(self, message: Any, source: str) -> None:
        match message:
            case PeerUp() | PeerDown():
                self.pass_on(CONTROL, 0, encode(message))
            case Drain():
                pass  # the fronts send nothing new
            case _:
                self.pass_on(PEERS[source], 0, message)

    def came(self, frame: Frame) -> None:
        ref = self.context.ref(NAMES[frame.kind]) if frame.kind in NAMES else None
        if ref is None or ref.name not in self.context.peers():
            raise LinkLost(f"{self.other} sent something for nobody")
        if ref.up and ref.epoch == frame.epoch:
            self.hand(ref, frame.payload)

    def told(self, message: Control) -> None:
        match message:
            case Serving():
                self._serves.set()
            case PeerDown():
                # Our own death tells it on; who it may have died of is read from the desk (desk.py).
                for rid in message.at_work if message.fault else ():
                    self.context.desk.begin(rid)
                raise LinkLost(f"on {self.other}: {message.reason}")
            case _:
                raise LinkLost(f"{self.other} sent what only node 0 may")

    # ------------------------------------------------------------------ connections

    async def _next(self) -> SealedSocket:
        while True:
            await trio.lowlevel.wait_readable(self._handed.fileno())
            try:
                connection, handed = take_over(self._handed)
            except BlockingIOError:
                continue
            self.other = f"node {handed.machine}"
            return SealedSocket(connection, Keys(handed.sending, handed.receiving), received=1)

    async def _newest(self) -> SealedSocket:
        """Of several that wait, all but the last were given up by who made them."""
        line = await self._next()
        with trio.move_on_after(0.05):
            while True:
                newer = await self._next()
                line.close()
                line = newer
        return line

    async def _turn_away(self) -> None:
        while True:
            line = await self._next()
            line.put(CONTROL, 0, encode(Refusal(f"{self.context.name} is connected already", final=False)))
            with contextlib.suppress(LinkLost):
                line.flush()
            line.close()
