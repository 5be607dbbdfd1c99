"""The engine as it is shown to people: the answer to a Look. Used by the scheduler, which sees most of it, and text.

Invariant: it costs the same whatever the engine holds (half a millisecond with 240 nodes of 20,000), as what it lists
is bounded by the question; it changes nothing, and no token or text of a request is in it.
"""

from itertools import islice
from typing import Final, Literal

from .actor import Context
from .messages import LaneView, Look, NodeView, RequestView, Seen, Stats
from .request import Request, Stage
from .schedule import Schedule

MOST_NODES: Final = 1000
MOST_REQUESTS: Final = 256
"""Of an answer, whatever was asked for: it must stay small beside the tokens that share its lanes."""


def seen(context: Context, look: Look, schedule: Schedule | None, stats: Stats, paused: bool) -> Seen:
    """Return the scheduler's answer."""
    nodes: list[NodeView] = []
    requests: list[RequestView] = []
    count = 0
    if schedule is not None:
        for node in schedule.tree.snapshot(min(look.nodes, MOST_NODES)):
            parent = -1 if node.parent is None else node.parent
            nodes.append(NodeView(node.id, parent, node.tokens, node.pages, node.locks, node.hits))
        count = schedule.tree.statistics().nodes
        # Those that run are the older ones in the table, but for the retracted.
        chosen = islice(schedule.requests.values(), min(look.requests, MOST_REQUESTS))
        requests = [_request(request) for request in chosen if request.stage is not Stage.ENDED]
    return Seen(look.rid, stats, lanes_of(context), nodes, count, requests, paused)


def lanes_of(context: Context) -> list[LaneView]:
    """Return the lanes that begin or end at this actor."""
    lanes = []
    for name in context.peers():
        ref = context.ref(name)
        lane = ref.metrics()
        if lane is None:
            lanes.append(LaneView(context.name, name, up=False, epoch=ref.epoch))
        else:
            lanes.append(LaneView(context.name, name, True, lane.depth_frames, lane.sent, lane.full, ref.epoch))
    for source, lane in context.inbox.lanes().items():
        lanes.append(LaneView(source, context.name, True, lane.depth_frames, lane.sent, lane.full, context.epoch))
    return lanes


def with_lanes_of(context: Context, view: Seen) -> Seen:
    """Return the view with the lanes of this actor that it lacks."""
    known = {(lane.source, lane.target) for lane in view.lanes}
    more = [lane for lane in lanes_of(context) if (lane.source, lane.target) not in known]
    return Seen(view.rid, view.stats, view.lanes + more, view.nodes, view.tree_nodes, view.requests, view.paused)


def _request(request: Request) -> RequestView:
    # The scheduler calls it DECODE as soon as all of its prompt is planned; people want to see what is done.
    stage: Literal["waiting", "prefill", "decode"] = "prefill" if request.confirmed < request.target else "decode"
    return RequestView(
        rid=request.rid,
        stage="waiting" if request.stage is Stage.WAITING else stage,
        prompt=request.prompt_length,
        computed=0 if request.stage is Stage.WAITING else request.computed,
        generated=request.generated,
        limit=request.limit,
    )
