"""What the radix tree is made of and what it answers with: plain data, no behaviour.

Used by kvstore/radix.py, which alone changes nodes, by the eviction policies, which order them, and by the scheduler,
which holds nodes between `match`, `lock` and `unlock` without looking inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .pages import Float32Array, Int32Array

TOKEN_BYTES = 4
GONE = -1  # Node.locks of a node that has left the tree


class Node:
    """A run of pages and the tokens in them. All but a leaf's last page are full.

    Tokens are kept as bytes (`key`), because slicing, hashing and comparing bytes run at memory speed. Children are
    found by their exact first page, and through `order`, the same keys sorted: in byte order the two neighbours of a
    page are the ones with the longest prefix in common with it.
    """

    __slots__ = ("children", "hits", "id", "key", "locks", "logprobs", "namespace", "order", "pages", "parent")

    def __init__(self, number: int, parent: Node | None, key: bytes, pages: Int32Array, namespace: str) -> None:
        self.id = number
        self.parent = parent  # None: a root (its key is empty), or gone
        self.key = key
        self.pages = pages  # replaced, never written to
        self.namespace = namespace
        self.logprobs: Float32Array | None = None  # [tokens, columns], NaN: unknown; replaced, never written to
        self.children: dict[bytes, Node] = {}
        self.order: list[bytes] = []
        self.locks = 0
        self.hits = 0  # matches that ended in this node or below it

    @property
    def tokens(self) -> Int32Array:
        """The edge's token ids, int32, read-only."""
        return np.frombuffer(self.key, np.int32)


@dataclass(slots=True)
class Match:
    """What the tree has of a sequence.

    `pages` are whole pages in use as they are; they stay only once `node` is locked, so lock before anything else is
    evicted or inserted. `partial_page` is not protected by that lock: plan its copy before its page can be written
    again (copies that read all sources before writing any destination, as the executor's do, are enough).
    """

    node: Node  # its path is exactly `pages`
    pages: Int32Array  # [whole pages]
    partial_page: int  # the page whose first `partial_tokens` tokens continue the match, to be copied; -1 if none
    partial_tokens: int  # 0 .. page_size-1
    length: int  # tokens matched


@dataclass(slots=True)
class Inserted:
    """What became of inserted pages. `pages[i]` is now the tree's unless it is among `duplicates`."""

    node: Node  # its path is exactly the whole pages of the tokens, and the tail page if it was taken: lock this
    taken_from: int  # pages[taken_from:] now belong to the tree
    duplicates: Int32Array  # of pages[:taken_from], those that the tree has in another copy: still the caller's


class NodeView(NamedTuple):
    """One row of `RadixTree.snapshot`."""

    id: int
    parent: int | None  # None: a namespace's root
    tokens: int
    pages: int
    locks: int
    hits: int


@dataclass(slots=True, frozen=True)
class Statistics:
    """Sizes now, and counters since the tree was made."""

    nodes: int  # roots not counted
    pages: int
    evictable_pages: int
    namespaces: int
    lookups: int  # calls of match
    lookup_tokens: int
    matched_tokens: int
    inserted_pages: int
    evicted_pages: int
