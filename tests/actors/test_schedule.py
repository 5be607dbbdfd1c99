"""The scheduler's decisions against a simulated executor whose KV pages hold real content."""

from array import array

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from simulated_executor import EOS, PAGE, VOCAB, SimulatedExecutor, expected
from simulated_grammars import grammar_of

from actorserve.actors.constraint import Constraint, Grammar
from actorserve.actors.queue_order import depth_first_weight
from actorserve.actors.request import Request, Stage
from actorserve.actors.schedule import Schedule
from actorserve.config import EngineConfig
from actorserve.errors import RequestError
from actorserve.kvstore import pins
from actorserve.sampler.params import SamplingParams
from examples import examples

FEW = 6
"""Decode rows beside which chunks of prompts are of the smaller size."""


class Engine:
    """A Schedule, a simulated executor, and what every request must produce."""

    def __init__(
        self, *, pages: int = 64, slots: int = 8, chunk: int = 64, mixed: int | None = None, **config: object
    ) -> None:
        self.config = EngineConfig(**{"window_ms": 0.0, **config})  # type: ignore[arg-type]
        beside = None if mixed is None else lambda rows: mixed if rows <= FEW else 2 * mixed
        self.schedule = Schedule(self.config, pages, slots, chunk, self.config.window_ms or 0.0, beside)
        self.executor = SimulatedExecutor(pages)
        self.requests: dict[int, Request] = {}
        self.live: set[int] = set()

    def add(
        self, prompt: list[int], max_new: int = 8, namespace: str = "", priority: int = 0,
        grammar: Grammar | None = None, params: SamplingParams | None = None, tenant: str = "", pin: int = 0,
    ) -> Request:  # fmt: skip
        rid = len(self.requests) + 1
        r = Request(
            rid=rid, tokens=array("i", prompt), prompt_length=len(prompt), params=params or SamplingParams(),
            namespace=namespace, priority=priority, arrival_ns=0, limit=len(prompt) + max_new,
            constraint=None if grammar is None else Constraint(grammar), tenant=tenant, pin=pin,
        )  # fmt: skip
        self.schedule.add(r)
        self.requests[rid] = r
        self.live.add(rid)
        return r

    def plan(self) -> bool:
        window = self.schedule.plan()
        if window is not None:
            self.executor.run(window)
        return window is not None

    def report(self) -> bool:
        if not self.executor.out:
            return False
        self.schedule.report(*self.executor.out.popleft())
        for rid in list(self.live):
            r = self.requests[rid]
            if r.stage is Stage.ENDED:
                self.live.discard(rid)
                prompt, most = r.tokens[: r.prompt_length].tolist(), r.limit - r.prompt_length
                grammar = None if r.constraint is None else r.constraint.grammar
                assert r.tokens.tolist() == expected(prompt, most, grammar, r.params.stop_token_ids)
        return True

    def interrupt(self, what: str, request: Request) -> None:
        """Retract it, let the executor die, or abort it."""
        if what == "retract":
            self.schedule.retract(request)
        elif what == "die":
            self.executor = SimulatedExecutor(self.schedule.pool.num_pages)
            self.schedule.executor_lost()
        else:
            self.schedule.abort(request.rid)
            self.live.clear()
        self.schedule.check()

    def drain(self) -> None:
        for _ in range(100_000):
            planned = self.plan()
            if not self.report() and not planned:
                break
            self.schedule.check()
        assert not self.live, "requests are stuck"
        assert self.schedule.pages_running == 0


def prompt_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB, n).tolist()


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("chunk", [16, 64, 0])
@pytest.mark.parametrize("cache_off", [False, True])
def test_every_request_gets_its_tokens(k: int, chunk: int, cache_off: bool) -> None:
    e = Engine(chunk=chunk, num_continuous_decode_steps=k, disable_radix_cache=cache_off)
    shared = prompt_of(0, 70)
    for i in range(20):
        e.add(shared[: 10 + 5 * i] + prompt_of(i, 3 + i), max_new=1 + 3 * i)
    e.drain()


@pytest.mark.parametrize("policy", ["lpm", "fcfs", "dfs-weight", "random"])
def test_policies_serve_everybody(policy: str) -> None:
    e = Engine(schedule_policy=policy, slots=3)
    for i in range(12):
        e.add(prompt_of(i % 3, 40) + prompt_of(100 + i, 5), namespace="ab"[i % 2])
    e.drain()


def test_lpm_takes_the_longest_cached_prefix_first() -> None:
    e = Engine(slots=1)
    e.add(prompt_of(1, 64))
    e.drain()
    cold, warm = e.add(prompt_of(2, 64)), e.add(prompt_of(1, 60) + prompt_of(3, 4))
    window = e.schedule.plan()
    assert window is not None and [s.request for s in window.admits] == [warm] and cold.stage is Stage.WAITING


def test_dfs_weight_runs_the_heavier_branch_together() -> None:
    e = Engine(slots=4, pages=128)
    e.add(prompt_of(1, 64), max_new=1)
    e.drain()
    e.add(prompt_of(2, 64), max_new=1)
    e.drain()
    e2 = [e.add(prompt_of(n, 64) + prompt_of(10 + i, 8)) for i, n in enumerate([1, 2, 2, 1, 2])]
    order = depth_first_weight(lambda r: e.schedule.kv.match(r).node)(e2)
    assert [e2.index(r) for r in order] == [1, 2, 4, 0, 3]


def test_tenants_take_turns_whatever_they_have_queued() -> None:
    """The lone request of one tenant does not wait for the forty of another, under every policy."""
    for policy in ("fcfs", "lpm", "dfs-weight", "random"):
        engine = Engine(slots=2, schedule_policy=policy)
        many = [engine.add([5 + i, 6, 7, 8] * 4, tenant="many") for i in range(40)]
        while sum(r.stage is Stage.ENDED for r in many) < 10:
            engine.plan()
            engine.report()
        one = engine.add([90, 91, 92, 93], tenant="one")
        while one.stage is not Stage.ENDED:
            engine.plan()
            engine.report()
        assert sum(r.stage is Stage.ENDED for r in many) < 18, policy
        engine.drain()
        served = engine.schedule.fair.served
        assert served["many"] > served["one"] > 0


@pytest.mark.parametrize("policy", ["lpm", "fcfs", "dfs-weight", "random"])
def test_priority_goes_first(policy: str) -> None:
    e = Engine(slots=1, schedule_policy=policy)
    low, high = [e.add(prompt_of(i, 20)) for i in range(9)], e.add(prompt_of(9, 20), priority=5)
    window = e.schedule.plan()
    assert window is not None and window.admits[0].request is high
    assert all(r.stage is Stage.WAITING for r in low)


@pytest.mark.parametrize("k", [1, 4])
def test_all_may_be_retracted_at_any_time(k: int) -> None:
    """Also amid windows in flight and half a prompt; each request still gets its tokens."""
    e = Engine(chunk=16, slots=4, num_continuous_decode_steps=k)
    for i in range(8):
        e.add(prompt_of(i, 20 + 7 * i), max_new=6 + i)
    for turn in range(12):
        e.plan()
        if turn % 3 == 2:
            e.schedule.retract_all()
            assert not e.schedule.slots.running() and e.schedule.pages_running == 0
        e.report()
        e.schedule.check()
    e.drain()


def test_the_cache_is_flushed_only_when_idle() -> None:
    e = Engine()
    e.add(prompt_of(1, 64))
    assert not e.schedule.flush_cache()
    e.drain()
    assert e.schedule.tree.num_pages > 0
    assert e.schedule.flush_cache()
    assert (e.schedule.tree.num_pages, e.schedule.pool.num_free) == (0, e.schedule.pool.num_pages)
    e.schedule.check()
    again = e.add(prompt_of(1, 64))
    window = e.schedule.plan()
    assert window is not None and [(s.request, s.cached) for s in window.admits] == [(again, 0)]


@pytest.mark.parametrize(("rows", "expected"), [(1, [32] * 6 + [8]), (FEW, [32] * 6 + [8]), (FEW + 6, [64] * 3 + [8])])
def test_prompts_come_in_smaller_chunks_while_others_decode(rows: int, expected: list[int]) -> None:
    e = Engine(pages=256, slots=16, chunk=512, mixed=32)
    for number in range(rows):
        e.add(prompt_of(10 + number, 20), max_new=40)
    first = e.schedule.plan()
    assert first is not None and [c.end - c.start for c in first.chunks] == [20] * rows
    e.executor.run(first)
    e.add(prompt_of(2, 200))
    sizes = []
    while (window := e.schedule.plan()) is not None:
        e.executor.run(window)
        sizes += [c.end - c.start for c in window.chunks]
        while e.report():
            pass
    assert sizes == expected
    assert not e.live


def test_sharers_wait_for_the_first_to_compute_the_prefix() -> None:
    e = Engine(pages=256, slots=64, chunk=2048)
    shared = prompt_of(0, 1000)
    for i in range(64):
        e.add([*shared, 2 * i + 1, 2, 3], max_new=20)
    e.drain()
    unique = 1000 + 64 * 3
    assert e.schedule.counters.prefilled_tokens <= 1.05 * unique


def test_next_turn_prefills_only_the_new_text() -> None:
    e = Engine()
    first = e.add(prompt_of(1, 37), max_new=9)
    e.drain()
    before = e.schedule.counters.prefilled_tokens
    new_text = prompt_of(2, 5)
    e.add(first.tokens.tolist() + new_text)
    e.drain()
    # The KV of the last generated token was never computed: it is part of the new prefill.
    assert e.schedule.counters.prefilled_tokens - before == len(new_text) + 1


def test_namespaces_share_nothing() -> None:
    e = Engine()
    e.add(prompt_of(1, 64), namespace="a")
    e.drain()
    e.add(prompt_of(1, 64), namespace="b")
    e.drain()
    assert e.schedule.counters.cached_tokens == 0


def test_retraction_changes_no_token() -> None:
    e = Engine(pages=12, slots=8, schedule_conservativeness=0.0, num_continuous_decode_steps=4)
    for i in range(8):
        e.add(prompt_of(i, 14), max_new=60)
    e.drain()
    assert e.schedule.counters.retractions > 0


def test_a_retracted_request_waits_for_the_tokens_still_under_way() -> None:
    e = Engine(num_continuous_decode_steps=2)
    r = e.add(prompt_of(5, 20), max_new=30)
    assert e.plan()
    e.schedule.retract(r)
    assert not e.plan(), "its window is not reported"
    e.drain()
    assert e.schedule.counters.retractions == 1


def test_a_request_as_large_as_the_pool_completes() -> None:
    e = Engine(pages=8, slots=4)
    big = e.add(prompt_of(3, 100), max_new=1000)
    e.add(prompt_of(4, 100), max_new=1000)
    assert big.limit == 128
    e.drain()


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    e = Engine(pages=4)
    with pytest.raises(RequestError) as caught:
        e.add(prompt_of(1, 64))
    assert caught.value.code == "context_length_exceeded"


def test_no_new_tokens_only_fills_the_cache() -> None:
    e = Engine()
    r = e.add(prompt_of(1, 40), max_new=0)
    assert e.plan()
    e.executor.out[-1] = (*e.executor.out[-1][:2], [], [], np.empty(0, dtype=np.uint8))
    assert e.schedule.report(*e.executor.out.popleft()) == [r]
    assert r.stage is Stage.ENDED and e.schedule.tree.match_length(r.ids()) == 40


def test_k_grows_when_nobody_waits_and_is_one_when_somebody_does() -> None:
    e = Engine(slots=4, window_ms=1e9, plans_in_flight=1)
    e.schedule.step_took(1000.0)
    e.add(prompt_of(1, 20), max_new=100)
    ks = []
    while len(ks) < 6:
        window = e.schedule.plan()
        assert window is not None
        ks.append(window.k)
        e.executor.run(window)
        while e.report():
            pass
    assert ks == [2, 4, 8, 16, 16, 16]
    e.add(prompt_of(2, 200), max_new=100)
    window = e.schedule.plan()
    assert window is not None and window.k == 1


def test_k_stays_in_its_time_budget() -> None:
    e = Engine(window_ms=30.0)
    e.schedule.step_took(10_000.0)
    e.schedule._last_k = 16
    e.add(prompt_of(1, 20), max_new=100)
    window = e.schedule.plan()
    assert window is not None and window.k == 3


def test_poisoned_pages_do_not_enter_the_tree() -> None:
    e = Engine()
    r = e.add(prompt_of(1, 40))
    assert e.plan()
    number, step, rids, ids, *_ = e.executor.out.popleft()
    e.schedule.report(number, step, rids, ids, np.array([3], dtype=np.uint8))
    assert r.stage is Stage.ENDED and e.schedule.tree.num_pages == 0
    e.schedule.check()


def test_a_request_that_was_running_in_two_crashes_is_given_up() -> None:
    e = Engine()
    r = e.add(prompt_of(1, 20))
    for guilty in ([], [r]):
        assert e.plan()
        e.executor = SimulatedExecutor(64)
        assert e.schedule.executor_lost() == guilty
        e.schedule.check()
    assert r.stage is Stage.ENDED


def flood(e: Engine, requests: int = 6) -> None:
    """Let others use all pages, one after another."""
    for i in range(requests):
        e.add(prompt_of(100 + i, 15 * PAGE // 2), max_new=4)
        e.drain()


@pytest.mark.parametrize("pin", [0, 7])
def test_what_is_pinned_is_there_when_its_owner_comes_back(pin: int) -> None:
    e = Engine(pages=16)
    first = e.add(prompt_of(1, 70), max_new=8, pin=pin)
    e.drain()
    flood(e)
    computed = len(first.tokens) - 1
    again = e.add([*first.tokens.tolist(), 5], max_new=8, pin=pin)
    assert e.schedule.kv.match(again).length == (computed if pin else 0)
    e.drain()
    assert len(e.schedule.tree.pins) == bool(pin), "the new one took the old one's place"
    flood(e)
    assert e.schedule.kv.match(e.add(again.tokens.tolist(), max_new=1)).length == (len(again.tokens) - 1 if pin else 0)
    e.drain()


@pytest.mark.parametrize("when", ["before it ends", "after"])
def test_what_is_unpinned_may_go(when: str) -> None:
    e = Engine(pages=12)
    first = e.add(prompt_of(1, 70), max_new=8, pin=7)
    e.plan()
    if when == "before it ends":
        e.schedule.unpin([7, 8])
    e.drain()
    e.schedule.unpin([7])
    assert not e.schedule.tree.pins
    flood(e)
    assert e.schedule.tree.match_length(first.ids()) == 0, "as without"


def test_pins_give_way_to_what_could_not_run_at_all() -> None:
    e = Engine(pages=12)
    for pin in (1, 2):
        e.add(prompt_of(pin, 40), max_new=4, pin=pin)
    e.drain()
    e.add(prompt_of(3, 8 * PAGE), max_new=4)
    e.drain()
    assert len(e.schedule.tree.pins) == 1, "the one used longest ago"
    assert e.schedule.tree.match_length(e.requests[2].ids()) >= 40
    e.add(prompt_of(4, 12 * PAGE - 8), max_new=8)
    e.drain()
    assert not e.schedule.tree.pins


def test_pins_are_waited_for_while_others_run_and_given_up_before_those_are_retracted() -> None:
    e = Engine(pages=12, schedule_conservativeness=0.0)
    e.add(prompt_of(1, 40), max_new=4, pin=1)
    e.drain()
    e.add(prompt_of(2, 5 * PAGE), max_new=PAGE)
    e.plan()
    late = e.add(prompt_of(3, 5 * PAGE), max_new=4)
    e.plan()
    assert late.stage is Stage.WAITING and len(e.schedule.tree.pins) == 1
    e.drain()
    assert len(e.schedule.tree.pins) == 1 and e.schedule.counters.retractions == 0
    e.add(prompt_of(4, 4 * PAGE), max_new=6 * PAGE)
    e.drain()
    assert not e.schedule.tree.pins and e.schedule.counters.retractions == 0


def test_pins_go_with_the_cache() -> None:
    e = Engine()
    for lose in (e.schedule.flush_cache, e.schedule.executor_lost):
        e.add(prompt_of(1, 70), max_new=8, pin=7)
        e.drain()
        assert len(e.schedule.tree.pins) == 1 and e.schedule.tree.pins.pages() == e.schedule.tree.num_pages
        lose()
        assert not e.schedule.tree.pins and not e.schedule.tree.num_pages


def test_pins_are_not_without_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "MOST_PINS", 3)
    e = Engine()
    for pin in range(1, 6):
        e.add(prompt_of(pin, 20), max_new=1, pin=pin)
        e.drain()
    assert list(e.schedule.tree.pins._nodes) == [3, 4, 5]


class Machine(RuleBasedStateMachine):
    """Requests come, are aborted, are retracted, the executor dies; windows are planned and reported in any order."""

    @initialize(
        pages=st.sampled_from([8, 12, 40]),
        slots=st.sampled_from([1, 3, 8]),
        chunk=st.sampled_from([0, 16, 40]),
        mixed=st.sampled_from([None, 16]),
        k=st.sampled_from([1, 2, 5]),
        plans=st.sampled_from([1, 2, 3]),
        policy=st.sampled_from(["lpm", "fcfs", "dfs-weight", "random"]),
        off=st.booleans(),
        still=st.booleans(),
    )
    def start(
        self, pages: int, slots: int, chunk: int, mixed: int | None, k: int, plans: int, policy: str, off: bool,
        still: bool,
    ) -> None:  # fmt: skip
        self.e = Engine(
            pages=pages, slots=slots, chunk=chunk, mixed=mixed, num_continuous_decode_steps=k, plans_in_flight=plans,
            schedule_policy=policy, disable_radix_cache=off, schedule_conservativeness=0.3,
            disable_jump_forward=still,
        )  # fmt: skip

    @rule(
        stem=st.integers(0, 2), n=st.integers(0, 50), tail=st.integers(1, 20), seed=st.integers(0, 3),
        max_new=st.integers(1, 40), namespace=st.sampled_from(["", "x"]), grammar=st.integers(-1, 3),
        stops=st.sampled_from([(), (), (50, 51, 52)]), pin=st.integers(0, 3),
    )  # fmt: skip
    def add(
        self, stem: int, n: int, tail: int, seed: int, max_new: int, namespace: str, grammar: int,
        stops: tuple[int, ...], pin: int,
    ) -> None:  # fmt: skip
        made = None if grammar < 0 else grammar_of(grammar)
        params = SamplingParams(stop_token_ids=stops) if made else None
        prompt = prompt_of(stem, n) + prompt_of(10 + seed, tail)
        self.e.add(prompt, max_new, namespace, grammar=made, params=params, pin=pin)

    @rule(pin=st.integers(1, 3))
    def unpin(self, pin: int) -> None:
        self.e.schedule.unpin([pin])

    @rule(pick=st.integers(0, 10))
    def continue_a_finished_one(self, pick: int) -> None:
        done = [r for r in self.e.requests.values() if r.stage is Stage.ENDED and len(r.tokens) < 90]
        if done:
            self.e.add([*done[pick % len(done)].tokens.tolist(), 1 + pick], 10)

    @rule()
    def plan(self) -> None:
        self.e.plan()

    @rule(n=st.integers(1, 4))
    def report(self, n: int) -> None:
        for _ in range(n):
            self.e.report()

    @rule(pick=st.integers(0, 10))
    def abort(self, pick: int) -> None:
        live = sorted(self.e.live)
        if live:
            rid = live[pick % len(live)]
            assert self.e.schedule.abort(rid)
            self.e.live.discard(rid)

    @rule(pick=st.integers(0, 10))
    def retract(self, pick: int) -> None:
        running = self.e.schedule.slots.running()
        if running:
            self.e.schedule.retract(running[pick % len(running)])

    @rule()
    def executor_dies(self) -> None:
        self.e.executor = SimulatedExecutor(self.e.schedule.pool.num_pages)
        for r in self.e.schedule.executor_lost():
            self.e.live.discard(r.rid)

    @invariant()
    def accounts(self) -> None:
        if hasattr(self, "e"):
            self.e.schedule.check()

    def teardown(self) -> None:
        if hasattr(self, "e"):
            self.e.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=examples(250, 80), stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), st.integers(1, 20))
def test_expected_stops_at_eos_or_length(prompt: list[int], n: int) -> None:
    out = expected(prompt, n)
    assert out[: len(prompt)] == prompt and (out[-1] == EOS or len(out) == len(prompt) + n)
    assert EngineConfig().page_size == PAGE
