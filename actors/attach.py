"""How a program of its own becomes a node: the embedded client, or a front inside the user's event loop.

The supervisor holds one end of a socket pair (`Supervisor.attach`), the program makes an `Attachment` of the other
end. Invariant: nothing here blocks or runs by itself; it acts when its owner says that a descriptor is readable, on
the owner's one thread, whatever loop that is.
"""

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import anyio
import anyio.abc

from .actor import Actor, Context
from .control import ControlClosed, ControlSocket
from .node import NodeCore


class Detached(Exception):
    """The engine stopped, or died; its text says which."""


class Attachment:
    """A node outside of the supervisor's reach, with one actor. Drive it with `drive`, or by hand:

    1. `Attachment(sock, factory, inbox_type)` says Hello.
    2. Whenever `control_fileno()` is readable: `on_control_readable()`. The first of these calls that finds the
       supervisor's answer makes the actor, `factory(context)`, and sets `attached`; lanes follow with the peers.
    3. Once `attached`, whenever `inbox_fileno()` is readable: `on_inbox_readable()`, that is `actor.drain()`:
       receive() for each message, then flush(). It starts with PeerUp for each peer. Credit for posted messages is
       handled there too, so it must be called even by an actor that expects nothing. `Ref.send` needs trio;
       `Ref.post` and `Ref.try_send` work on any loop.
    4. On Detached from `on_control_readable`: PeerDown of every peer is in the inbox; call `on_inbox_readable()` a
       last time, so that the actor fails what it owes, then `close()`.
    5. To leave: `close()` at any time; the engine's actors get PeerDown.

    Both descriptors stay the same until `close`. start(), run() and stop() of the actor are not called.
    """

    def __init__(self, sock: socket.socket, factory: Callable[[Context], Actor], inbox_type: Any) -> None:
        """Takes ownership of `sock`. `inbox_type`: the union that the actor receives. Raises Detached."""
        self._factory = factory
        self._inbox_type = inbox_type
        control = ControlSocket(sock)
        try:
            self._core = NodeCore(control)
        except ControlClosed:
            control.close()
            raise Detached("the engine is gone") from None
        self._actor: Actor | None = None

    @property
    def attached(self) -> bool:
        """The actor exists."""
        return self._actor is not None

    @property
    def actor(self) -> Actor:
        """What the factory made; raises RuntimeError before `attached`."""
        if self._actor is None:
            raise RuntimeError("not attached yet")
        return self._actor

    def control_fileno(self) -> int:
        """Wait for this from the beginning."""
        return self._core.control.fileno()

    def inbox_fileno(self) -> int:
        """Wait for this once attached."""
        return self.actor.context.inbox.fileno()

    def on_control_readable(self) -> None:
        """Handle all that the supervisor said. Raises Detached."""
        core = self._core
        try:
            core.on_control_readable()
            if self._actor is None and core.boot is not None:
                core.build(lambda _, context: self._factory(context), lambda _: self._inbox_type)
                (self._actor,) = core.actors.values()
                core.ready()
        except ControlClosed:
            core.all_down("the engine is gone")
            raise Detached("the engine is gone") from None
        if core.stop is not None:
            core.all_down("the engine stops")
            raise Detached("the engine stops")

    def on_inbox_readable(self) -> None:
        """Receive and flush. Without effect before `attached`."""
        if self._actor is not None:
            self._actor.drain()

    def close(self) -> None:
        """Leave the engine; close both descriptors and all lanes. Nobody may wait for them any more."""
        self._core.stopped()
        self._core.close()


async def drive(attachment: Attachment, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
    """Serve an attachment on asyncio, uvloop or trio until the engine ends (returns) or this is cancelled.

    Started (for `await task_group.start(drive, attachment)`) once attached; closes the attachment at the end. Raises
    Detached if the engine ends before it is attached. An exception of the actor comes out in an exception group.
    """
    try:
        while not attachment.attached:
            await anyio.wait_readable(attachment.control_fileno())
            attachment.on_control_readable()
        task_status.started()
        async with anyio.create_task_group() as group:
            group.start_soon(_drain, attachment)
            await _obey(attachment)
            group.cancel_scope.cancel()
        attachment.on_inbox_readable()
    finally:
        attachment.close()


async def _obey(attachment: Attachment) -> None:
    with contextlib.suppress(Detached):
        while True:
            await anyio.wait_readable(attachment.control_fileno())
            attachment.on_control_readable()


async def _drain(attachment: Attachment) -> None:
    while True:
        await anyio.wait_readable(attachment.inbox_fileno())
        attachment.on_inbox_readable()
