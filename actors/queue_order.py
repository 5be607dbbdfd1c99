"""Order of the waiting queue: SGLang's schedule policies as functions of the waiting requests.

fcfs        arrival
lpm         longest prefix match first: what is cached is used before it is evicted
dfs-weight  depth-first through the radix tree, heavier branches first, so that sharers run together
random      for comparison

Whatever the policy, a higher `priority` goes first. lpm and dfs-weight look into the tree for every request, so
beyond LOOK_AHEAD waiting requests they fall back to arrival order (as SGLang does from 128 on).
"""

from collections.abc import Callable
from random import Random
from typing import Final

from ..kvstore.radix import Node
from .request import Request

LOOK_AHEAD: Final = 128

Order = Callable[[list[Request]], list[Request]]


def fcfs(requests: list[Request]) -> list[Request]:
    """Return the requests as they came, higher priority first."""
    if any(r.priority for r in requests):
        return sorted(requests, key=lambda r: -r.priority)
    return requests


def longest_prefix_match(matched: Callable[[Request], int]) -> Order:
    """Return an order by cached prefix tokens, most first; ties by arrival."""

    def order(requests: list[Request]) -> list[Request]:
        if len(requests) > LOOK_AHEAD:
            return fcfs(requests)
        return sorted(requests, key=lambda r: (-r.priority, -matched(r)))

    return order


def depth_first_weight(match_node: Callable[[Request], Node]) -> Order:
    """Return an order depth-first through the tree, branches with more waiting requests first."""

    def order(requests: list[Request]) -> list[Request]:
        if len(requests) > LOOK_AHEAD:
            return fcfs(requests)
        weight: dict[int, int] = {}
        paths: dict[int, list[int]] = {}
        for r in requests:
            path: list[int] = []
            node: Node | None = match_node(r)
            while node is not None:
                path.append(node.id)
                weight[node.id] = weight.get(node.id, 0) + 1
                node = node.parent
            paths[r.rid] = path[::-1]
        return sorted(requests, key=lambda r: (-r.priority, [(-weight[node], node) for node in paths[r.rid]]))

    return order


def make_order(
    policy: str, seed: int, matched: Callable[[Request], int], match_node: Callable[[Request], Node]
) -> Order:
    """Return the order of a `schedule_policy`; `matched` and `match_node` look a request up in the tree."""
    if policy == "random":
        rng = Random(seed)
        return lambda requests: fcfs(rng.sample(requests, len(requests)))
    if policy == "dfs-weight":
        return depth_first_weight(match_node)
    return longest_prefix_match(matched) if policy == "lpm" else fcfs
