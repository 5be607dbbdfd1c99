"""What the text actor keeps of running requests: their outputs, what is new for whom, and what schedulers were told.

The base of text.py's actor, which fills it. Invariant: a scheduler that is up was told all that is here and is its own.
"""

from collections.abc import Collection
from typing import Final

from msgspec.structs import replace

from ..errors import ActorserveError, EngineDown
from .actor import Actor, Context
from .desk import MAX_DEATHS, Suspects
from .messages import (
    NO_STATS,
    Abort,
    AskTimelines,
    Chunk,
    Chunks,
    Done,
    FrontAnswer,
    ImagePixels,
    Look,
    Order,
    PeerDown,
    Refused,
    Seen,
    Stats,
    Submit,
    Unpin,
)
from .orders import Asked, Orders, Question, Reply
from .output import Output
from .ref import Gone
from .replicas import Replica, Replicas
from .totals import why_down
from .view import with_lanes_of

SCHEDULER_DIED: Final = f"the scheduler died {MAX_DEATHS} times while it worked on this request; it is not tried again"
PAUSES: Final = ("pause", "pause_abort", "pause_retract", "continue")
UPDATES: Final = ("update_weights", "update_weights_abort")
EMPTYING: Final = ("flush_cache", *UPDATES)
"""Orders that leave nothing in the prefix caches."""
OURS: Final = -1
"""Id of an order of nobody's."""


class Running(Actor):
    """State: the running requests, those with something new for their front, the replicas, and orders to them."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.outputs: dict[int, Output] = {}
        """Running requests by id."""
        self.prompt_tokens = 0
        """Of their prompts."""
        self.replicas = Replicas(context.config, tuple(context.peers()))
        self.orders = Orders(len(self.replicas))
        self.suspects = Suspects()
        """Of the schedulers' deaths."""
        self.paused = False
        """By the last order that was carried out; before the first one of this life as the schedulers say."""
        self._ordered = False
        self.weights = ""
        """The folder of those that were exchanged last; empty: those of the start."""
        self._changed: dict[str, dict[int, Output]] = {}
        """By front: outputs with something new."""

    def flush(self) -> None:
        """Send each front what is new in one message, first tokens first. Where one lags behind, chunks are joined."""
        desk = self.context.desk
        for front in list(self._changed):
            ref = self.context.ref(front)
            if ref.backlog:
                continue  # credit wakes us, and flush is called again
            changed = sorted(self._changed.pop(front).values(), key=_is_begun)
            while changed:
                chunks: list[Chunk] = []
                for output in changed:
                    desk.now(output.rid)
                    if (chunk := output.chunk()) is not None:
                        chunks.append(chunk)
                desk.rest()
                if chunks:
                    self._post(front, Chunks(chunks))
                changed = [output for output in changed if output.holds_prompt]

    def _forget(self, rid: int) -> Output | None:
        output = self._drop(rid)
        if output is not None:
            self._unmark(output)
        return output

    def _drop(self, rid: int) -> Output | None:
        output = self.outputs.pop(rid, None)
        if output is not None:
            self.prompt_tokens -= output.prompt_tokens
            output.replica.requests -= 1
        return output

    def _mark_changed(self, output: Output) -> None:
        self._changed.setdefault(output.front, {})[output.rid] = output

    def _unmark(self, output: Output) -> None:
        self._changed.get(output.front, {}).pop(output.rid, None)

    def _refuse(self, rid: int, n: int, front: str, error: ActorserveError) -> None:
        self._post(front, Refused(rid, n, error.status, error.code, error.message, error.param))

    def _to_scheduler(
        self, replica: Replica, message: Abort | Submit | ImagePixels | Unpin | Order | Look | AskTimelines
    ) -> None:
        """Send, if it is up; else the next one is told all that still holds."""
        if replica.up:
            self._post(replica.scheduler, message)

    def _to_schedulers(self, message: Unpin | Order | Look | AskTimelines) -> None:
        for replica in self.replicas:
            self._to_scheduler(replica, message)

    def _post(
        self,
        name: str,
        message: Abort
        | Submit
        | ImagePixels
        | Unpin
        | Chunks
        | Refused
        | Stats
        | Order
        | Look
        | AskTimelines
        | FrontAnswer,
    ) -> None:
        """Send; a peer that is down is told again when it is up, or has lost its requests, and its PeerDown follows."""
        try:
            self.context.ref(name).post(message)
        except Gone:
            self.context.log.debug("%s is down", name)

    # ------------------------------------------------------------------ orders

    def _order(self, m: Question, front: str) -> None:
        if isinstance(m, Order) and m.action in UPDATES and len(self.replicas) > 1:
            down = why_down([replica.stats for replica in self.replicas])
            if down:  # the others would have other weights than it
                self._refuse(m.rid, 1, front, EngineDown(f"{down}; try again"))
                return
        self._to_schedulers(self.orders.ask(m, front, [one.number for one in self.replicas if not one.away]))

    def _order_ended(self, m: Reply, scheduler: str) -> None:
        replica = self.replicas.named(scheduler)
        assert replica is not None, "nobody else answers"
        if m.rid == OURS and isinstance(m, Refused):
            self.context.log.error("replica %d cannot have the others' weights: %s", replica.number, m.message)
        found = self.orders.answered(m, replica.number)
        if found is not None:
            self._answer(*found)

    def _answer(self, asked: Asked, reply: Reply) -> None:
        if isinstance(reply, Done) and isinstance(asked.question, Order):
            self._carried_out(asked.question, asked.replies)
        self._post(asked.front, with_lanes_of(self.context, reply) if isinstance(reply, Seen) else reply)

    def _carried_out(self, order: Order, by: Collection[int]) -> None:
        if order.action in PAUSES:
            self.paused, self._ordered = order.action != "continue", True
        elif order.action in EMPTYING:
            for replica in self.replicas:
                self.replicas.lost_cache(replica)
        if order.action in UPDATES:
            self.weights = order.detail
            for replica in self.replicas:
                if replica.number not in by:
                    replica.stale = True

    # ------------------------------------------------------------------ replicas

    def _send_images(self, replica: Replica, images: tuple[ImagePixels, ...]) -> None:
        """Before the Submits that have them."""
        for image in images:
            self._to_scheduler(replica, image)

    def _stats(self, m: Stats, replica: Replica) -> None:
        """To every front that has room: newer ones follow. What is up or down must arrive, so it waits for room."""
        before, replica.stats = replica.stats, m
        if m == before:
            return
        if not self._ordered:
            self.paused = any(one.stats.paused for one in self.replicas)
        news = (m.executor_up, m.down) != (before.executor_up, before.down)
        if before.executor_up and not m.executor_up:
            self.replicas.lost_cache(replica)
        self._compare_weights(replica, news)
        if news and replica.serves:
            for gone in [one for one in self.replicas if one.gone]:
                self._move_outputs(gone)
        for name in self.context.peers():
            ref = self.context.ref(name)
            if self.replicas.named(name) is None and ref.up:
                if news:
                    ref.post(m)
                else:
                    ref.try_send(m)

    def _ask_again(self, replica: Replica) -> None:
        """Tell a new scheduler all that the last one knew, as far as it was told here."""
        replica.up = True
        replica.stale = replica.remote and bool(self.weights)
        if self.paused:
            self._to_scheduler(replica, Order(OURS, "pause"))
        self._submit_again(replica)
        for question in self.orders.unanswered(replica.number):
            self._to_scheduler(replica, question)

    def _ask_for(self, output: Output) -> None:
        """Ask its replica for (the rest of) it."""
        self._send_images(output.replica, output.images)
        self._to_scheduler(output.replica, output.submission())

    def _submit_again(self, replica: Replica) -> None:
        """Ask for the rest of what it has, unless that would come of other weights."""
        for output in self._outputs_of(replica) if not replica.stale else ():
            self._ask_for(output)

    def _compare_weights(self, replica: Replica, news: bool) -> None:
        """A machine that was started again has those of its start."""
        m = replica.stats
        if not replica.remote:
            self.weights = m.weights or self.weights  # of a text actor that died
        elif replica.stale and m.weights == self.weights:
            replica.stale = False
            self._submit_again(replica)
        elif replica.stale and news and m.executor_up:
            self._to_scheduler(replica, Order(OURS, "update_weights", self.weights))

    def _move_outputs(self, gone: Replica) -> None:
        """Ask others for the rest of what another machine's replica had, if one serves; else when one does."""
        if not any(replica.serves for replica in self.replicas):
            return
        for output in self._outputs_of(gone):
            replica = self.replicas.choose(*output.prompt(), None)
            gone.requests -= 1
            replica.requests += 1
            output.replica = replica
            self._ask_for(output)

    def _outputs_of(self, replica: Replica) -> list[Output]:
        return [output for output in self.outputs.values() if output.replica is replica]

    def _scheduler_down(self, m: PeerDown, replica: Replica) -> None:
        """All wait for the next scheduler, but those that it died of, and those that were to end."""
        replica.up = False
        down = f"the scheduler is down: {m.reason}"
        self._stats(replace(NO_STATS, down=down, dp_rank=replica.number), replica)
        for rid in self.suspects.guilty(m):
            output, front = self._forget(rid), self.orders.withdraw(rid)
            if output is not None or front:
                error = EngineDown(SCHEDULER_DIED, code="scheduler_crashed")
                self._refuse(rid, 1, front if output is None else output.front, error)
        for output in [output for output in self._outputs_of(replica) if output.aborted]:
            self._end_aborted(output)
        if replica.remote:
            self._move_outputs(replica)
            for asked, reply in self.orders.gone(replica.number):
                self._answer(asked, reply)

    def _end_aborted(self, output: Output) -> None:
        self._drop(output.rid)
        output.abort()
        self._mark_changed(output)


def _is_begun(output: Output) -> bool:
    return output.begun
