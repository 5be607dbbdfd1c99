"""What the scheduler and text say of the engine when they are asked for it."""

from array import array
from collections.abc import Iterator

import numpy as np
import pytest

from actorserve.actors.actor import Context, connect, disconnect
from actorserve.actors.messages import (
    NO_STATS,
    Done,
    LaneView,
    Look,
    NodeView,
    RequestView,
    SchedulerInbox,
    Stats,
    TextInbox,
)
from actorserve.actors.request import Request
from actorserve.actors.schedule import Schedule
from actorserve.actors.view import lanes_of, seen, with_lanes_of
from actorserve.config import EngineConfig, ModelInfo
from actorserve.sampler.params import SamplingParams

CONFIG = EngineConfig()
MODEL = ModelInfo(name="m", path="/m", model_type="llama", vocab_size=99, context_length=512, eos_ids=())


@pytest.fixture
def pair() -> Iterator[tuple[Context, Context]]:
    """The contexts of text and sched, with lanes both ways."""
    text = Context("text", CONFIG, MODEL, TextInbox, sends_to=["sched", "front.0"])
    sched = Context("sched", CONFIG, MODEL, SchedulerInbox, sends_to=["text", "exec.0"])
    connect(text, sched)
    connect(sched, text)
    yield text, sched
    text.close()
    sched.close()


def request(rid: int, prompt: list[int], new: int) -> Request:
    return Request(
        rid=rid, tokens=array("i", prompt), prompt_length=len(prompt), params=SamplingParams(), namespace="",
        priority=0, arrival_ns=0, limit=len(prompt) + new,
    )  # fmt: skip


def test_lanes_of_an_actor(pair: tuple[Context, Context]) -> None:
    text, sched = pair
    text.ref("sched").post(Look(1, 2, 3))
    text.ref("sched").post(Look(2, 2, 3))
    sched.ref("text").post(Done(1))
    while sched.inbox.poll() != (Look(1, 2, 3), "text"):
        pass
    by_name = {(lane.source, lane.target): lane for lane in lanes_of(sched)}
    assert by_name["text", "sched"] == LaneView("text", "sched", True, waiting=1, sent=2, epoch=1)
    assert by_name["sched", "text"] == LaneView("sched", "text", True, waiting=1, sent=1, epoch=1)
    assert by_name["sched", "exec.0"] == LaneView("sched", "exec.0", False)
    disconnect(sched, text)
    assert LaneView("sched", "text", False, epoch=1) in lanes_of(sched)


def test_text_adds_the_lanes_that_the_scheduler_has_not(pair: tuple[Context, Context]) -> None:
    text, sched = pair
    view = seen(sched, Look(7, 10, 10), None, NO_STATS, paused=True)
    whole = with_lanes_of(text, view)
    assert (whole.rid, whole.paused, whole.nodes, whole.requests) == (7, True, [], [])
    names = [(lane.source, lane.target) for lane in whole.lanes]
    assert sorted(names) == [("sched", "exec.0"), ("sched", "text"), ("text", "front.0"), ("text", "sched")]


def test_the_tree_and_the_requests_within_bounds(pair: tuple[Context, Context]) -> None:
    _, sched = pair
    schedule = Schedule(CONFIG, 64, 2, 64, 0.0, None)
    for branch in range(4):
        pages = schedule.pool.allocate(2)
        ids = np.array([5] * 16 + [branch + 10] * 16, np.int32)
        schedule.pool.free(schedule.tree.insert(ids, pages).duplicates)
    stats = Stats(*[0] * 13, 0.0, True)
    whole = seen(sched, Look(1, 50, 50), schedule, stats, paused=False)
    root, shared = whole.nodes[:2]
    assert (whole.tree_nodes, len(whole.nodes)) == (5, 6)
    assert (root.parent, root.tokens) == (-1, 0)
    assert shared == NodeView(shared.id, root.id, 16, 1, 0, 0)
    assert [(n.parent, n.tokens) for n in whole.nodes[2:]] == [(shared.id, 16)] * 4
    for rid in (1, 2, 3):
        schedule.add(request(rid, [1, 2, 3, rid], 6))
    schedule.plan()
    some = seen(sched, Look(1, 3, 2), schedule, stats, paused=False)
    assert len(some.nodes) == 3 and some.tree_nodes == 5
    assert some.requests == [RequestView(1, "prefill", 4, 0, 0, 10), RequestView(2, "prefill", 4, 0, 0, 10)]
    assert seen(sched, Look(1, 0, 9), schedule, stats, paused=False).requests[2].stage == "waiting"
