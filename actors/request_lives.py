"""The requests, slots and pages of a Schedule: how requests come, are queued again, and end. schedule.py says which."""

from collections import deque
from collections.abc import Callable
from typing import Final

from ..config import EngineConfig
from ..errors import RequestError
from .desk import Desk
from .fair_share import FairShare
from .kv_pages import KVPages
from .new_token_ratio import NewTokenRatio
from .queue_order import make_order
from .request import Request, Stage
from .slot_table import SlotTable
from .window import Closed, Counters, Landed, Scored, Window

MAX_CRASHES: Final = 2


class RequestLives:
    """State of a Schedule; its module's text has the invariants."""

    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        max_slots: int,
        chunk_tokens: int,
        window_ms: float,
        mixed_tokens: Callable[[int], int] | None = None,
        reuses: bool = True,
        desk: Desk | None = None,
    ) -> None:
        """`chunk_tokens`: prompt tokens in one forward, decode rows included; <= 0: prompts run whole.

        `window_ms`: see EngineConfig; 0 is no limit. `mixed_tokens`: prompt tokens in a forward with so many decode
        rows, if that is fewer and not more than CROWD tokens wait. `reuses`: KV of one prompt may serve another.
        `desk`: where it notes whom it works on, for the case that it raises.
        """
        self.config = config
        self.window_ms = window_ms
        self.page = config.page_size
        self.chunk_tokens = chunk_tokens
        self.mixed_tokens = mixed_tokens
        self.kv = KVPages(config, num_pages, reuses)
        self.pool, self.tree = self.kv.pool, self.kv.tree
        self.slots = SlotTable(max_slots, jumps=not config.disable_jump_forward)
        self.desk = desk or Desk()
        self.requests: dict[int, Request] = {}
        self.waiting: dict[int, Request] = {}
        self.prefilling: dict[int, Request] = {}
        self.suspects: set[int] = set()
        """Ids of requests that were at work when an executor died, and of which no token has come since."""
        self.order = make_order(
            config.schedule_policy, config.random_seed, self.kv.matched, lambda r: self.kv.match(r).node
        )
        self.fair = FairShare()
        self.ratio = NewTokenRatio(config.schedule_conservativeness)
        self.counters = Counters()
        self.in_flight: deque[Window] = deque()
        self.next_window = 0
        self.step_us = 0.0
        self.landed: list[Landed] = []
        """Forced tokens that came with the last report, before the tokens that it brought."""
        self.scored: list[Scored] = []
        """Tokens of prompts whose logprobs came with the last report."""
        self.complete: list[int] = []
        """Rows of the last report with whose token the output matches its grammar."""
        self.closed: list[Closed] = []
        """Requests that ended without a draw and nobody was told of yet; who tells empties it."""
        self.since = 0
        """The first window that can be of the present requests; those before were of others, maybe of the same ids."""
        self._last_k = 1
        self._release: list[int] = []

    # ------------------------------------------------------------------ requests come and go

    def add(self, request: Request) -> None:
        """Queue a new request. One that is here already is not queued again: its text actor may ask for it, and then
        hear that there was another scheduler before, and ask again.

        Raises:
            RequestError: its prompt can never fit.
        """
        if request.rid in self.requests:
            return
        capacity = self.pool.num_pages * self.page
        if request.prompt_length >= capacity:
            raise RequestError(
                f"the prompt has {request.prompt_length} tokens, but the KV pool holds {capacity}",
                param="prompt",
                code="context_length_exceeded",
            )
        request.limit = min(request.limit, capacity)
        self.requests[request.rid] = request
        self.waiting[request.rid] = request

    def mask_came(self, request: Request) -> None:
        """Its next token can be drawn: in the next window, if it is decoding."""
        if request.stage is Stage.DECODE:
            self.slots.decoding[request.slot] = True

    def abort(self, rid: int) -> bool:
        """End a request now, wherever it is. False if it is not known (any more)."""
        request = self.requests.get(rid)
        if request is not None:
            self._end(request, keep=True)
        return request is not None

    def unpin(self, pins: list[int]) -> None:
        """Nobody comes back to what these hold, nor to what requests under these numbers will leave."""
        gone = set(pins)
        for request in self.requests.values():
            if request.pin in gone:
                request.pin = 0
        for pin in gone:
            self.tree.pins.release(pin)

    def abort_all(self) -> None:
        """End all requests, whose ids may come again: nothing that windows in flight bring is anybody's."""
        for rid in list(self.requests):
            self.abort(rid)
        self.since = self.next_window

    def flush_cache(self) -> bool:
        """Empty the prefix cache; False, and nothing happens, while there are requests."""
        if self.requests:
            return False
        self.kv.clear()
        return True

    def retract_all(self) -> None:
        """Take the pages of all running requests; they go on from their tokens when plans are made again."""
        for request in self.slots.running():
            self.retract(request)

    def forget_kv(self) -> None:
        """All KV is of weights that are used no more: everything is computed again. With no window in flight."""
        assert not self.in_flight
        self.retract_all()
        self.kv.clear()

    def executor_lost(self, fault: bool = True) -> list[Request]:
        """Forget all KV: it died with the executor. Running requests go back to the queue with their tokens.

        One of those that were at work may be the cause, so they are suspects until a token of them comes, and run one
        at a time until then (`_admissible`). Returns those of which the executor died MAX_CRASHES times while no other
        suspect was at work: they are ended. Not `fault`: it was killed from outside, and nobody is suspected.
        """
        guilty = []
        begun = self.in_flight[0].number if self.in_flight and fault else -1
        at_work = [r for r in self.slots.running() if r.window <= begun]
        causes = [r for r in at_work if r.rid in self.suspects] or at_work
        self.suspects.update(r.rid for r in at_work)
        if len(causes) == 1:
            causes[0].crashes += 1
        for request in self.slots.running():
            self.kv.drop(request)
            self._unseat(request)
            if request.crashes >= MAX_CRASHES:
                request.stage = Stage.ENDED
                del self.requests[request.rid]
                self.suspects.discard(request.rid)
                guilty.append(request)
            else:
                self._requeue(request)
        self.in_flight.clear()
        self._release.clear()
        self.kv.clear()
        return guilty

    def resize(self, num_pages: int) -> list[Request]:
        """Another executor has come, with so many pages: what is free at its start is not the same each time.

        Returns the requests that have more tokens than it has room for: they are ended.
        """
        if num_pages == self.pool.num_pages:
            return []
        self.pool.resize(num_pages)
        capacity = num_pages * self.page
        for request in self.requests.values():
            request.limit = min(request.limit, capacity)
        too_long = [request for request in self.requests.values() if len(request.tokens) >= capacity]
        for request in too_long:
            self._end(request, keep=False)
        return too_long

    def retract(self, request: Request) -> None:
        """Take a running request's slot and pages back and queue it again, ahead of the others."""
        self.kv.keep(request)
        self._leave_slot(request)
        running = self.slots.running()
        allowed = sum(r.limit - r.prompt_length for r in running)
        self.ratio.retracted(sum(r.generated for r in running), allowed, len(running))
        self.counters.retractions += 1
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        request.stage = Stage.WAITING
        request.target = request.planned = request.confirmed = 0
        request.blocked_until = self.next_window - 1
        self.waiting = {request.rid: request, **self.waiting}

    def _leave_slot(self, request: Request) -> None:
        self._release.append(request.slot)
        self._unseat(request)

    def _unseat(self, request: Request) -> None:
        self.fair.charge(request)
        self.slots.give_back(request.slot)
        request.slot = -1
        self.prefilling.pop(request.rid, None)

    def _end(self, request: Request, keep: bool) -> None:
        self.desk.now(request.rid)
        if request.stage is Stage.WAITING:
            del self.waiting[request.rid]
        else:
            if keep:
                self.kv.keep(request, request.pin)
            else:
                self.kv.drop(request)
            self._leave_slot(request)
        request.stage = Stage.ENDED
        del self.requests[request.rid]
        self.suspects.discard(request.rid)

    # ------------------------------------------------------------------ accounting

    @property
    def pages_running(self) -> int:
        """Pages that running requests own."""
        return sum(sum(r.owned) for r in self.slots.running())

    def check(self) -> None:
        """Assert the page invariant and the tree's own."""
        owned = [p for r in self.slots.running() for p, own in zip(r.pages, r.owned, strict=True) if own]
        assert len(owned) == len(set(owned)), "a page has two owners"
        total = self.pool.num_free + self.tree.num_pages + len(owned)
        assert total == self.pool.num_pages, (self.pool.num_free, self.tree.num_pages, len(owned), self.pool.num_pages)
        self.tree.check()
