"""What an actor is: a class with one inbox, state that nobody else touches, and handlers that run one at a time.

Every actor of the engine derives from Actor and gets a Context: its name, its configuration, its inbox and the
addresses of its peers. Invariant: `receive` and `flush` are never entered twice at once and never block; an actor
above them cannot tell whether a peer lives in the same loop or in another process.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import trio

from ..config import EngineConfig, ModelInfo
from .desk import NOBODY, Desk
from .inbox import Inbox
from .messages import PeerUp
from .ref import Ref

BURST = 256
"""Messages received before a flush, at most."""
LOCAL_LIMIT = 4096
"""Messages in a local lane before try_send refuses."""


class Context:
    """All that an actor knows of the world. Made by its node, or by a test (see `connect`)."""

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        model: ModelInfo,
        inbox_type: Any,
        *,
        sends_to: Iterable[str] = (),
        epoch: int = 1,
        files: Mapping[str, int] | None = None,
        desk: Desk | None = None,
    ) -> None:
        """`sends_to`: names of the actors this one has a lane to; `files`: descriptors handed to its node."""
        self.name = name
        self.epoch = epoch
        """Incarnation of this actor's node, from 1."""
        self.config = config
        self.model = model
        self.inbox = Inbox(inbox_type)
        self.files = dict(files or {})
        self.desk = desk or Desk()
        """Its node's: what it works on."""
        self.log = logging.getLogger(f"actorserve.{name}")
        self.reporter: Callable[[str, float], None] | None = None
        """Where `report` goes; set by the node."""
        self.accuser: Callable[[str, str], None] | None = None
        """Where `accuse` goes; set by the node."""
        self._nursery: trio.Nursery | None = None
        self._refs = {peer: Ref(peer, self.inbox) for peer in sends_to}
        self._actors: dict[str, Actor] = {}

    @property
    def nursery(self) -> trio.Nursery:
        """For background tasks of the actor; they end with it. Only under trio, from `start` on."""
        if self._nursery is None:
            raise RuntimeError("no nursery: not started, or not under trio")
        return self._nursery

    def ref(self, name: str) -> Ref:
        """The peer `name`; raises KeyError if the topology has no lane to it. The same object at every call."""
        return self._refs[name]

    def peers(self) -> Iterable[str]:
        """Names of the actors that this one may send to, up or not."""
        return tuple(self._refs)

    def local(self, name: str) -> "Actor":
        """Another actor of the same node; raises KeyError."""
        return self._actors[name]

    async def progress(self, stage: str, fraction: float) -> None:
        """Tell how far `start` is (fraction 0 to 1 of `stage`); each call extends the node's deadline."""
        self.report(stage, fraction)
        if trio.lowlevel.in_trio_task():
            await trio.lowlevel.checkpoint()

    def report(self, stage: str, fraction: float) -> None:
        """`progress` for code that is not async; from any thread."""
        if self.reporter is not None:
            self.reporter(stage, fraction)

    def accuse(self, peer: str, detail: str) -> None:
        """Tell the supervisor that a peer is stuck: it is killed, as far as that can be done, and PeerDown follows."""
        if self.accuser is not None:
            self.accuser(peer, detail)

    # ------------------------------------------------------------------ for the node

    def host(self, actors: dict[str, "Actor"], nursery: trio.Nursery | None) -> None:
        """The actors of this node, and where background tasks go."""
        self._actors = actors
        self._nursery = nursery

    def add_ref(self, name: str) -> Ref:
        """The ref to `name`, made if the actor had no lane to it yet."""
        if name not in self._refs:
            self._refs[name] = Ref(name, self.inbox)
        return self._refs[name]

    def close(self) -> None:
        """Close all lanes of this actor."""
        for ref in self._refs.values():
            ref.disconnect()
        self.inbox.close()


class Actor:
    """Base of all actors: override `receive`, and what else is needed."""

    inbox_type: ClassVar[Any]
    """The union of messages that the actor receives, e.g. messages.TextInbox."""
    loop: ClassVar[Literal["trio", "asyncio"]] = "trio"
    """In which loop start, run and stop are run (asyncio: on uvloop). One for all actors of a node."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def start(self) -> None:
        """Load what is needed. No peer is connected yet. Raising errors.StartupError at the first start ends the
        engine with its message; any other exception makes the supervisor try again a few times."""

    def receive(self, message: Any, source: str) -> None:
        """Handle one message; never blocks. Its memoryviews alias the ring and are valid until this returns."""
        raise NotImplementedError(f"{type(self).__name__}.receive")

    def flush(self) -> None:
        """After each burst of messages, and after each wake-up: decide and send."""

    def drain(self) -> None:
        """Receive what has arrived, then flush. Stops after BURST messages, with `inbox.fileno()` left readable."""
        inbox, desk = self.context.inbox, self.context.desk
        for count in range(BURST):
            item = inbox.poll(look=not count)
            if item is None:
                break
            desk.now(getattr(item[0], "rid", NOBODY))
            self.receive(*item)
        desk.rest()
        self.flush()
        desk.rest()
        inbox.listen()

    async def run(self) -> None:
        """Until cancelled: wait, drain. An actor with work of its own between messages overrides this."""
        while True:
            await self.context.inbox.wait()
            self.drain()

    async def stop(self) -> None:
        """Called at an orderly end while `run` still runs, with some time (at most 2 s) to say goodbye."""


def connect(sender: Context, receiver: Context, *, limit: int = LOCAL_LIMIT, codec: bool = False) -> None:
    """A local lane from one actor to another of the same loop; both get PeerUp, as with any lane.

    `limit`: messages before try_send refuses. `codec`: each message is encoded and decoded. Tests use it too:
    `sched = Context("sched", config, model, SchedulerInbox); text = Context("text", ...); connect(text, sched)`.
    """
    lane = receiver.inbox.add_local(sender.name, limit, codec)
    sender.add_ref(receiver.name).connect(lane, receiver.epoch)
    if sender.name in receiver.peers() and receiver.ref(sender.name).up:
        return  # the lane of the other direction told them
    sender.inbox.put_system(PeerUp(receiver.name, receiver.epoch))
    receiver.inbox.put_system(PeerUp(sender.name, sender.epoch))


def disconnect(sender: Context, receiver: Context) -> None:
    """The end of that lane; no PeerDown is sent, a test may `inbox.put_system` one."""
    sender.add_ref(receiver.name).disconnect()
    receiver.inbox.drop(sender.name)
