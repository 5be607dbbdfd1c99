"""Two hundred thousand steps of the scheduler, its page pool and its radix tree, each checked: the same as the state
machine in test_schedule.py, which finds short examples, but drawn by a plain generator, at many times the speed.

A step is one of: a request comes, is aborted, is retracted, is poisoned; pages are evicted; a window is planned, with
chunks, jumps and k steps; a step's results come; the executor dies; the cache is emptied.
"""

import collections
import random

import numpy as np
import pytest
from simulated_executor import SimulatedExecutor
from simulated_grammars import grammar_of
from test_schedule import Engine, prompt_of

from actorserve.actors.messages import Finish
from actorserve.actors.request import Stage
from actorserve.sampler.params import SamplingParams

WORLD_STEPS = 400
"""Then another world, of other sizes."""
GRAMMARS = [grammar_of(i) for i in range(4)]
STEMS = [prompt_of(i, 50) for i in range(3)]


class Walk:
    """One world."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        pick = rng.choice
        self.e = Engine(
            pages=pick([8, 12, 40]), slots=pick([1, 3, 8]), chunk=pick([0, 16, 40]), mixed=pick([None, 16]),
            num_continuous_decode_steps=pick([1, 2, 5]), plans_in_flight=pick([1, 2, 3]),
            schedule_policy=pick(["lpm", "fcfs", "dfs-weight", "random"]), disable_radix_cache=rng.random() < 0.1,
            schedule_conservativeness=0.3, disable_jump_forward=rng.random() < 0.3,
            eviction_policy=pick(["lru", "lfu"]),
        )  # fmt: skip
        self.actions = [
            (self.add, 3), (self.plan, 6), (self.report, 12), (self.abort, 1), (self.retract, 0.7), (self.evict, 0.7),
            (self.poison, 0.3), (self.die, 0.15), (self.flush, 0.1),
        ]  # fmt: skip
        self.done: collections.Counter[str] = collections.Counter()

    def step(self) -> None:
        actions, weights = zip(*self.actions, strict=True)
        (action,) = self.rng.choices(actions, weights)
        self.done[action.__name__] += 1
        action()
        self.e.schedule.check()

    def add(self) -> None:
        rng = self.rng
        if len(self.e.live) > 12:
            return
        grammar = rng.choice(GRAMMARS) if rng.random() < 0.4 else None
        stops = (50, 51, 52) if grammar is not None and rng.random() < 0.5 else ()
        prompt = STEMS[rng.randrange(3)][: rng.randrange(51)] + prompt_of(10 + rng.randrange(4), rng.randint(1, 20))
        params = SamplingParams(stop_token_ids=stops)
        self.e.add(prompt, rng.randint(1, 40), rng.choice(["", "x"]), grammar=grammar, params=params)

    def plan(self) -> None:
        self.e.plan()

    def report(self) -> None:
        self.e.report()

    def abort(self) -> None:
        if self.e.live:
            rid = self.rng.choice(sorted(self.e.live))
            assert self.e.schedule.abort(rid)
            assert not self.e.schedule.abort(rid), "it ends twice"
            self.e.live.discard(rid)

    def retract(self) -> None:
        if running := self.e.schedule.slots.running():
            self.e.schedule.retract(self.rng.choice(running))

    def evict(self) -> None:
        self.e.schedule.tree.evict(self.rng.randint(1, 10))
        self.e.schedule.kv.tree_state += 1

    def poison(self) -> None:
        """The next step's results have a row that is not a number."""
        if self.e.executor.out and (rids := self.e.executor.out[0][2]):
            row = self.rng.randrange(len(rids))
            finish = np.array(self.e.executor.out[0][4], dtype=np.uint8)
            finish[row] = Finish.POISON
            self.e.executor.out[0] = (*self.e.executor.out[0][:4], finish, self.e.executor.out[0][5])
            self.e.live.discard(rids[row])  # what it says is not compared

    def die(self) -> None:
        self.e.executor = SimulatedExecutor(self.e.schedule.pool.num_pages)
        for request in self.e.schedule.executor_lost():
            self.e.live.discard(request.rid)

    def flush(self) -> None:
        assert self.e.schedule.flush_cache() == (not self.e.schedule.requests)

    def settle(self) -> None:
        """Everything ends, once, and all pages are back."""
        self.e.drain()
        assert all(request.stage is Stage.ENDED for request in self.e.requests.values())
        self.e.schedule.tree.clear()
        assert self.e.schedule.pool.num_free == self.e.schedule.pool.num_pages


@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(4))
def test_many_steps(part: int, thorough: bool) -> None:
    """A quarter of them: the parts run on several cores."""
    steps = (1_000_000 if thorough else 200_000) // 4
    done: collections.Counter[str] = collections.Counter()
    first = part * steps
    for seed in range(first, first + steps // WORLD_STEPS):
        walk = Walk(random.Random(seed))
        at = 0
        try:
            for at in range(WORLD_STEPS):  # noqa: B007
                walk.step()
            walk.settle()
        except Exception as error:
            error.add_note(f"world {seed}, step {at}")
            raise
        done += walk.done
    print(f"\n{steps} steps in {steps // WORLD_STEPS} worlds:", dict(done))
    assert min(done.values()) > steps // 1000
