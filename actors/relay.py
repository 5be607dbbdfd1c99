"""What the two ends of a connection between machines have in common: lanes on one side, the connection on the other.

The base of bridge.py's actor, on the head, and link.py's, on the other machine. Messages pass as they are, undecoded:
whoever gets them decodes and checks. Nothing is kept without bound: where the connection is slower than a lane, the
lane is not read, and the other way round. Invariant: a connection that ends, in whichever way, ends the actor, and
thereby for its neighbours the peer that it stands for; a silent one counts as ended after --node-timeout.
"""

from typing import Any, ClassVar, Final

import msgspec
import trio

from .actor import Actor, Context
from .node_messages import CONTROL, Beat, Control, decode, encode
from .ref import Gone, Ref
from .sealed import Frame, LinkLost, SealedSocket

HIGH: Final = 4 << 20
"""Bytes that wait for the connection, after which lanes are not read any more."""
LATE: Final = 64
"""Messages that wait for a lane, after which the connection is not read any more."""
TICKS: Final = 5
"""Looks, in --node-timeout, at whether the other side has said something; each has one Beat sent."""


class Relay(Actor):
    """State: the connection, and the lanes' refs, which see to what waits for them."""

    inbox_type: ClassVar[Any] = msgspec.Raw

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.line: SealedSocket | None = None
        self.other = ""
        """The machine at the other end, for people."""
        self.refs = [context.ref(name) for name in context.peers()]
        """Whom messages of the other machine are for."""
        self._more = trio.Event()
        """Something waits for the connection."""
        self._less = trio.Event()
        """Not so much any more."""
        self._silent = 0
        """Ticks without a word while we listened."""
        self._listens = False

    def came(self, frame: Frame) -> None:
        """Take a frame from another actor's lane."""
        raise NotImplementedError(f"{type(self).__name__}.came")

    def told(self, message: Control) -> None:
        """Take a message of the other side's own."""
        raise NotImplementedError(f"{type(self).__name__}.told")

    # ------------------------------------------------------------------ to the other machine

    def tell(self, message: Control) -> None:
        """Send a message of our own."""
        self.pass_on(CONTROL, 0, encode(message))
        self.flush()

    def pass_on(self, kind: int, epoch: int, payload: bytes | memoryview) -> None:
        """Queue a frame; `flush` sends it."""
        if self.line is not None:
            self.line.put(kind, epoch, payload)

    def flush(self) -> None:
        """Send what waits. Raises LinkLost."""
        if self.line is not None:
            self.line.flush()
            if self.line.backlog:
                self._more.set()

    async def room(self) -> None:
        """Return when lanes may be read again."""
        while self.line is not None and self.line.backlog > HIGH:
            if self._less.is_set():
                self._less = trio.Event()
            await self._less.wait()

    # ------------------------------------------------------------------ to the lanes

    def hand(self, ref: Ref, payload: bytes) -> None:
        """Give a message of the other machine to whom it is for, unless that is down: then it is told so."""
        try:
            ref.post(msgspec.Raw(payload))
        except Gone:
            self.context.log.debug("%s is down", ref.name)

    # ------------------------------------------------------------------ tasks

    async def run(self) -> None:
        """Until the connection ends, which raises LinkLost."""
        async with trio.open_nursery() as nursery:
            self.start_tasks(nursery)
            nursery.start_soon(self.listen)
            while True:
                await self.context.inbox.wait()
                self.drain()
                await self.room()

    def start_tasks(self, nursery: trio.Nursery) -> None:
        """Keep the connection alive, and send what could not be sent at once."""
        nursery.start_soon(self._write)
        nursery.start_soon(self._beat)

    async def listen(self) -> None:
        """Take what comes. Raises LinkLost."""
        assert self.line is not None
        while True:
            self._listens = True
            await trio.lowlevel.wait_readable(self.line.fileno())
            self._listens = False
            self.hear()
            while any(ref.backlog > LATE for ref in self.refs):  # noqa: ASYNC110 who waits for the inbox pumps the refs
                await trio.sleep(0.002)

    def hear(self) -> None:
        """Take what has come. Raises LinkLost."""
        assert self.line is not None
        frames = self.line.receive()
        self._silent = 0
        for frame in frames:
            if frame.kind != CONTROL:
                self.came(frame)
                continue
            try:
                message = decode(frame.payload)
            except msgspec.MsgspecError as error:
                raise LinkLost(f"{self.other} sent what is no message: {error}") from error
            if not isinstance(message, Beat):
                self.told(message)

    async def _write(self) -> None:
        assert self.line is not None
        while True:
            await self._more.wait()
            self._more = trio.Event()
            while self.line.backlog:
                await trio.lowlevel.wait_writable(self.line.fileno())
                self.line.flush()
                if self.line.backlog <= HIGH:
                    self._less.set()

    async def _beat(self) -> None:
        """Time that our own loop lost does not count: a tick is one, however late it comes."""
        seconds = self.context.config.node_timeout
        assert self.line is not None
        while True:
            if not self.line.backlog:
                self.tell(Beat())
            await trio.sleep(seconds / TICKS)
            self._silent += self._listens
            if self._silent > TICKS:
                raise LinkLost(f"no word from {self.other} for {seconds:g} s")
