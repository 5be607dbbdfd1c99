"""Eviction policies: in which order the radix tree gives up nodes. Used by kvstore/radix.py only.

A policy holds the unlocked nodes of the tree, least valuable first. Invariant: a node comes after all of its
descendants, so the first one is always a leaf and no search for leaves is needed. The tree makes this easy: it
touches a path from the deepest node up, and a parent has at least as many hits as each child. Order comes from the
sequence of calls alone (a logical clock), never from wall time, so runs are reproducible.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

from .nodes import Node


class EvictionPolicy(Protocol):
    """What the tree asks of a policy. Every call must be O(log nodes) or better."""

    def add(self, node: Node) -> None:
        """The node is new or its last lock is gone: it may be evicted from now on, and was used just now."""

    def touch(self, node: Node) -> None:
        """A node that was added is used again; `node.hits` may have grown."""

    def remove(self, node: Node) -> None:
        """The node is locked or has left the tree."""

    def victim(self) -> Node | None:
        """The least valuable node, always a leaf; None if there is none. It stays until removed."""

    def __iter__(self) -> Iterator[Node]:
        """All nodes, least valuable first (for checks and tests)."""


class LRU:
    """Least recently used first. O(1): an ordered dict, its front is the oldest."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[Node, None] = OrderedDict()

    def add(self, node: Node) -> None:
        self._nodes[node] = None

    def touch(self, node: Node) -> None:
        self._nodes.move_to_end(node)

    def remove(self, node: Node) -> None:
        del self._nodes[node]

    def victim(self) -> Node | None:
        return next(iter(self._nodes), None)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)


class LFU:
    """Fewest matches first, among equals the least recently used: one ordered dict per number of hits."""

    def __init__(self) -> None:
        self._hits: dict[Node, int] = {}  # under which number each node is filed
        self._by_hits: dict[int, OrderedDict[Node, None]] = {}  # none of them empty
        self._numbers: list[int] = []  # the sorted keys of _by_hits: few, so a list is quick

    def add(self, node: Node) -> None:
        hits = self._hits[node] = node.hits
        if hits not in self._by_hits:
            self._by_hits[hits] = OrderedDict()
            insort(self._numbers, hits)
        self._by_hits[hits][node] = None

    def touch(self, node: Node) -> None:
        self.remove(node)
        self.add(node)

    def remove(self, node: Node) -> None:
        hits = self._hits.pop(node)
        del self._by_hits[hits][node]
        if not self._by_hits[hits]:
            del self._by_hits[hits]
            del self._numbers[bisect_left(self._numbers, hits)]

    def victim(self) -> Node | None:
        return next(iter(self._by_hits[self._numbers[0]])) if self._numbers else None

    def __iter__(self) -> Iterator[Node]:
        for hits in self._numbers:
            yield from self._by_hits[hits]


def make_policy(name: str) -> EvictionPolicy:
    """A policy by its name in `EngineConfig.eviction_policy`: "lru" or "lfu". Raises ValueError for another one."""
    policies: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU}
    if name not in policies:
        raise ValueError(f"no eviction policy {name!r}: {', '.join(policies)}")
    return policies[name]()
