"""The radix scheduler: the actor that owns every request's truth and tells the executors what to run.

Drain, decide, send: messages only change the Schedule; after each drained burst as many plans as may be in flight are
made and sent. Invariant: every Submit gets exactly one final message, a Tokens row with a finish or an Ended; sampler
parameters reach the samplers before the plan that needs them.
"""

import time
from array import array
from itertools import chain
from typing import Any, ClassVar, Final

import msgspec
import numpy as np
import trio

from ..errors import RequestError
from ..models.ledger import CHUNK
from .actor import Actor, Context
from .messages import (
    NO_STATS,
    Abort,
    Admit,
    Drain,
    Ended,
    ExecutorReady,
    Finish,
    PeerDown,
    PeerUp,
    Plan,
    SchedulerInbox,
    SlotParams,
    Started,
    Stats,
    StepOut,
    Submit,
    Tokens,
)
from .ref import Gone
from .request import Request
from .schedule import Schedule, Window

STATS_SECONDS: Final = 0.25
NOTHING: Final = memoryview(b"")
MIXED_CHUNK: Final = {"cpu": None, "cuda": 512}
"""Prompt tokens beside decode rows, unless --chunked-prefill-size is given.

The decode rows wait for the chunk: 512 tokens of a 7B model take an H100 about as long as a decode step of 128 rows, so
a stream's tokens come at most twice as far apart while others join. Beside them the rows' own GEMMs are nearly free
(Agrawal et al., "Sarathi-Serve", 2024).
"""
AUTO_WINDOW_MS: Final = {"cpu": 30.0, "cuda": 10.0}


def int32(values: list[int]) -> memoryview:
    """Return a message's array of int32."""
    return memoryview(array("i", values).tobytes()) if values else NOTHING


def tokens_of(m: StepOut) -> Tokens:
    """Return the step's rows for the text actor; copies, since the lane's memory is reused after the handler."""

    def copy(array: memoryview) -> memoryview:
        return memoryview(bytes(array))

    return Tokens(
        rids=copy(m.rids),
        ids=copy(m.ids),
        finish=copy(m.finish),
        logprobs=copy(m.logprobs),
        top_n=m.top_n,
        top_ids=copy(m.top_ids),
        top_logprobs=copy(m.top_logprobs),
    )


class Scheduler(Actor):
    """See the module's text. Until the executor has reported its capacity, requests wait in `early`."""

    inbox_type: ClassVar[Any] = SchedulerInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.schedule: Schedule | None = None
        self.early: list[Request] = []
        self.executors = sorted(name for name in context.peers() if name.startswith("exec."))
        self.samplers = sorted(name for name in context.peers() if name.startswith("sampler."))
        self.executor_up = False
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
            case Abort():
                self._abort(message.rid)
            case ExecutorReady():
                self._executor_ready(message)
            case PeerDown():
                self._peer_down(message)
            case PeerUp():
                self.sent_stats = None  # an executor says itself when it is ready, a text actor wants to know
            case Drain():
                pass  # the fronts send nothing new

    def flush(self) -> None:
        """Plan and send until enough windows are in flight."""
        while self.executor_up and self.schedule is not None:
            window = self.schedule.plan()
            if window is None:
                return
            try:
                self._send(window)
            except Gone:
                return  # PeerDown follows and requeues what this window held

    # ------------------------------------------------------------------ requests

    def _submit(self, m: Submit) -> None:
        ids = array("i")
        ids.frombytes(m.ids)
        assert m.params.max_new_tokens is not None, "the text actor resolves it"
        request = Request(
            rid=m.rid,
            tokens=ids,
            prompt_length=len(ids),
            params=m.params,
            namespace=m.cache_salt,
            priority=m.priority,
            arrival_ns=m.arrival_ns,
            limit=len(ids) + m.params.max_new_tokens,
        )
        if self.schedule is None:
            self.early.append(request)
        else:
            self._add(self.schedule, request)

    def _add(self, schedule: Schedule, request: Request) -> None:
        try:
            schedule.add(request)
        except RequestError as e:
            self._to_text(Ended(request.rid, e.status, e.code, e.message, e.param))

    def _abort(self, rid: int) -> None:
        known = self.schedule is not None and self.schedule.abort(rid)
        if not known:
            before = len(self.early)
            self.early = [r for r in self.early if r.rid != rid]
            known = len(self.early) < before
        if known:
            self._to_text(Ended(rid, 0, "aborted", "aborted"))

    def _to_text(self, message: Tokens | Started | Ended | Stats) -> None:
        try:
            self.context.ref("text").post(message)
        except Gone:
            return  # its requests are dropped when PeerDown arrives

    # ------------------------------------------------------------------ peers

    def _executor_ready(self, m: ExecutorReady) -> None:
        if self.schedule is None:
            config = self.context.config
            chunk, mixed = config.chunked_prefill_size, None
            if chunk is None:
                chunk, mixed = CHUNK[m.device], MIXED_CHUNK[m.device]
            window_ms = AUTO_WINDOW_MS[m.device] if config.window_ms is None else config.window_ms
            self.schedule = Schedule(config, m.num_pages, m.max_slots, chunk, window_ms, mixed)
            for request in self.early:
                self._add(self.schedule, request)
            self.early = []
        self.executor_up = True
        self._send_stats()

    def _peer_down(self, m: PeerDown) -> None:
        if m.name in self.executors:
            self.executor_up = False
            self._send_stats()
            for request in self.schedule.executor_lost() if self.schedule is not None else []:
                text = "the executor died twice while it ran this request; it is not tried again"
                self._to_text(Ended(request.rid, 503, "executor_crashed", text))
        elif m.name == "text":
            self.early = []
            if self.schedule is not None:
                for rid in list(self.schedule.requests):
                    self.schedule.abort(rid)

    # ------------------------------------------------------------------ results

    def _step_out(self, m: StepOut) -> None:
        schedule = self.schedule
        if schedule is None or not schedule.in_flight or schedule.in_flight[0].number != m.window:
            return  # from before an executor's death
        has_chunks = m.step == 0 and bool(schedule.in_flight[0].chunks)
        rids, finish = m.rids.cast("q").tolist(), np.frombuffer(m.finish, dtype=np.uint8)
        if rids:
            self._to_text(tokens_of(m))
        for request in schedule.report(m.window, m.step, rids, m.ids.cast("i").tolist(), finish):
            self._complete_without_token(request)
        if rids and not has_chunks:
            schedule.step_took(m.step_ns / 1000)

    def _complete_without_token(self, request: Request) -> None:
        """max_new_tokens 0: the final row has the token id -1."""
        rid = memoryview(array("q", [request.rid]).tobytes())
        finish = memoryview(bytes([Finish.LENGTH]))
        self._to_text(Tokens(rid, int32([-1]), finish, NOTHING, 0, NOTHING, NOTHING))

    # ------------------------------------------------------------------ plans

    def _send(self, window: Window) -> None:
        now = time.monotonic_ns()
        for seat in window.admits:
            request = seat.request
            if request.admissions == 1:
                self._to_text(Started(request.rid, seat.cached, max(0, now - request.arrival_ns)))
            params = self._slot_params(window.number, request)
            for name in self.samplers:
                self.context.ref(name).post(params)
        plan = self._plan(window)
        for name in self.executors:
            self.context.ref(name).post(plan)

    def _slot_params(self, number: int, request: Request) -> SlotParams:
        looks_at_tokens = request.params.has_penalty
        prompt, output = request.tokens[: request.prompt_length], request.tokens[request.prompt_length :]
        return SlotParams(
            window=number,
            slot=request.slot,
            params=request.params,
            prompt_ids=memoryview(prompt.tobytes()) if looks_at_tokens else NOTHING,
            output_ids=memoryview(output.tobytes()) if looks_at_tokens else NOTHING,
            prompt_length=request.prompt_length,
            output_length=request.generated,
        )

    def _plan(self, w: Window) -> Plan:
        admits = [Admit(a.request.slot, a.request.rid, int32(a.pages), a.cached, a.request.limit) for a in w.admits]
        ids = array("i", chain.from_iterable(c.request.tokens[c.start : c.end] for c in w.chunks))
        return Plan(
            window=w.number,
            k=w.k,
            release=int32(w.release),
            copies=int32(list(chain.from_iterable(w.copies))),
            admits=admits,
            grow_slots=int32(w.grow_slots),
            grow_pages=int32(w.grow_pages),
            chunk_slots=int32([c.request.slot for c in w.chunks]),
            chunk_lengths=int32([c.end - c.start for c in w.chunks]),
            chunk_last=int32([int(c.draws) for c in w.chunks]),
            chunk_ids=memoryview(ids.tobytes()),
        )

    # ------------------------------------------------------------------ statistics

    async def _publish_stats(self) -> None:
        while True:
            self._send_stats()
            await trio.sleep(STATS_SECONDS)

    def _send_stats(self) -> None:
        stats = self.statistics()
        if stats != self.sent_stats:
            self.sent_stats = stats
            self._to_text(stats)

    def statistics(self) -> Stats:
        """Return the present state and the totals."""
        s = self.schedule
        if s is None:
            return msgspec.structs.replace(NO_STATS, waiting=len(self.early))
        c = s.counters
        return Stats(
            waiting=len(s.waiting),
            running=s.slots.size - len(s.slots.free),
            pages_total=s.pool.num_pages,
            pages_free=s.pool.num_free,
            pages_tree=s.tree.num_pages,
            pages_running=s.pages_running,
            prompt_tokens=c.prompt_tokens,
            cached_tokens=c.cached_tokens,
            prefilled_tokens=c.prefilled_tokens,
            generated_tokens=c.generated_tokens,
            retractions=c.retractions,
            windows=c.windows,
            steps=c.steps,
            step_us=s.step_us,
            executor_up=self.executor_up,
        )
