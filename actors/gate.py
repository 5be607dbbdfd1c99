"""The gate: where other machines of the server knock (--dist-init-addr), on the head. One actor, without lanes.

It lets in who has the key (sealed.py) and the same model and settings (machines.py), and hands the connection to the
bridge of the replica that it is of. Whoever has not the key is read 72 bytes at most, for SECONDS at most, and costs
one of PENDING places, of which the oldest is given away when they run out. Invariant: it waits for nobody.
"""

import os
import socket
import time
from collections import deque
from typing import Any, ClassVar, Final

import msgspec
import trio

from .actor import Actor, Context
from .bridge import hand_over
from .machines import differences, facts_of, read_key
from .messages import SystemMessage
from .node_messages import CONTROL, VERSION, Join, Refusal, decode, encode
from .sealed import Keys, LinkLost, SealedSocket, prove_as_head, read_first
from .topology import MEETING_POINT

SECONDS: Final = 5.0
"""For saying who one is."""
PENDING: Final = 64
"""Connections that have not said it yet."""


class Gate(Actor):
    """See the module's text."""

    inbox_type: ClassVar[Any] = SystemMessage

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._key = b""
        self._facts: dict[str, str] = {}
        self._pending: deque[trio.CancelScope] = deque()
        self._said_at = 0.0

    async def start(self) -> None:
        """Listen. Raises StartupError."""
        context = self.context
        self._key = read_key(context.config)
        self._facts = facts_of(context.config, context.model)
        listener = socket.socket(fileno=os.dup(context.files[MEETING_POINT]))
        context.nursery.start_soon(self._accept, trio.socket.from_stdlib_socket(listener))

    def receive(self, message: Any, source: str) -> None:
        pass  # it has no peers

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        with listener:
            while True:
                try:
                    sock, address = await listener.accept()
                except OSError as error:  # it left again, or we have no descriptor left
                    self._complain(f"cannot take a connection: {error.strerror}")
                    await trio.sleep(0.05)
                    continue
                if len(self._pending) == PENDING:
                    self._pending.popleft().cancel()
                scope = trio.CancelScope(deadline=trio.current_time() + SECONDS)
                self._pending.append(scope)
                self.context.nursery.start_soon(self._meet, sock, str(address[0]), scope)

    async def _meet(self, sock: trio.socket.SocketType, address: str, scope: trio.CancelScope) -> None:
        """One who knocks. Whatever it does ends with its connection."""
        try:
            with scope:
                stream = trio.SocketStream(sock)
                keys = await prove_as_head(stream, self._key)
                await self._let_in(stream, keys)
            if scope.cancelled_caught:
                self._complain(f"{address} did not say who it is")
        except (LinkLost, trio.BrokenResourceError, trio.ClosedResourceError, OSError, msgspec.MsgspecError) as error:
            self._complain(f"{address} is not let in: {error}")
        finally:
            if scope in self._pending:
                self._pending.remove(scope)
            sock.close()  # a bridge has a descriptor of its own

    async def _let_in(self, stream: trio.SocketStream, keys: Keys) -> None:
        """Who has the key may still be of no use."""
        frame = await read_first(stream, keys)
        join = decode(frame.payload) if frame.kind == CONTROL else None
        if not isinstance(join, Join):
            raise LinkLost("it does not say who it is")
        why, final = self._why_not(join), True
        if not why:
            try:
                with socket.socket(fileno=os.dup(stream.socket.fileno())) as connection:
                    hand_over(self.context.files[f"sched.{join.replica}"], connection, keys, join.machine)
                return
            except BlockingIOError:
                why, final = "too many connections of this replica wait", False
        await self._refuse(stream, keys, Refusal(why, final))
        self._complain(f"node {join.machine} is not let in: {why}")

    def _why_not(self, join: Join) -> str:
        if join.version != VERSION:
            return f"it speaks version {join.version} of the machines' protocol, node 0 {VERSION}"
        found = differences(self._facts, join.facts)
        if found:
            return f"it differs in {found}"
        if f"sched.{join.replica}" not in self.context.files:
            return f"node 0 has replica {join.replica} itself, or there is none"
        machine = self.context.config.machine_of(join.replica)
        return "" if machine == join.machine else f"replica {join.replica} is of node {machine}"

    async def _refuse(self, stream: trio.SocketStream, keys: Keys, refusal: Refusal) -> None:
        with socket.socket(fileno=os.dup(stream.socket.fileno())) as connection:
            line = SealedSocket(connection, keys)
            line.put(CONTROL, 0, encode(refusal))
            line.flush()
        await stream.send_eof()

    def _complain(self, text: str) -> None:
        """In the log, but not more than once a second."""
        if time.monotonic() - self._said_at > 1:
            self._said_at = time.monotonic()
            self.context.log.warning(text)
