"""The scheduler's decisions, without actors, lanes or clocks: requests in, windows out, results in.

Used by the scheduler actor; driven directly by tests. It owns the pages (kv_pages.py), the waiting queue and the
slots. Invariants: every page is free, the tree's or a running request's; windows are executed in order, so a page
released in window w may be reused by window w itself; pages enter the tree only when the executor reported their
tokens; a request's tokens are appended only here.

While windows are in flight a request's KV is tracked by an upper bound, its slot's `horizon`: it grows by k a window
whatever the results say, so a window can be planned before the results of the last one are known.
"""

from typing import Final

import numpy as np

from ..config import EngineConfig, Pooling
from ..kvstore.radix import Match
from ..models.ledger import CHUNK, mixed_chunk
from . import jumps
from .desk import Desk
from .messages import ExecutorReady, Finish
from .request import Request, Stage
from .request_lives import RequestLives
from .window import Closed, JumpChunk, Landed, PrefillChunk, Scored, Seat, Window

HELD_BACK_AT_MOST: Final = 128  # requests waiting for a sharer's prefix that one plan looks at
EXPECTED_NEW_TOKENS: Final = 4096  # admission does not expect more from one request (SGLang's clip)
AUTO_WINDOW_MS: Final = {"cpu": 30.0, "cuda": 10.0}
CROWD: Final = 4096  # waiting prompt tokens from which on throughput counts more than the pace of running streams


class Schedule(RequestLives):
    """Waiting requests, slots and pages of one executor group. See the module's text for the invariants."""

    # ------------------------------------------------------------------ results

    def report(
        self,
        window: int,
        step: int,
        rids: list[int],
        ids: list[int],
        finish: np.ndarray,
        scores: np.ndarray | None = None,
    ) -> list[Request]:
        """Take in one step's results: drawn tokens per request id, Finish values (uint8), and `scores` float32 [n,
        columns], the logprobs of the tokens that the window's chunks were to score (see PromptScores.values).

        Step 0 also means that the window's chunks have their KV: their whole pages enter the tree, so that requests
        with the same prefix can start. Returns requests that wanted no token and are now complete.
        """
        if window < self.since:
            rids, ids, finish = [], [], finish[:0]
        current = self.in_flight[0]
        assert current.number == window, "windows report in order"
        chunks = [c for c in current.chunks if c.admission == c.request.admissions] if step == 0 else []
        for chunk in chunks:
            if chunk.request.slot >= 0:
                chunk.request.confirmed = chunk.end
        self.landed, self.scored = [], []
        if step == 0:
            of_prompts = self._learn(current, scores)
            self._land(jumps.landed(chunks, current.jumps, of_prompts))
        followed = self._append(rids, ids, finish)
        self._end_finished(rids, finish)
        complete = [c.request for c in chunks if c.request.slot >= 0 and self._chunk_done(c)]
        for request in followed:
            if request.stage is Stage.DECODE:
                self._close(request)
        self.counters.generated_tokens += len(rids)
        self.counters.steps += 1
        self.ratio.decay()
        if step == current.k - 1:
            self.in_flight.popleft()
        return complete

    def _append(self, rids: list[int], ids: list[int], finish: np.ndarray) -> list[Request]:
        """Give the drawn tokens to their requests; returns those whose grammars followed theirs."""
        requests = self.requests
        self.complete = []
        suspects, desk = self.suspects, self.desk
        followed: list[Request] = []
        for row, (rid, token) in enumerate(zip(rids, ids, strict=True)):
            request = requests.get(rid)
            if request is None:
                continue
            request.tokens.append(token)
            if request.rid in suspects:
                suspects.discard(request.rid)
                request.crashes = 0
            if request.constraint is not None or request.guided is not None:  # no call: this is run for each token
                desk.now(rid)
                request.follow(token)
                followed.append(request)
                if request.matches_with(token, finish[row] == Finish.STOP):
                    self.complete.append(row)
        return followed

    def _end_finished(self, rids: list[int], finish: np.ndarray) -> None:
        for ended in np.flatnonzero(finish):
            request = self.requests.get(rids[ended])
            if request is not None:
                poisoned = finish[ended] == Finish.POISON
                self._end(request, keep=not poisoned)
                if poisoned:
                    self.counters.expelled_pages += self.kv.expel(request)

    def _close(self, request: Request) -> None:
        """End it without a draw if its grammar leaves nothing but the end."""
        found = jumps.closing(request, self.slots)
        if found is None:
            return
        forced, end = found
        self._end(request, keep=True)
        for token in (*forced, end):
            request.append(token)
        self.closed.append(Closed(request, forced, end))
        self.counters.jumps += bool(forced)
        self.counters.forced_tokens += len(forced)
        self.counters.generated_tokens += len(forced) + 1

    def _land(self, landed: list[Landed]) -> None:
        self.landed = [item for item in landed if self.requests.get(item.request.rid) is item.request]
        forced = sum(len(item.tokens) for item in self.landed)
        self.counters.jumps += len(self.landed)
        self.counters.forced_tokens += forced
        self.counters.generated_tokens += forced

    def _learn(self, window: Window, scores: np.ndarray | None) -> int:
        """Take in the logprobs of prompts' tokens; returns in how many rows they came."""
        row = 0
        for chunk in window.chunks:
            request = chunk.request
            if chunk.scored and chunk.admission == request.admissions and self.requests.get(request.rid) is request:
                assert request.scores is not None and scores is not None
                place = chunk.score_from + 1
                request.scores.learn(place, scores[row : row + chunk.scored])
                self.scored.append(Scored(request, place, chunk.scored, row))
            row += chunk.scored
        return row

    def step_took(self, step_us: float) -> None:
        """Learn the time of a decode step, from which k follows."""
        self.step_us = 0.9 * self.step_us + 0.1 * step_us if self.step_us else step_us

    def _chunk_done(self, chunk: PrefillChunk) -> bool:
        request = chunk.request
        whole = chunk.end // self.page
        if whole and self.tree.enabled:
            self.kv.insert(request, request.ids()[: whole * self.page])
        if chunk.end < request.target:
            return False
        self.prefilling.pop(request.rid, None)
        if not chunk.draws:
            self._end(request, keep=True)
        return not chunk.draws

    # ------------------------------------------------------------------ plans

    def plan(self) -> Window | None:
        """Return the next window to send, or None while enough are in flight or nothing is to be done."""
        if len(self.in_flight) >= self.config.plans_in_flight:
            return None
        rows = self.slots.decoding_rows()
        if self.in_flight and jumps.worth_waiting(rows, self.slots, self.step_us):
            return None  # what is in flight will tell
        rows = self._make_room(rows)
        window = Window(self.next_window, budget=self._chunk_budget(len(rows)))
        rows, landing = self._jump(window, rows)
        for request in self.prefilling.values():
            if request.planned < request.target and window.budget > 0:
                self._add_chunk(window, request)
        more_waits = self._admit(window, reserved=self._pages_needed(rows, 1))
        self.desk.rest()
        if not len(rows) and not window.chunks and not window.jumps:
            return None
        joined = [c.request.slot for c in window.chunks if c.draws]
        joining = np.array([*landing, *joined], dtype=np.int64)
        window.k = self._choose_k(rows, joining, more_waits)
        self._grow(window, rows, window.k)
        self._grow(window, joining, window.k - 1)
        drawing = np.concatenate([rows, joining])
        window.rows = drawing.tolist()
        once = drawing[self.slots.guided[drawing]]
        self.slots.decoding[once] = False  # until their next masks come
        window.once = once.tolist()
        window.release, self._release = self._release, []
        self.in_flight.append(window)
        self.next_window += 1
        self._last_k = window.k
        self.counters.windows += 1
        return window

    def _jump(self, window: Window, rows: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Plan the jumps of the window, and give them their pages; (the rows that go on step by step, those that jump)

        Every row keeps its next page obtainable.
        """
        landing: list[int] = []
        reserved = self._pages_needed(rows, 1)
        for slot in rows[self.slots.jumps[rows]].tolist():
            request = self.slots.requests[slot]
            assert request is not None
            plan = jumps.planned(request, self.slots, jumps.room_for(request, window))
            if plan is None:
                continue
            row, (tokens, state) = np.array([slot]), plan
            if self._pages_needed(row, len(tokens)) + reserved > self.kv.obtainable:
                continue
            window.jumps.append(JumpChunk(request, int(self.slots.horizon[slot]), tuple(tokens), state))
            window.budget -= len(tokens)
            self._grow(window, row, len(tokens))
            landing.append(slot)
        return (rows[~np.isin(rows, landing)] if landing else rows), landing

    def _chunk_budget(self, rows: int) -> int:
        if self.chunk_tokens <= 0:
            return self.config.max_prefill_tokens
        budget = self.chunk_tokens - rows
        if rows and self.mixed_tokens is not None and not self._crowded():
            budget = min(budget, self.mixed_tokens(rows))
        return max(budget, self.page)

    def _crowded(self) -> bool:
        """Whether so many prompt tokens wait that small chunks would only make them wait longer."""
        tokens = 0
        for request in self.waiting.values():
            tokens += len(request.tokens)
            if tokens > CROWD:
                return True
        return False

    def _add_chunk(self, window: Window, request: Request) -> None:
        start = request.planned
        end = request.target if self.chunk_tokens <= 0 else min(request.target, start + window.budget)
        window.budget -= end - start
        request.planned = end
        draws = end == request.target and request.wants_tokens
        rows = (0, 0) if request.scores is None else request.scores.rows(start, end)
        window.chunks.append(PrefillChunk(request, request.admissions, start, end, draws, *rows))
        self.counters.prefilled_tokens += end - start
        if draws:
            request.stage = Stage.DECODE
            self.slots.decoding[request.slot] = True

    def _choose_k(self, rows: np.ndarray, joining: np.ndarray, more_waits: bool) -> int:
        """1 while somebody waits for the next window, else growing up to what the time budget allows."""
        if more_waits or self.slots.guided.any() or any(r.planned < r.target for r in self.prefilling.values()):
            return 1
        k = self.config.num_continuous_decode_steps
        if self.window_ms:
            affordable = int(self.window_ms * 1000 / self.step_us) if self.step_us else 1
            k = max(1, min(k, 2 * self._last_k, affordable))
        drawing = np.concatenate([rows, joining])
        k = jumps.most_steps(k, drawing, self.slots, self.step_us, adaptive=bool(self.window_ms))
        left = (self.slots.cap - self.slots.horizon)[drawing]
        k = max(1, min(k, int(left.max(initial=0)) + (1 if len(joining) else 0)))
        while k > 1 and self._pages_needed(rows, k) + self._pages_needed(joining, k - 1) > self.kv.obtainable:
            k //= 2
        return k

    def _grow(self, window: Window, rows: np.ndarray, steps: int) -> None:
        """Advance the rows' horizon by some steps and give them the pages that it reaches."""
        if not len(rows) or not steps:
            return
        slots = self.slots
        short = slots.pages_short(rows, steps, self.page)
        slots.horizon[rows] = np.minimum(slots.horizon[rows] + steps, slots.cap[rows])
        slots.pages[rows] += short
        grown = np.repeat(rows, short).tolist()
        pages = self.kv.allocate(len(grown))
        for slot, page in zip(grown, pages, strict=True):
            request = slots.requests[slot]
            assert request is not None
            request.pages.append(page)
            request.owned.append(True)
        window.grow_slots += grown
        window.grow_pages += pages

    # ------------------------------------------------------------------ admission

    def _admit(self, window: Window, reserved: int) -> bool:
        """Seat waiting requests while budget, slots and pages (but `reserved`) last.

        Returns whether a request waits that the next window could take: then k stays 1.
        """
        if not self.waiting or not self.slots.free:
            return False
        candidates, most = self._admissible()
        held_back, others = 0, len(self.waiting) > len(candidates)
        for request in self.fair.arrange(self.order(candidates), self.slots.running()):
            if not most:
                return True
            self.desk.now(request.rid)
            if not self.slots.free:
                break
            if window.budget <= 0 or held_back >= HELD_BACK_AT_MOST:
                return True
            if self._barred(request) or self.kv.prefix_is_coming(request, self.prefilling.values()):
                held_back += 1
                continue
            if not self.config.disable_jump_forward:
                jumps.fold(request)
            match = self.kv.match(request)
            uncached = len(request.tokens) - match.length
            if self.chunk_tokens <= 0 and window.chunks and uncached > window.budget:
                return True
            while not (fits := self._fits(request, match, reserved)) and self.kv.give_up_pin(self.slots.empty):
                match = self.kv.match(request)
            if not fits:
                break
            self._seat(window, request, match)
            most -= 1
        return held_back > 0 or others

    def _admissible(self) -> tuple[list[Request], int]:
        """(the waiting requests that may be admitted, how many of them at most)

        Suspects come first, one at a time, and beside them are only such of which a token has come since they were
        admitted. So what crashes the executor is found in few deaths, and what is innocent is not taken for it.
        """
        waiting = list(self.waiting.values())
        if not self.suspects:
            return waiting, len(waiting)
        if any(len(r.tokens) <= r.target for r in self.slots.running()):
            return [], 0
        suspects = [r for r in waiting if r.rid in self.suspects and not self._barred(r)]
        return (suspects, 1) if suspects else (waiting, len(waiting))

    def _barred(self, request: Request) -> bool:
        """Whether it cannot be admitted yet: tokens of its last life may still come, or its mask has not come."""
        reported = self.in_flight[0].number - 1 if self.in_flight else self.next_window - 1
        return max(request.blocked_until, self.since - 1) > reported or request.waits_for_mask

    def _fits(self, request: Request, match: Match, reserved: int) -> bool:
        """Whether its prompt fits now, and what everybody is expected to generate fits as well."""
        need = -(-len(request.tokens) // self.page) - len(match.pages)
        self.tree.lock(match.node)  # what it reuses cannot be evicted for it
        room = self.kv.obtainable - reserved
        self.tree.unlock(match.node)
        if need > room or self.slots.empty:
            return need <= room
        expected = self.slots.remaining() + min(request.limit - len(request.tokens), EXPECTED_NEW_TOKENS)
        return need + self.ratio.value * expected / self.page <= room

    def _seat(self, window: Window, request: Request, match: Match) -> None:
        del self.waiting[request.rid]
        if request.scores is not None:
            request.scores.seat(self.tree, request.ids(), request.namespace)
        self.tree.lock(match.node)
        fresh = self.kv.allocate(-(-len(request.tokens) // self.page) - len(match.pages))
        source, tokens = self.kv.partial_page(window.number, self.slots.running(), request, match)
        if tokens:
            window.copies.append((source, fresh[0], tokens))
        cached = len(match.pages) * self.page + tokens
        request.node = match.node
        request.pages = match.pages.tolist() + fresh
        request.owned = [False] * len(match.pages) + [True] * len(fresh)
        request.target = len(request.tokens)
        request.planned = request.confirmed = cached
        request.stage = Stage.PREFILL
        if not request.admissions:
            request.charged = cached
            self.counters.prompt_tokens += request.prompt_length
            self.counters.cached_tokens += min(cached, request.prompt_length)
        request.admissions += 1
        request.window = window.number
        self.slots.take(request)
        self.prefilling[request.rid] = request
        window.admits.append(Seat(request, cached, list(request.pages)))
        self._add_chunk(window, request)

    # ------------------------------------------------------------------ retraction

    def _make_room(self, rows: np.ndarray) -> np.ndarray:
        """Retract requests until every decoding row can have its next page; return the rows that are left."""
        while self._pages_needed(rows, 1) > self.kv.obtainable:
            if self.tree.pins.drop():
                continue
            self.retract(self._retraction_victim())
            rows = self.slots.decoding_rows()
        return rows

    def _retraction_victim(self) -> Request:
        """Of the lowest priority, the one with the fewest generated tokens, then the longest prompt: the least lost."""
        return min(self.slots.running(), key=lambda r: (r.priority, r.generated, -r.prompt_length))

    # ------------------------------------------------------------------ pages

    def _pages_needed(self, rows: np.ndarray, steps: int) -> int:
        return int(self.slots.pages_short(rows, steps, self.page).sum()) if len(rows) else 0


def schedule_for(m: ExecutorReady, config: EngineConfig, pooling: Pooling | None, desk: Desk) -> Schedule:
    """Return a Schedule for an executor of this size; `pooling`: ModelInfo's."""
    chunk, mixed = config.chunked_prefill_size, None
    if chunk is None:
        chunk, mixed = CHUNK[m.device], mixed_chunk if m.device == "cuda" else None
    if pooling is not None and pooling.whole:
        chunk, mixed = 0, None
    window_ms = AUTO_WINDOW_MS[m.device] if config.window_ms is None else config.window_ms
    reuses = pooling is None or pooling.reuses
    return Schedule(config, m.num_pages, m.max_slots, chunk, window_ms, mixed, reuses, desk)
