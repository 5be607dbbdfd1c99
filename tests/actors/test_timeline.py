"""Timelines as the scheduler keeps them: the real scheduler on the stub executor, and the store's bounds."""

import numpy as np
from msgspec.structs import replace
from simulated_executor import VOCAB
from stub_world import StubWorld

from actorserve.actors import timeline
from actorserve.actors.messages import NOTHING, AskTimelines, Submit
from actorserve.actors.timeline import TimelineStore
from actorserve.sampler.params import SamplingParams


def ask(world: StubWorld, seed: int, length: int = 30, new: int = 20):
    prompt = np.random.default_rng(seed).integers(1, VOCAB, length).tolist()
    one = world.ask(prompt, SamplingParams(seed=seed, max_new_tokens=new, ignore_eos=True))
    return one


def timeline_of(world: StubWorld, one):
    store = world.scheduler.timelines
    (found,) = (t for t in store if t.rid == one.submit.rid)
    return found


def test_a_life_in_order() -> None:
    world = StubWorld(pages=64, num_continuous_decode_steps=4, chunked_prefill_size=16)
    ones = [ask(world, seed) for seed in range(3)]
    world.settle()
    for one in ones:
        t = timeline_of(world, one)
        stages = [t.queued_ns, t.admitted_ns, t.prefill_start_ns, t.prefill_end_ns, t.first_token_ns, t.ended_ns]
        assert all(stages) and stages == sorted(stages)
        assert t.prompt_tokens == 30 and t.retractions == 0
        numbers = [w.number for w in t.windows]
        assert numbers == sorted(set(numbers)) and t.count == len(numbers)
        assert all(w.done_ns >= w.planned_ns for w in t.windows)
        decoded = sum(w.k for w in t.windows if w.planned_ns >= t.prefill_end_ns)
        assert 0 < decoded <= 24
        assert any(w.prompt_tokens for w in t.windows) and max(w.rows for w in t.windows) == 3
    world.close()


def test_retractions_and_deaths_are_seen() -> None:
    world = StubWorld(pages=12, slots=4, schedule_conservativeness=0.0, num_continuous_decode_steps=2)
    ones = [ask(world, seed, 40, 60) for seed in range(4)]
    for _ in range(25):
        world.turn()
    world.kill_executor()
    world.settle()
    found = [timeline_of(world, one) for one in ones]
    assert sum(t.retractions for t in found) >= 1 and all(t.ended_ns for t in found)
    assert all(t.first_token_ns <= t.ended_ns for t in found)
    assert not world.scheduler.timelines._windows and not world.scheduler.timelines._ending
    world.close()


def test_aborted_and_refused_ones_end() -> None:
    world = StubWorld(pages=8)
    one, too_long = ask(world, 1, 30, 90), ask(world, 2, 600)
    for _ in range(5):
        world.turn()
    world.abort(one)
    world.settle()
    assert timeline_of(world, one).ended_ns and timeline_of(world, too_long).ended_ns
    assert not timeline_of(world, too_long).admitted_ns
    world.close()


def submit(rid: int, name: str, tenant: str = "", arrival: int = 1) -> Submit:
    params = SamplingParams(max_new_tokens=1)
    return replace(Submit(rid, NOTHING, params), name=name, tenant=tenant, arrival_ns=arrival)


def rids(store: TimelineStore, name: str, tenant: str | None = None) -> list[int]:
    return [view.rid for view in store.answer(AskTimelines(9, name, tenant)).timelines]


def test_who_finds_what() -> None:
    store = TimelineStore()
    for rid, name, tenant, arrival in ((1, "a", "x", 5), (2, "a", "x", 5), (3, "a", "y", 6), (4, "b", "x", 7)):
        store.queued(submit(rid, name, tenant, arrival), 10)
    assert rids(store, "a", "x") == [1, 2] and rids(store, "a", "y") == [3]
    assert rids(store, "a") == [3], "the name's last use"
    assert rids(store, "b", "y") == rids(store, "") == []


def test_memory_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(timeline, "MOST", 3)
    store = TimelineStore()
    for rid in range(10):
        store.queued(submit(rid, f"r{rid % 5}", arrival=rid), 10)
        store.queued(submit(rid, f"r{rid % 5}", arrival=rid), 11)  # asked again by a new text actor
    assert [t.rid for t in store] == [7, 8, 9] and len(store._named) == 3
    assert rids(store, "r4") == [9] and rids(store, "r1") == []
