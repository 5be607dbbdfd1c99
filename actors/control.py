"""The control plane: what the supervisor and its nodes tell each other, and the socket that carries it.

One SOCK_SEQPACKET socket pair per incarnation of a node, one message per datagram, descriptors ride along by
SCM_RIGHTS. It is apart from the lanes, so control never queues behind data. Invariant: a message arrives whole and in
order or the other side is gone; its descriptors belong to the receiver.

    node  --Hello-->  --Progress*-->  --Ready-->  ...  --Pong*, Stuck, Corrupt, Failed, Stopped-->  supervisor
    node  <--Boot--                   <--Wire, Down, Ping*, DrainUntil--   <--Stop--                supervisor
"""

import contextlib
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import msgspec

from ..config import EngineConfig, ModelInfo

_MAX_DATAGRAM = 128 << 10
_MAX_FDS = 250  # the kernel's SCM_MAX_FD is 253


class ControlMessage(msgspec.Struct, frozen=True, array_like=True):
    """Base of the messages between supervisor and node."""


class ActorBoot(ControlMessage, frozen=True):
    """An actor of the node: its name, its class as "module:Class", and the actors it has lanes to."""

    name: str
    class_path: str
    sends_to: list[str]


class LaneEnd(ControlMessage, frozen=True):
    """One end of a lane between nodes: the node's actor, the other side's actor, and who sends."""

    actor: str
    peer: str
    sends: bool


# ------------------------------------------------------------------ supervisor -> node


class Boot(ControlMessage, frozen=True, tag=1):
    """The answer to Hello. Descriptors: those of `files`, in order."""

    node: str
    epoch: int
    actors: list[ActorBoot]
    local_lanes: list[tuple[str, str]]
    """(source, target) of the lanes inside the node."""
    codec: bool
    """Messages in local lanes go through encode and decode."""
    files: list[str]
    config: EngineConfig
    model: ModelInfo


class Wire(ControlMessage, frozen=True, tag=2):
    """A neighbour is up: the lanes with it. Descriptors: memory, data, credit of each end, in order."""

    epoch: int
    """The neighbour's."""
    ends: list[LaneEnd]


class Down(ControlMessage, frozen=True, tag=3):
    """A neighbour is down, with these actors."""

    actors: list[str]
    epoch: int
    reason: str
    fault: bool = True
    at_work: tuple[int, ...] = ()
    """As in messages.PeerDown."""


class DrainUntil(ControlMessage, frozen=True, tag=4):
    """Becomes messages.Drain in every inbox of the node."""

    deadline_ns: int


class Stop(ControlMessage, frozen=True, tag=5):
    """Run `Actor.stop` for at most `grace` seconds, answer Stopped and leave."""

    grace: float


class Ping(ControlMessage, frozen=True, tag=6):
    """Does the node's loop still turn? Answered by Pong at once."""


# ------------------------------------------------------------------ node -> supervisor


class Hello(ControlMessage, frozen=True, tag=10):
    """The first message: the interpreter runs and signal handlers are in place."""

    pid: int


class Progress(ControlMessage, frozen=True, tag=11):
    """An actor's start is at `fraction` (0 to 1) of `stage`."""

    actor: str
    stage: str
    fraction: float


class Ready(ControlMessage, frozen=True, tag=12):
    """All actors of the node started: lanes may come."""


class Failed(ControlMessage, frozen=True, tag=13):
    """An actor raised; the node exits."""

    summary: str
    """Type and message of the innermost exception."""
    traceback: str
    startup_message: str | None
    """The message if that exception is a StartupError."""


class Corrupt(ControlMessage, frozen=True, tag=14):
    """`actor` got something broken from `peer`, whose lane is closed."""

    actor: str
    peer: str
    detail: str


class Stopped(ControlMessage, frozen=True, tag=15):
    """The orderly end."""


class Pong(ControlMessage, frozen=True, tag=16):
    """The answer to Ping."""


class Stuck(ControlMessage, frozen=True, tag=17):
    """`actor` waits for work of `peer` that does not come, though its loop may turn."""

    actor: str
    peer: str
    detail: str


ToNode: TypeAlias = Boot | Wire | Down | DrainUntil | Stop | Ping
ToSupervisor: TypeAlias = Hello | Progress | Ready | Failed | Corrupt | Stopped | Pong | Stuck
Received = TypeVar("Received")
node_decoder: msgspec.msgpack.Decoder[ToNode] = msgspec.msgpack.Decoder(ToNode)
supervisor_decoder: msgspec.msgpack.Decoder[ToSupervisor] = msgspec.msgpack.Decoder(ToSupervisor)


class ControlClosed(Exception):
    """The other side closed its end, or died."""


class ControlSocket:
    """One end. Never blocks except in `send(patient=True)`; `send` may be called from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes ownership of `sock`, a SOCK_SEQPACKET socket."""
        sock.setblocking(False)
        sock.set_inheritable(False)
        self._socket = sock

    def fileno(self) -> int:
        """To wait for."""
        return self._socket.fileno()

    def send(self, message: ControlMessage, fds: Sequence[int] = (), *, patient: bool = False) -> None:
        """Send one message; `fds` are duplicated on the way and stay the caller's.

        Raises BlockingIOError when the other side does not read (patient: not for a second), ControlClosed.
        """
        data = msgspec.msgpack.encode(message)
        rights = struct.pack(f"{len(fds)}i", *fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
        try:
            try:
                self._socket.sendmsg([data], ancillary)
            except BlockingIOError:
                if not patient:
                    raise
                waiting = select.poll()
                waiting.register(self._socket, select.POLLOUT)
                waiting.poll(1000)
                self._socket.sendmsg([data], ancillary)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ControlClosed from error

    def receive(self, decoder: msgspec.msgpack.Decoder[Received]) -> tuple[Received, list[int]] | None:
        """The next message with its descriptors; None when there is none now. Raises ControlClosed."""
        try:
            data, ancillary, flags = self._receive_datagram()
        except BlockingIOError:
            return None
        fds: list[int] = []
        for level, what, content in ancillary:
            if (level, what) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.extend(memoryview(content[: len(content) // 4 * 4]).cast("i"))
        try:
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ControlClosed
            message = decoder.decode(data)
        except (ControlClosed, msgspec.MsgspecError) as error:
            for descriptor in fds:
                os.close(descriptor)
            raise ControlClosed(str(error)) from error
        return message, fds

    def _receive_datagram(self) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
        for _ in range(2):
            with contextlib.suppress(ConnectionResetError):
                # A peer that died with mail unread resets the socket: the error comes once, its last words after it.
                data, ancillary, flags, _ = self._socket.recvmsg(
                    _MAX_DATAGRAM, socket.CMSG_SPACE(4 * _MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
                return data, ancillary, flags
        return b"", [], 0

    def close(self) -> None:
        """The other side sees the end."""
        self._socket.close()


def control_pair() -> tuple[ControlSocket, socket.socket]:
    """The supervisor's end and the one to be handed to a node."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ControlSocket(ours), theirs
