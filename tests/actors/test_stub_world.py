"""The scheduler actor and the stub executor through their messages: anything may happen between any two of them."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from msgspec.structs import replace
from simulated_executor import VOCAB
from stub_world import StubWorld

from actorserve.actors.messages import Finish, Order
from actorserve.sampler.params import SamplingParams


def prompt_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB, n).tolist()


def params_of(seed: int, max_new: int = 40, **more: object) -> SamplingParams:
    return SamplingParams(seed=seed, max_new_tokens=max_new, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kill", ["kill_executor", "kill_scheduler", "kill_text"])
@pytest.mark.parametrize("turns", [1, 7])
def test_a_death_changes_no_token(kill: str, turns: int) -> None:
    world = StubWorld(pages=40, num_continuous_decode_steps=4)
    ones = [world.ask(prompt_of(i % 2, 30 + 5 * i), params_of(i), grammar=i if i % 3 == 2 else -1) for i in range(9)]
    for _ in range(4):
        for _ in range(turns):
            world.turn()
        getattr(world, kill)(*([2] if kill == "kill_text" else []))
        world.check()
        for _ in range(30):
            world.turn()
    world.settle()
    assert all(one.end.startswith("finish") for one in ones), [one.end for one in ones]
    world.close()


def test_what_kills_the_executor_is_found_and_refused() -> None:
    """One of eight that run together does it as soon as it is computed; the others see a pause."""
    world = StubWorld(pages=80, slots=8)
    ones = [world.ask(prompt_of(i, 20), params_of(i)) for i in range(8)]
    deaths = 0
    while world.live():
        world.turn()
        schedule = world.schedule
        if schedule is None or not schedule.in_flight or deaths == 9:
            continue
        computed = [r.rid for r in schedule.slots.running() if r.window <= schedule.in_flight[0].number]
        if 5 in computed and schedule.requests[5].generated >= 10:
            deaths += 1
            world.kill_executor()
    assert deaths == 3 and ones[4].end == "executor_crashed"
    assert all(one.end.startswith("finish") for i, one in enumerate(ones) if i != 4), [one.end for one in ones]
    world.close()


@pytest.mark.parametrize("seed", range(12))
def test_only_the_guilty_are_refused(seed: int) -> None:
    """Requests come all the time; one or two kill the executor as soon as they have so many tokens; others kill it too,
    from outside."""
    rng = random.Random(seed)
    world = StubWorld(pages=60, slots=6, num_continuous_decode_steps=rng.choice([1, 4]), plans_in_flight=2)
    guilty = {rng.randrange(1, 25): rng.choice([0, 1, 10]) for _ in range(rng.choice([1, 2]))}
    deaths = 0
    while len(world.asked) < 24 or world.live():
        if len(world.asked) < 24 and rng.random() < 0.2:
            prompt, new = prompt_of(rng.randrange(4), rng.randint(5, 60)), rng.randint(12, 40)
            world.ask(prompt, params_of(seed, new, ignore_eos=True))
        world.turn()
        if rng.random() < 0.03:
            world.kill_executor(fault=False)
            world.scheduler.drain()
        schedule = world.schedule
        if schedule is not None and schedule.in_flight:
            computed = [r for r in schedule.slots.running() if r.window <= schedule.in_flight[0].number]
            if any(r.generated >= guilty.get(r.rid, 1000) for r in computed):
                deaths += 1
                world.kill_executor()
    refused = {rid for rid, one in world.asked.items() if one.end == "executor_crashed"}
    assert refused == set(guilty) and deaths <= 3 * len(guilty)
    assert all(one.end.startswith("finish") for rid, one in world.asked.items() if rid not in guilty)
    world.close()


def test_a_kill_from_outside_makes_no_suspects() -> None:
    world = StubWorld(pages=80, slots=8)
    ones = [world.ask(prompt_of(i, 20), params_of(i, 60, ignore_eos=True)) for i in range(8)]
    for _ in range(40):
        for _ in range(3):  # too few for one of them to get a token alone
            world.turn()
        world.kill_executor(fault=False)
        assert world.schedule is not None and not world.schedule.suspects
    world.settle()
    assert all(one.end.startswith("finish") for one in ones), [one.end for one in ones]
    world.close()


def test_poison_ends_one_and_its_pages_with_it() -> None:
    """Several chunks of it are in the tree when its first token is drawn; others share a part of them."""
    world = StubWorld(pages=60, slots=8, chunked_prefill_size=32)
    stem = prompt_of(1, 64)
    first = world.ask(stem + prompt_of(2, 20), params_of(1))
    world.settle()
    bad = world.ask(stem + prompt_of(3, 60), params_of(2))
    world.poison(bad)
    others = [world.ask(stem + prompt_of(4 + i, 20 * i), params_of(i, 60, ignore_eos=True)) for i in range(3)]
    world.settle()
    assert bad.end == "finish 3" and not bad.said
    assert all(one.end in ("finish 1", "finish 2") for one in (first, *others))
    schedule = world.schedule
    assert schedule is not None and schedule.counters.expelled_pages > 0
    asked = np.array(bad.submit.ids.cast("i"), dtype=np.int32)
    assert schedule.tree.match_length(asked) <= 64, "nothing behind the stem, which others computed again"
    again = world.ask(stem + prompt_of(3, 60), params_of(2))
    world.settle()
    assert again.end.startswith("finish") and again.end != "finish 3"
    schedule.tree.clear()
    assert schedule.pool.num_free == schedule.pool.num_pages
    world.close()


def test_an_executor_that_computes_no_step_is_accused() -> None:
    world = StubWorld(hang_seconds=1.0)
    accused: list[tuple[str, str]] = []
    world.contexts["sched"].accuser = lambda *what: accused.append(what)
    ones = [world.ask(prompt_of(i, 20), params_of(i, 200, ignore_eos=True)) for i in range(2)]
    for _ in range(10):
        world.turn()
        for _ in range(3):
            world.scheduler._watch_steps()
    assert world.live() == ones and not accused, "it computes"
    for _ in range(5):
        world.scheduler.drain()
        world.scheduler._watch_steps()
    assert accused == [("exec.0", "exec.0 computed no step for 1 s")]
    world.settle()
    for _ in range(9):
        world.scheduler._watch_steps()
    assert len(accused) == 1, "it has nothing to do"
    world.close()


def test_deaths_of_others_making_are_nobodys_fault() -> None:
    world = StubWorld(pages=80, slots=8)
    ones = [world.ask(prompt_of(i, 20), params_of(i, 200, ignore_eos=True)) for i in range(8)]
    for _ in range(12):
        for _ in range(40):
            world.turn()
        world.kill_executor()
    world.settle()
    assert all(one.end.startswith("finish") for one in ones), [one.end for one in ones]
    world.close()


@pytest.mark.parametrize("pages", [8, 60])
def test_the_next_executor_has_another_number_of_pages(pages: int) -> None:
    """Memory that is free at its start differs. What has no room there any more is told so; the rest goes on."""
    world = StubWorld(pages=40, slots=6)
    ones = [world.ask(prompt_of(i, 30), params_of(i, 60, ignore_eos=True)) for i in range(8)]
    long = world.ask(prompt_of(9, 200), params_of(9, 4, ignore_eos=True))
    for _ in range(8):
        world.turn()
    assert world.live() == [*ones, long] and any(one.said for one in ones)
    world.config = replace(world.config, max_total_tokens=16 * pages)
    world.kill_executor(fault=False)
    world.settle()
    assert all(one.end == "finish 2" for one in ones) and [len(one.said) for one in ones] == [60] * 8
    assert long.end == ("executor_crashed" if pages == 8 else "finish 2")
    assert world.schedule is not None and world.schedule.pool.num_pages == pages
    world.close()


@pytest.mark.parametrize("grammar", [-1, 2])
def test_a_request_that_comes_twice_runs_once(grammar: int) -> None:
    """A text actor that hears of a death late has asked the next scheduler before it knows that it is another one."""
    world = StubWorld(pages=40)
    one = world.ask(prompt_of(1, 40), params_of(1, 20), grammar=grammar)
    for _ in range(4):
        world.post(one.submit)
        world.turn()
    assert one.said
    world.post(one.submit)
    world.settle()
    assert one.end.startswith("finish")
    world.close()


@pytest.mark.parametrize("k", [1, 2])
def test_poison_before_a_jump_that_is_planned_already(k: int) -> None:
    """The jump is run all the same, for nobody; its pages are free."""
    world = StubWorld(8, 1, num_continuous_decode_steps=k, plans_in_flight=2)
    one = world.ask(prompt_of(10, 1), params_of(0, 3, logprobs=1), grammar=2)
    world.poison(one)
    world.settle()
    assert (one.end, one.said) == (f"finish {int(Finish.POISON)}", [])
    other = world.ask(prompt_of(11, 1), params_of(0, 3))
    world.settle()
    assert other.end.startswith("finish") and len(other.said) == 3
    world.check()
    world.close()


class Machine(RuleBasedStateMachine):
    """Requests come, leave, are retracted; pages are evicted; any actor dies."""

    @initialize(
        pages=st.sampled_from([8, 14, 40]),
        slots=st.sampled_from([1, 3, 8]),
        chunk=st.sampled_from([0, 16, 40]),
        k=st.sampled_from([1, 2, 5]),
        plans=st.sampled_from([1, 2, 3]),
        policy=st.sampled_from(["lpm", "fcfs", "dfs-weight"]),
        still=st.booleans(),
        off=st.booleans(),
    )
    def start(
        self, pages: int, slots: int, chunk: int, k: int, plans: int, policy: str, still: bool, off: bool
    ) -> None:
        self.world = StubWorld(
            pages, slots, chunked_prefill_size=chunk, num_continuous_decode_steps=k, plans_in_flight=plans,
            schedule_policy=policy, disable_jump_forward=still, disable_radix_cache=off, schedule_conservativeness=0.3,
        )  # fmt: skip

    @rule(
        stem=st.integers(0, 2), n=st.integers(0, 40), tail=st.integers(1, 20), seed=st.integers(0, 3),
        max_new=st.integers(0, 40), least=st.integers(0, 3), salt=st.sampled_from(["", "x"]),
        grammar=st.integers(-3, 3), stops=st.sampled_from([(), (50, 51, 52)]), logprobs=st.sampled_from([None, 1]),
    )  # fmt: skip
    def ask(
        self, stem: int, n: int, tail: int, seed: int, max_new: int, least: int, salt: str, grammar: int,
        stops: tuple[int, ...], logprobs: int | None,
    ) -> None:  # fmt: skip
        least = min(least, max_new) if grammar < 0 else 0
        params = params_of(seed, max_new, min_new_tokens=least, stop_token_ids=stops, logprobs=logprobs)
        self.world.ask(prompt_of(stem, n) + prompt_of(10 + seed, tail), params, salt, grammar)

    @rule(turns=st.integers(1, 12))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.world.turn()
            self.world.check()

    @rule()
    def plan(self) -> None:
        self.world.scheduler.drain()

    @rule(steps=st.integers(1, 6))
    def compute(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @rule(pick=st.integers(0, 10))
    def leave(self, pick: int) -> None:
        if live := self.world.live():
            self.world.abort(live[pick % len(live)])

    @rule(pick=st.integers(0, 10))
    def retract(self, pick: int) -> None:
        if (schedule := self.world.schedule) and (running := schedule.slots.running()):
            schedule.retract(running[pick % len(running)])

    @rule(pick=st.integers(0, 10))
    def poison(self, pick: int) -> None:
        if live := self.world.live():
            self.world.poison(live[pick % len(live)])

    @rule(pages=st.integers(1, 10))
    def evict(self, pages: int) -> None:
        if (schedule := self.world.schedule) is not None:
            schedule.tree.evict(pages)
            schedule.kv.tree_state += 1

    @rule(action=st.sampled_from(["flush_cache", "pause_retract"]))
    def order(self, action: str) -> None:
        self.world.post(Order(1 << 40, action))  # type: ignore[arg-type]
        self.world.post(Order(1 << 40, "continue"))

    @rule(who=st.sampled_from(["executor", "scheduler", "text"]), lose=st.integers(0, 3), fault=st.booleans())
    def die(self, who: str, lose: int, fault: bool) -> None:
        getattr(self.world, f"kill_{who}")(*{"text": [lose], "executor": [fault]}.get(who, []))

    @invariant()
    def accounts(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()
            self.world.close()


@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(8))
def test_anything_may_happen(part: int, thorough: bool) -> None:
    """An eighth of about 1,200 steps, with --thorough of 1,000,000: the parts run on several cores."""
    examples = 2500 if thorough else 3
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    machine = type(f"Machine{part}", (Machine,), {})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        seed(part)(machine) if thorough else machine,
        settings=settings(max_examples=examples, stateful_step_count=50, deadline=None, suppress_health_check=quiet),
    )
