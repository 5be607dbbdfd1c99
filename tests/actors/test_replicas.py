"""Several replicas as the text actor sees them: which one gets a request, and what is said to and by all of them."""

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from actorserve.actors.actor import Context, connect, disconnect
from actorserve.actors.messages import (
    NO_STATS,
    Abort,
    AskTimelines,
    Chunks,
    Done,
    Finish,
    FrontInbox,
    Generate,
    LaneView,
    Look,
    NodeView,
    Order,
    PeerDown,
    PeerUp,
    Refused,
    RequestView,
    SchedulerInbox,
    Seen,
    Stats,
    Submit,
    TextInbox,
    Timelines,
    TimelineView,
    TokenPrompt,
    Tokens,
    Unpin,
)
from actorserve.actors.orders import Orders
from actorserve.actors.router import REQUEST_TOKENS, Router
from actorserve.actors.text import Text
from actorserve.actors.totals import side_by_side, total, why_down
from actorserve.config import EngineConfig, ModelInfo
from actorserve.sampler.params import SamplingParams

MODEL = ModelInfo(name="m", path="/m", model_type="llama", vocab_size=9999, context_length=4096, eos_ids=(2,))
UP = replace(NO_STATS, executor_up=True, pages_total=10, generated_tokens=5)


def view(kind: str, values: list[int] | tuple[int, ...]) -> memoryview:
    return memoryview(array(kind, values)).cast("B")


# ------------------------------------------------------------------ the router


def router(method: Any = "cache_aware", replicas: int = 3) -> Router:
    return Router(EngineConfig(dp_size=replicas, load_balance_method=method))


def prompt(first: int, length: int = 512) -> np.ndarray:
    return np.arange(first, first + length, dtype=np.int32)


def test_turns_and_the_shortest_queue() -> None:
    turns = router("round_robin")
    assert [turns.choose(prompt(0), "", [9, 0, 5], range(3)) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [turns.choose(prompt(0), "", [0, 0, 0], [0, 2]) for _ in range(3)] == [2, 0, 2], "1 is down"
    shortest = router("shortest_queue")
    assert [shortest.choose(prompt(0), "", loads, range(3)) for loads in ([2, 1, 3], [1, 2, 0], [5, 5, 5])] == [1, 2, 0]
    assert shortest.choose(prompt(0), "", [0, 5, 9], [1, 2]) == 1


def test_a_prompt_follows_what_it_shares_until_that_is_too_busy() -> None:
    aware = router()
    chosen = aware.choose(prompt(0), "", [0, 0, 0], range(3))
    others = [number for number in range(3) if number != chosen]

    def again(crowd: int, length: int = 512, among: Any = range(3), salt: str = "") -> int:
        loads = [0, 0, 0]
        loads[chosen] = crowd
        return aware.choose(prompt(0, length), salt, loads, among)

    shared = 512 // REQUEST_TOKENS
    assert again(0) == again(shared - 1) == chosen
    assert again(0, 48) == chosen and again(1, 48) in others, "a short beginning is not worth a wait"
    assert again(0, among=others) in others
    # Whoever else was sent it has it too, and then the one with fewer requests is taken.
    busy = [9, 9, 9]
    busy[others[0]] = 8
    assert aware.choose(prompt(0), "", busy, range(3)) == others[0]
    aware.lost(chosen)
    assert again(1) == others[0], "its cache is empty, the other's is not"


def test_salts_share_nothing_and_ties_take_turns() -> None:
    aware = router()
    assert {aware.choose(prompt(0), str(salt), [0, 0, 0], range(3)) for salt in range(3)} == {0, 1, 2}
    assert len({aware.choose(prompt(0), "1", [0, 0, 0], range(3)) for _ in range(5)}) == 1


@given(
    st.sampled_from(["cache_aware", "round_robin", "shortest_queue"]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400), st.sets(st.integers(0, 2), min_size=1)), max_size=40),
)
def test_choices_are_repeatable_and_never_pile_up(method: Any, asked: list[tuple[int, int, set[int]]]) -> None:
    """With nobody leaving, no replica of those that may be chosen is ahead by more than what prompts share."""
    one, other = router(method), router(method)
    loads = [0, 0, 0]
    for first, length, among in asked:
        chosen = one.choose(prompt(first, length), "", loads, among)
        assert chosen == other.choose(prompt(first, length), "", loads, among)
        assert chosen in among
        if method != "round_robin":
            assert loads[chosen] <= min(loads[i] for i in among) + length / REQUEST_TOKENS
        loads[chosen] += 1


# ------------------------------------------------------------------ totals


def test_totals_of_replicas() -> None:
    one = replace(UP, waiting=1, running=2, step_us=100.0, weights="/w", prompt_tokens=7)
    other = replace(UP, waiting=3, running=1, step_us=300.0, weights="/w", prompt_tokens=4, dp_rank=1)
    idle = replace(UP, dp_rank=2)
    assert total([one]) is one
    both = total([one, other, idle])
    assert (both.waiting, both.running, both.prompt_tokens, both.pages_total) == (4, 3, 11, 30)
    assert (both.step_us, both.weights, both.executor_up, both.down, both.dp_rank) == (200.0, "/w", True, "", -1)
    assert not both.paused and total([one, replace(idle, paused=True)]).paused
    lost = replace(NO_STATS, down="exec.1.0 is down: killed", dp_rank=1)
    some = total([one, lost])
    assert some.executor_up and not some.down and why_down([one, lost]) == "replica 1: exec.1.0 is down: killed"
    none = total([replace(NO_STATS, down="gone"), lost])
    assert not none.executor_up and none.down == "replica 0: gone; replica 1: exec.1.0 is down: killed"
    assert why_down([one]) == "" and why_down([replace(lost, dp_rank=0)]) == lost.down


def test_views_side_by_side() -> None:
    lanes = [LaneView("text", "sched.0", True), LaneView("fsm", "sched.0", True)]
    request = RequestView(5, "decode", 1, 1, 0, 9)
    one = Seen(1, UP, lanes, [NodeView(0, -1, 0, 0, 0, 0), NodeView(3, 0, 16, 1, 0, 2)], 7, [request], False)
    other = replace(one, stats=replace(UP, dp_rank=1), lanes=lanes[:1], requests=[], paused=True)
    assert side_by_side([one]) is one
    both = side_by_side([one, other])
    assert both.lanes == lanes and both.requests == [request] and both.paused and both.tree_nodes == 14
    assert len({node.id for node in both.nodes}) == 4
    parents = {node.id: node.parent for node in both.nodes}
    roots = {number for number, parent in parents.items() if parent == -1}
    assert len(roots) == 2 and {parent for parent in parents.values() if parent != -1} == roots


# ------------------------------------------------------------------ orders


def test_an_order_is_answered_when_all_have() -> None:
    orders = Orders(2)
    assert orders.ask(Order(1, "flush_cache"), "front.0", [0, 1]) == Order(1, "flush_cache")
    assert orders.ask(Look(2, 101, 10), "front.1", [0, 1]) == Look(2, 50, 5), "together as much as was asked for"
    assert orders.answered(Done(1), 1) is None
    assert orders.unanswered(1) == [Look(2, 50, 5)] and len(orders.unanswered(0)) == 2
    assert orders.answered(Done(1), 1) is None, "a scheduler that was asked again may answer again"
    found = orders.answered(Done(1), 0)
    assert found is not None and (found[0].front, found[1]) == ("front.0", Done(1))
    assert orders.answered(Done(1), 0) is None, "nobody asks any more"
    assert orders.withdraw(2) == "front.1" and orders.withdraw(2) == "" and orders.unanswered(0) == []


def test_answers_together() -> None:
    def together(question: Any, *replies: Any) -> Any:
        orders = Orders(len(replies))
        orders.ask(question, "front.0", range(len(replies)))
        (*_, found) = [orders.answered(reply, number) for number, reply in enumerate(replies)]
        assert found is not None
        return found[1]

    assert together(Order(1, "stop_profile"), Done(1, "/a"), Done(1, "/b")) == Done(1, "/a, /b")
    assert together(Order(1, "pause"), Done(1), Done(1)) == Done(1)
    refused = Refused(1, 1, 400, "not_idle", "there are requests")
    assert together(Order(1, "flush_cache"), Done(1), refused) == replace(
        refused, message="replica 1: there are requests"
    )
    assert together(Order(1, "flush_cache"), refused) == refused
    one, other = (TimelineView(rid, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, []) for rid in (5, 6))
    assert together(AskTimelines(1, "x", None), Timelines(1, [one]), Timelines(1, [other])) == Timelines(
        1, [one, other]
    )


# ------------------------------------------------------------------ the text actor


class World:
    """A text actor without a tokenizer, a front and two schedulers; every message goes through the codec."""

    def __init__(self, **config: Any) -> None:
        settings = EngineConfig(skip_tokenizer_init=True, dp_size=2, **config)
        self.front = Context("front.0", settings, MODEL, FrontInbox, sends_to=["text"])
        self.names = ["sched.0", "sched.1"]
        self.scheds = [Context(name, settings, MODEL, SchedulerInbox, sends_to=["text"]) for name in self.names]
        # In another order: who is which replica is in the names.
        self.context = Context("text", settings, MODEL, TextInbox, sends_to=["front.0", *reversed(self.names)])
        self.text = Text(self.context)
        for peer in (self.front, *self.scheds):
            self.join(peer)
        self.say(*(replace(UP, dp_rank=i) for i in range(2)))

    def join(self, peer: Context) -> None:
        connect(peer, self.context, codec=True)
        connect(self.context, peer, codec=True)
        self.text.drain()

    def kill(self, number: int) -> None:
        disconnect(self.scheds[number], self.context)
        disconnect(self.context, self.scheds[number])
        self.context.inbox.put_system(PeerDown(self.names[number], 1, "test"))
        self.text.drain()

    def say(self, *stats: Stats) -> None:
        """From their schedulers."""
        for one in stats:
            self.scheds[one.dp_rank].ref("text").post(one)
        self.text.drain()

    def ask(self, rid: int, first: int = 0, n: int = 1, **more: Any) -> int:
        """Send a prompt; returns the replica that got it."""
        asked = TokenPrompt(view("i", prompt(first).tolist()))
        self.front.ref("text").post(Generate(rid, n, asked, SamplingParams(max_new_tokens=9, seed=1), **more))
        self.text.drain()
        got = [[m for m in self.got(number) if isinstance(m, Submit)] for number in range(2)]
        (chosen,) = [number for number in range(2) if got[number]]
        assert [m.rid for m in got[chosen]] == list(range(rid, rid + n))
        return chosen

    def end(self, rid: int, number: int) -> list[Any]:
        """Its one token, which is its last."""
        nothing = memoryview(b"")
        finish = memoryview(bytes([Finish.LENGTH]))
        self.scheds[number].ref("text").post(
            Tokens(view("q", [rid]), view("i", [7]), finish, nothing, 0, nothing, nothing)
        )
        self.text.drain()
        return received(self.front)

    def got(self, number: int) -> list[Any]:
        return received(self.scheds[number])

    def close(self) -> None:
        for context in (self.context, self.front, *self.scheds):
            context.close()


def received(context: Context) -> list[Any]:
    found = []
    while (item := context.inbox.poll()) is not None:
        if not isinstance(item[0], PeerUp):
            found.append(item[0])
    return found


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def test_requests_are_spread_and_counted(world: World) -> None:
    chosen = Counter(world.ask(rid, first=100 * rid) for rid in range(8))
    assert chosen == {0: 4, 1: 4}
    assert [replica.requests for replica in world.text.replicas] == [4, 4]
    received(world.front)
    several = world.ask(100, first=800, n=4)
    assert world.ask(200, first=300) != several, "four requests are more than none"
    (chunks,) = world.end(100, several)
    assert isinstance(chunks, Chunks) and chunks.chunks[0].dp_rank == several
    world.text.receive(Abort(101), "front.0")
    assert world.got(several) == [Abort(101)] and not world.got(1 - several)


def test_a_rank_is_obeyed_whoever_is_up(world: World) -> None:
    assert [world.ask(rid, dp_rank=1) for rid in range(5)] == [1] * 5
    world.kill(1)
    asked = TokenPrompt(view("i", [1, 2, 3]))
    world.front.ref("text").post(Generate(9, 1, asked, SamplingParams(max_new_tokens=9, seed=1), dp_rank=1))
    world.text.drain()
    assert not world.got(0)
    world.join(world.scheds[1])
    assert [m.rid for m in world.got(1) if isinstance(m, Submit)] == [0, 1, 2, 3, 4, 9]


def test_who_is_down_gets_nothing_new_and_only_its_own_again(world: World) -> None:
    first = [world.ask(rid, first=100 * rid) for rid in range(4)]
    received(world.front)
    world.kill(0)
    assert [m.down for m in received(world.front) if isinstance(m, Stats) and m.dp_rank == 0] == [
        "the scheduler is down: test"
    ]
    assert [world.ask(10 + rid) for rid in range(4)] == [1] * 4
    world.join(world.scheds[0])
    assert [m.rid for m in world.got(0)] == [rid for rid in range(4) if first[rid] == 0] and not world.got(1)
    # Its scheduler is up, its executor is not: others are preferred.
    assert [world.ask(20 + rid) for rid in range(3)] == [1] * 3
    world.say(replace(UP, dp_rank=0, waiting=1))
    assert world.ask(30, first=700) == 0
    # With nobody well, those are asked that are nearest to it.
    world.say(*(replace(UP, dp_rank=i, executor_up=False) for i in range(2)))
    world.kill(1)
    assert world.ask(40, first=800) == 0


@pytest.mark.parametrize("how", ["executor", "scheduler", "order"])
def test_a_lost_cache_is_known(world: World, how: str) -> None:
    """After an executor's death, a scheduler's, or an order, nothing is where it was: turns decide."""
    before = world.ask(1, first=5)
    world.end(1, before)
    assert world.ask(1, first=5) == before
    world.end(1, before)
    if how == "executor":
        world.say(replace(UP, dp_rank=before, executor_up=False), replace(UP, dp_rank=before))
    elif how == "scheduler":
        world.kill(before)
        world.join(world.scheds[before])
        world.say(replace(UP, dp_rank=before))
    else:
        order(world, Order(99, "flush_cache"))
    assert world.ask(1, first=5) == 1 - before


def order(world: World, message: Order) -> None:
    """Given, and carried out by both."""
    world.front.ref("text").post(message)
    world.text.drain()
    for number in range(2):
        assert message in world.got(number)
        world.scheds[number].ref("text").post(Done(message.rid))
    world.text.drain()
    assert Done(message.rid) in received(world.front)


def test_orders_go_to_all_and_pauses_hold(world: World) -> None:
    order(world, Order(1, "pause"))
    world.kill(1)
    world.front.ref("text").post(Order(2, "continue"))
    world.text.drain()
    assert world.got(0) == [Order(2, "continue")]
    world.scheds[0].ref("text").post(Done(2))
    world.text.drain()
    assert Done(2) not in received(world.front)
    world.join(world.scheds[1])
    assert world.got(1) == [Order(-1, "pause"), Order(2, "continue")]
    world.scheds[1].ref("text").post(Done(2))
    world.text.drain()
    assert Done(2) in received(world.front)
    world.kill(0)
    world.join(world.scheds[0])
    assert world.got(0) == []


def test_weights_are_exchanged_only_where_all_can(world: World) -> None:
    """One that came back later would have others than the rest."""
    received(world.front)
    world.say(replace(UP, dp_rank=1, executor_up=False, down="exec.1.0 is down: test"))
    world.front.ref("text").post(Order(1, "update_weights", "/w"))
    world.text.drain()
    (refused,) = [m for m in received(world.front) if isinstance(m, Refused)]
    assert (refused.status, refused.message) == (503, "replica 1: exec.1.0 is down: test; try again")
    assert world.got(0) == world.got(1) == []
    world.say(replace(UP, dp_rank=1))
    order(world, Order(1, "update_weights", "/w"))


def test_what_is_pinned_is_come_back_to(world: World) -> None:
    first = world.ask(1, first=5, pin=7)
    crowd = [world.ask(10 + rid, first=300, dp_rank=first) for rid in range(9)]
    assert set(crowd) == {first}
    assert world.ask(30, first=5, pin=7) == first, "whatever the router would say"
    world.say(replace(UP, dp_rank=first, executor_up=False))
    asked = TokenPrompt(view("i", prompt(5).tolist()))
    world.front.ref("text").post(Generate(31, 1, asked, SamplingParams(max_new_tokens=9, seed=1), pin=7))
    world.text.drain()
    assert [bytes(m.pins) for m in world.got(first) if isinstance(m, Unpin)] == [bytes(view("q", [7]))]
    assert [m.pin for m in world.got(1 - first) if isinstance(m, Submit)] == [7]
    world.front.ref("text").post(Unpin(view("q", [7])))
    world.text.drain()
    for number in range(2):
        assert [bytes(m.pins) for m in world.got(number)] == [bytes(view("q", [7]))]
    assert not world.text.pins["front.0"]


def test_a_front_that_comes_up_hears_of_all_replicas(world: World) -> None:
    received(world.front)
    world.context.inbox.put_system(PeerUp("front.0", 2))
    world.text.drain()
    assert received(world.front) == [replace(UP, dp_rank=i) for i in range(2)]


# ------------------------------------------------------------------ a replica on another machine


@pytest.fixture
def apart() -> Iterator[World]:
    """Replica 1 is on node 1."""
    world = World(nnodes=2)
    yield world
    world.close()


def submits(world: World, number: int) -> list[int]:
    return [m.rid for m in world.got(number) if isinstance(m, Submit)]


def test_what_a_lost_machine_had_goes_to_others(apart: World) -> None:
    """With the tokens so far, also what had named it; what comes later names it in vain, until it is back."""
    assert [apart.ask(rid, dp_rank=1) for rid in range(3)] == [1] * 3
    apart.ask(3, dp_rank=0)
    nothing = memoryview(b"")
    row = Tokens(view("q", [1]), view("i", [7]), memoryview(b"\0"), nothing, 0, nothing, nothing)
    apart.scheds[1].ref("text").post(row)
    apart.text.drain()
    apart.text.receive(Abort(2), "front.0")
    received(apart.front)
    apart.kill(1)
    moved = [m for m in apart.got(0) if isinstance(m, Submit)]
    assert [(m.rid, m.generated.cast("i").tolist() if m.generated else []) for m in moved] == [(0, []), (1, [7])]
    assert [replica.requests for replica in apart.text.replicas] == [3, 0], "the one that was to end has ended"
    assert apart.ask(10, dp_rank=1) == 0
    apart.join(apart.scheds[1])
    assert submits(apart, 1) == []
    apart.say(replace(UP, dp_rank=1, windows=1))
    assert apart.ask(11, dp_rank=1) == 1


def test_what_a_lost_machine_had_waits_for_one_that_serves(apart: World) -> None:
    apart.ask(1, dp_rank=1)
    apart.say(replace(UP, dp_rank=0, executor_up=False))
    apart.kill(1)
    assert submits(apart, 0) == []
    apart.say(replace(UP, dp_rank=0))
    assert submits(apart, 0) == [1]
    # New ones never wait for a machine that is not there.
    apart.say(replace(UP, dp_rank=0, executor_up=False))
    assert [apart.ask(10 + rid, first=300 * rid) for rid in range(4)] == [0] * 4


def test_what_none_could_take_is_asked_of_the_machine_that_comes_back(apart: World) -> None:
    apart.ask(1, dp_rank=1)
    apart.say(replace(UP, dp_rank=0, executor_up=False))
    apart.kill(1)
    apart.join(apart.scheds[1])
    assert submits(apart, 1) == [1] and submits(apart, 0) == []


def test_orders_do_not_wait_for_a_lost_machine(apart: World) -> None:
    apart.front.ref("text").post(Order(1, "flush_cache"))
    apart.text.drain()
    apart.scheds[0].ref("text").post(Done(1))
    apart.text.drain()
    assert received(apart.front)[-1:] != [Done(1)]
    apart.kill(1)
    assert Done(1) in received(apart.front)
    apart.got(0)
    apart.front.ref("text").post(Order(2, "pause"))
    apart.text.drain()
    apart.scheds[0].ref("text").post(Done(2))
    apart.text.drain()
    assert Done(2) in received(apart.front)
    apart.join(apart.scheds[1])
    assert [m.action for m in apart.got(1)] == ["pause"], "and it is told what holds"


def test_a_machine_that_comes_back_has_no_requests_before_it_has_the_weights(apart: World) -> None:
    order(apart, Order(1, "update_weights", "/new"))
    apart.say(*(replace(UP, dp_rank=i, weights="/new") for i in range(2)))
    apart.kill(1)
    apart.join(apart.scheds[1])
    apart.say(replace(UP, dp_rank=1))
    assert apart.got(1) == [Order(-1, "update_weights", "/new")]
    assert [apart.ask(rid, dp_rank=1) for rid in range(2)] == [0, 0]
    apart.scheds[1].ref("text").post(Done(-1))
    apart.say(replace(UP, dp_rank=1, weights="/new"))
    assert apart.ask(5, dp_rank=1) == 1
    # Exchanged while it was away.
    apart.kill(1)
    apart.got(0)
    apart.text.weights = "/newer"
    apart.join(apart.scheds[1])
    apart.say(replace(UP, dp_rank=1, weights="/new"))
    assert apart.got(1) == [Order(-1, "update_weights", "/newer")]
