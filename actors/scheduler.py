"""The radix scheduler: the actor that owns every request's truth and tells the executors what to run.

Drain, decide, send: messages only change the Schedule; after each drained burst as many plans as may be in flight are
made and sent. Invariant: every Submit gets exactly one final message, a Tokens row with a finish or an Ended; sampler
parameters reach the samplers before the plan that needs them.
"""

import contextlib
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any, ClassVar, Final

import numpy as np
import trio
from msgspec.structs import replace

from ..errors import ActorserveError, RequestError
from .actor import Actor, Context
from .desk import MAX_DEATHS, Suspects
from .errands import Errands
from .grammar_store import GrammarStore
from .guided import GuidedRequests
from .image_store import ImageStore
from .messages import (
    NO_STATS,
    Abort,
    AskTimelines,
    Carried,
    Compile,
    Compiled,
    CompileFailed,
    Discard,
    Done,
    Drain,
    DropImage,
    Ended,
    ExecutorReady,
    Fence,
    GrammarSpec,
    ImagePixels,
    Instruct,
    Look,
    Masks,
    Match,
    MatchFailed,
    Order,
    PeerDown,
    PeerUp,
    Pooled,
    PromptLogprobs,
    Refused,
    SamplerMessage,
    SchedulerInbox,
    Seen,
    Started,
    Stats,
    StepOut,
    Submit,
    Timelines,
    Tokens,
    Translated,
    Unmatch,
    Unpin,
)
from .ref import Gone
from .request import Request, request_of
from .schedule import Schedule, schedule_for
from .score_rows import columns_of, computed_logprobs, known_logprobs
from .stats import stats_of
from .timeline import TimelineStore
from .token_messages import closed_tokens, final_without_token, forced_tokens_of, pooled_of, tokens_of
from .topology import replica_of
from .view import seen
from .window import Window
from .window_messages import jumps_of, plan_of, slot_masks, slot_params

STATS_SECONDS: Final = 0.25
FSM: Final = "fsm"
EXECUTOR_DIED: Final = "the executor died twice of this request, as far as can be told; it is not tried again"
NO_ROOM: Final = "the executor died, and the next one has room for fewer tokens than this request has"
FSM_DIED: Final = f"the fsm actor died {MAX_DEATHS} times while it followed this request; it is not tried again"


class Scheduler(Actor):
    """See the module's text. Until the executor has reported its capacity, requests wait in `early`, and until its
    grammar is compiled one waits in `grammars`."""

    inbox_type: ClassVar[Any] = SchedulerInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.replica = replica_of(context.name)
        self.schedule: Schedule | None = None
        self.early: list[Request] = []
        self.grammars = GrammarStore()
        self.guided = GuidedRequests()
        self.images = ImageStore()
        self.executors = sorted(name for name in context.peers() if name.startswith("exec."))
        self.samplers = sorted(name for name in context.peers() if name.startswith("sampler."))
        self.executor_up = False
        self.lost: dict[str, str] = {}
        """Peers that died and are not back, and why they died."""
        self.suspects = Suspects()
        """Of the fsm actor's deaths; the schedule knows those of the executor's."""
        self.paused = False
        self.timelines = TimelineStore()
        self.errands = Errands(self._to_executors, self._to_text)
        self.idle_seconds = 0.0
        """Since the last step of an executor that has work, our own loop's hangs not counted."""
        self.sent_stats: Stats | None = None

    async def start(self) -> None:
        """Begin to publish Stats."""
        self.context.nursery.start_soon(self._publish_stats)

    def receive(self, message: Any, source: str) -> None:
        """Take one message in; see messages.SchedulerInbox."""
        match message:
            case StepOut():
                self._step_out(message)
            case Submit():
                self._submit(message)
            case ImagePixels():
                self.images.came(message)
            case Abort():
                self._abort(message.rid)
            case Unpin():
                self._unpin(message)
            case Compiled() | Translated():
                for request in self.grammars.compiled(message):
                    self._add(request)
            case CompileFailed():
                self._compile_failed(message)
            case Masks():
                self._masks(message)
            case MatchFailed():
                self._match_failed(message)
            case ExecutorReady():
                self._executor_ready(message)
            case PeerDown():
                self._peer_down(message)
            case PeerUp(name=name):
                self.lost.pop(name, None)
                self.sent_stats = None  # an executor says itself when it is ready, a text actor wants to know
                self._send_stats()
                if name == FSM:
                    self.guided.lost()
                    for entry in self.grammars.unsent():
                        self._to_fsm(Compile(entry.handle, entry.spec))
            case Order():
                self._order(message)
            case Look():
                self._to_text(seen(self.context, message, self.schedule, self.statistics(), self.paused))
            case Carried():
                self._carried(message)
            case AskTimelines():
                self._to_text(self.timelines.answer(message))
            case Fence():
                with contextlib.suppress(Gone):
                    self.context.ref(source).post(message)
            case Drain():
                pass  # the fronts send nothing new

    def flush(self) -> None:
        """Ask for the masks that are needed; plan and send until enough windows are in flight."""
        for due in self.guided.due():
            self._to_fsm(due)
        if self.errands.holds:
            self._swap_weights()
            return
        while self.executor_up and self.schedule is not None and not self.paused:
            window = self.schedule.plan()
            if window is None:
                return
            try:
                self._send(window)
            except Gone:
                return  # PeerDown follows and requeues what this window held

    # ------------------------------------------------------------------ requests

    def _submit(self, m: Submit) -> None:
        request = request_of(m, self.context.model.pooling)
        if request.images:
            try:
                self.images.hold(request.images, self._living())
            except ActorserveError as e:
                self._to_text(Ended(request.rid, e.status, e.code, e.message))
                return
        self.timelines.queued(m, time.monotonic_ns())
        if m.grammar is None:
            self._add(request)
        else:
            self._constrain(request, m.grammar)

    def _living(self) -> Iterator[Request]:
        """All requests that have not ended."""
        queued = [] if self.schedule is None else self.schedule.requests.values()
        return chain(self.early, self.grammars.waiting_requests(), queued)

    def _constrain(self, request: Request, spec: GrammarSpec) -> None:
        """Queue the request when its grammar is there; meanwhile others go on."""
        if FSM not in self.context.peers():
            text = f"this server runs without a tokenizer: {spec.kind} needs one"
            self._to_text(Ended(request.rid, 400, "unsupported_value", text, spec.kind))
            return
        entry = self.grammars.ask(spec, request)
        if request.constraint is not None or request.guided is not None:
            self._add(request)
        elif entry is not None:
            self._to_fsm(Compile(entry.handle, entry.spec))
            self.grammars.trim([] if self.schedule is None else self.schedule.requests.values())

    def _compile_failed(self, m: CompileFailed) -> None:
        kind = self.grammars.kind(m.handle)
        for request in self.grammars.failed(m):
            self._to_text(Ended(request.rid, m.status, m.code, m.message, kind))

    def _masks(self, m: Masks) -> None:
        assert self.schedule is not None, "a request is followed once it is queued"
        for request in self.guided.came(m):
            self.schedule.mask_came(request)

    def _match_failed(self, m: MatchFailed) -> None:
        if self.schedule is not None and self.schedule.abort(m.rid):
            self._to_text(Ended(m.rid, m.status, m.code, m.message))

    def _add(self, request: Request) -> None:
        if self.schedule is None:
            self.early.append(request)
            return
        try:
            self.schedule.add(request)
        except RequestError as e:
            self._to_text(Ended(request.rid, e.status, e.code, e.message, e.param))
            return
        if request.guided is not None and self.schedule.requests.get(request.rid) is request:
            self.guided.add(request)

    def _abort(self, rid: int) -> None:
        known = self.schedule is not None and self.schedule.abort(rid)
        if not known:
            known, unwanted = self.grammars.abandon(rid)
            if unwanted is not None:
                self._to_fsm(Discard(unwanted))
        if not known:
            before = len(self.early)
            self.early = [r for r in self.early if r.rid != rid]
            known = len(self.early) < before
        if known:
            self._to_text(Ended(rid, 0, "aborted", "aborted"))

    def _unpin(self, m: Unpin) -> None:
        if self.schedule is not None:
            self.schedule.unpin(m.pins.cast("q").tolist())

    def _order(self, m: Order) -> None:
        """Carry out an order of a front."""
        schedule = self.schedule
        match m.action:
            case "flush_cache":
                if schedule is not None and not schedule.flush_cache():
                    text = f"the cache cannot be flushed while there are requests ({len(schedule.requests)})"
                    self._to_text(Refused(m.rid, 1, 400, "not_idle", text))
                    return
            case "start_profile" | "stop_profile" | "update_weights" | "update_weights_abort":
                if not self.executor_up:
                    self._to_text(Refused(m.rid, 1, 503, "engine_unavailable", "the executor is not up; try again"))
                else:
                    self.errands.order(m)
                return
            case "continue":
                self.paused = False
            case _:
                self.paused = True
                if m.action == "pause_abort":
                    self._abort_all()
                elif m.action == "pause_retract" and schedule is not None:
                    schedule.retract_all()
        self._to_text(Done(m.rid))

    def _carried(self, m: Carried) -> None:
        """What the executors did beside windows."""
        restoring = not self.executor_up
        wrong = self.errands.carried(m)
        if wrong is not None:
            self.lost[self.executors[0]] = f"the weights of the last update cannot be loaded again: {wrong}"
        elif restoring and self.errands.update is None:
            self.executor_up = True
        self._send_stats()

    def _swap_weights(self) -> None:
        """Use loaded weights, once no window is in flight; plans are made again in the same moment."""
        update, schedule = self.errands.update, self.schedule
        if update is None or not update.loaded or update.swapping or (schedule is not None and schedule.in_flight):
            return
        if update.abort:
            self._abort_all()
        if schedule is not None:
            schedule.forget_kv()
        self.errands.swap()

    def _to_executors(self, message: Instruct) -> None:
        for name in self.executors:
            try:
                self.context.ref(name).post(message)
            except Gone:
                return  # PeerDown follows

    def _abort_all(self) -> None:
        rids = [request.rid for request in self.early] + self.grammars.waiting_rids()
        for rid in rids + ([] if self.schedule is None else list(self.schedule.requests)):
            self._abort(rid)

    def _to_text(
        self, message: Tokens | PromptLogprobs | Pooled | Started | Ended | Stats | Done | Seen | Timelines | Refused
    ) -> None:
        if isinstance(message, Ended):
            self.timelines.ended(message.rid, time.monotonic_ns())
        try:
            self.context.ref("text").post(message)
        except Gone:
            return  # its requests are dropped when PeerDown arrives

    def _to_fsm(self, message: Compile | Discard | Match | Unmatch) -> None:
        try:
            self.context.ref(FSM).post(message)
        except Gone:
            return  # it is asked again when it is back

    # ------------------------------------------------------------------ peers

    def _executor_ready(self, m: ExecutorReady) -> None:
        if self.schedule is None:
            self.schedule = schedule_for(m, self.context.config, self.context.model.pooling, self.context.desk)
            early, self.early = self.early, []
            for request in early:
                self._add(request)
        else:
            for request in self.schedule.resize(m.num_pages):
                self._to_text(Ended(request.rid, 503, "executor_crashed", NO_ROOM))
        self.executor_up = not self.errands.restore(m.weights)
        self.images.token_bytes = m.image_token_bytes
        self._send_stats()

    def _peer_down(self, m: PeerDown) -> None:
        self.lost[m.name] = m.reason
        if m.name in self.executors:
            self.executor_up = False
            self.grammars.loaded.clear()
            self.timelines.executor_lost()
            self.errands.executor_lost()
            self.images.executor_lost()
        self._send_stats()
        if m.name in self.executors:
            for request in self.schedule.executor_lost(m.fault) if self.schedule is not None else []:
                self._to_text(Ended(request.rid, 503, "executor_crashed", EXECUTOR_DIED))
        elif m.name == FSM:
            for rid in self.suspects.guilty(m):
                if self.schedule is not None and self.schedule.abort(rid):
                    self._to_text(Ended(rid, 503, "fsm_crashed", FSM_DIED))
        elif m.name == "text":
            self.early = []
            self.images.fresh.clear()
            for handle in self.grammars.abandon_all():
                self._to_fsm(Discard(handle))
            if self.schedule is not None:
                self.schedule.abort_all()
                self.schedule.tree.pins.clear()

    # ------------------------------------------------------------------ results

    def _step_out(self, m: StepOut) -> None:
        schedule = self.schedule
        if schedule is None or not schedule.in_flight or schedule.in_flight[0].number != m.window:
            return  # from before an executor's death
        self.idle_seconds = 0.0
        window = schedule.in_flight[0]
        has_chunks = m.step == 0 and bool(window.chunks or window.jumps)
        rids, finish = m.rids.cast("q").tolist(), np.frombuffer(m.finish, dtype=np.uint8)
        scores = None if m.scores is None else columns_of(m.scores)
        complete = schedule.report(m.window, m.step, rids, m.ids.cast("i").tolist(), finish, scores)
        ended = np.flatnonzero(finish).tolist() if m.window >= schedule.since else ()
        self.timelines.stepped(m.window, m.step, rids, ended, time.monotonic_ns())
        for item in schedule.scored:
            assert m.scores is not None
            self._to_text(computed_logprobs(item, m.scores))
        if schedule.landed:
            self._to_text(forced_tokens_of(schedule.landed, m.scores))
        if rids and m.window >= schedule.since:
            self._to_text(tokens_of(m, schedule.complete))
        for closed in schedule.closed:
            self.timelines.ended(closed.request.rid, time.monotonic_ns())
            for told in closed_tokens(closed):
                self._to_text(told)
        schedule.closed.clear()
        if m.pooled is not None:
            vectors = pooled_of(m.pooled, {request.rid for request in complete})
            if vectors is not None:
                self._to_text(vectors)
        for request in complete:
            self.timelines.ended(request.rid, time.monotonic_ns())
            if not request.pooled:
                self._to_text(final_without_token(request))
        if rids and not has_chunks:
            schedule.step_took(m.step_ns / 1000)

    # ------------------------------------------------------------------ plans

    def _send(self, window: Window) -> None:
        now = time.monotonic_ns()
        assert self.schedule is not None
        seats = self.schedule.slots.requests
        self.timelines.planned(window, (request for slot in window.rows if (request := seats[slot]) is not None), now)
        for request, cached in ((seat.request, seat.cached) for seat in window.admits):
            if request.admissions == 1:
                of_prompt = min(cached, request.prompt_length)
                self._to_text(Started(request.rid, of_prompt, max(0, now - request.arrival_ns), request.opening))
            for told in known_logprobs(request):
                self._to_text(told)
        changes = self._sampler_changes(window)
        for name in self.samplers:
            for message in changes:
                self.context.ref(name).post(message)
        plan = plan_of(window, len(changes))
        images = self._images_for(window)
        for name in self.executors:
            for image in images:
                self.context.ref(name).post(image)
            self.context.ref(name).post(plan)

    def _images_for(self, window: Window) -> list[ImagePixels | DropImage]:
        assert self.schedule is not None
        admitted = [(seat.request, seat.cached) for seat in window.admits if seat.request.images]
        return self.images.load(admitted, self.schedule.slots.running()) if admitted else []

    def _sampler_changes(self, window: Window) -> list[SamplerMessage]:
        """What the samplers must know before the window, in this order."""
        assert self.schedule is not None
        slots = self.schedule.slots
        admitted = [seat.request for seat in window.admits]
        changes: list[SamplerMessage] = []
        if any(request.constraint is not None for request in admitted):
            changes += self.grammars.load(window.number, admitted, slots.running(), slots.size)
        changes += [slot_params(window.number, request) for request in admitted]
        if window.jumps:
            changes.append(jumps_of(window))
        if window.once:
            changes.append(slot_masks(window, slots.requests))
        return changes

    # ------------------------------------------------------------------ statistics

    async def _publish_stats(self) -> None:
        while True:
            self._send_stats()
            await trio.sleep(STATS_SECONDS)
            self._watch_steps()

    def _watch_steps(self) -> None:
        """An executor whose device hangs takes its plans and computes none of them."""
        limit = self.context.config.hang_seconds
        works = self.executor_up and self.schedule is not None and bool(self.schedule.in_flight)
        self.idle_seconds = self.idle_seconds + STATS_SECONDS if works else 0.0
        if self.idle_seconds > limit:
            self.idle_seconds = 0.0
            for name in self.executors:
                self.context.accuse(name, f"{name} computed no step for {limit:g} s")

    def _send_stats(self) -> None:
        stats = self.statistics()
        if stats != self.sent_stats:
            self.sent_stats = stats
            self._to_text(stats)

    def statistics(self) -> Stats:
        """Return the present state and the totals."""
        s = self.schedule
        if s is None:
            waiting = len(self.early) + self.grammars.waiting
            return replace(NO_STATS, waiting=waiting, down=self.down(), dp_rank=self.replica, paused=self.paused)
        down, weights = self.down(), self.errands.weights
        return stats_of(s, self.grammars, self.executor_up, down, weights, self.replica, self.paused)

    def down(self) -> str:
        """Return what is not up, for people; empty if everything is."""
        if self.lost:
            name, reason = next(iter(self.lost.items()))
            return f"{name} is down: {reason}"
        return "" if self.executor_up else "the executor is starting"
