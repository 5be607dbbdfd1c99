"""What several replicas report, as one engine's: sums of their numbers, their views side by side.

Used by clients and by text. Invariant: of one replica it is what that one said, unchanged.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from .messages import NodeView, Seen, Stats

_OTHERS: Final = ("step_us", "executor_up", "down", "weights", "dp_rank", "paused")
_SUMS: Final = tuple(field for field in Stats.__struct_fields__ if field not in _OTHERS)


def total(replicas: Sequence[Stats]) -> Stats:
    """The sums. It is up while one replica is; `down` is empty while one serves; `step_us` is the mean of those that
    step. The rank is that of no replica."""
    if len(replicas) == 1:
        return replicas[0]
    paces = [stats.step_us for stats in replicas if stats.step_us]
    return msgspec.structs.replace(
        replicas[0],
        **{field: sum(getattr(stats, field) for stats in replicas) for field in _SUMS},
        step_us=sum(paces) / max(1, len(paces)),
        executor_up=any(stats.executor_up for stats in replicas),
        down="" if any(serves(stats) for stats in replicas) else why_down(replicas),
        weights=", ".join(dict.fromkeys(stats.weights for stats in replicas if stats.weights)),
        dp_rank=-1,
        paused=any(stats.paused for stats in replicas),
    )


def serves(stats: Stats) -> bool:
    """Whether all of this replica was up when it said so."""
    return stats.executor_up and not stats.down


def why_down(replicas: Sequence[Stats]) -> str:
    """What is not up, for people; empty if everything is."""
    reasons = [(stats.dp_rank, stats.down or "the executor is not up") for stats in replicas if not serves(stats)]
    if len(replicas) == 1:
        return reasons[0][1] if reasons else ""
    return "; ".join(f"replica {rank}: {reason}" for rank, reason in reasons)


def side_by_side(views: Sequence[Seen]) -> Seen:
    """All lanes, requests and trees. Nodes get other numbers, in which those of the trees differ."""
    if len(views) == 1:
        return views[0]
    count = len(views)
    lanes = {(lane.source, lane.target): lane for view in views for lane in view.lanes}
    return Seen(
        views[0].rid,
        total([view.stats for view in views]),
        list(lanes.values()),
        [_renumbered(node, tree, count) for tree, view in enumerate(views) for node in view.nodes],
        sum(view.tree_nodes for view in views),
        [request for view in views for request in view.requests],
        any(view.paused for view in views),
    )


def _renumbered(node: NodeView, tree: int, trees: int) -> NodeView:
    parent = -1 if node.parent < 0 else node.parent * trees + tree
    return msgspec.structs.replace(node, id=node.id * trees + tree, parent=parent)
