"""Radix tree over token ids: which KV pages hold which prefixes, so that no prefix is computed twice.

RadixAttention (SGLang, arXiv 2312.07104), made token-exact with pages: position i of a sequence lies in its page
i // page_size always, nodes begin and end at page boundaries, and where a sequence leaves the tree inside a page the
caller copies that page and keeps the tokens in common. Used by the scheduler actor, which owns the tree and the pool.
Invariant: a page of the tree holds the KV of exactly the tokens on the path to it, belongs to one node, and is freed
only when that node is unlocked and a leaf (or its tail). Locks count along the path to the root, so an unlocked node
has no locked descendant: the pages of all unlocked nodes are what `evict` can free. `check` asserts all of it.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from .eviction import LRU, EvictionPolicy
from .nodes import GONE, TOKEN_BYTES, Inserted, Match, Node, NodeView, Statistics
from .pages import Float32Array, Int32Array, PagePool
from .pins import Pins

__all__ = ["Inserted", "Match", "Node", "NodeView", "RadixTree", "Statistics"]

_NO_TEXT = "\ud800"  # half a surrogate pair: no client can name a namespace so
_NO_PAGES: Int32Array = np.zeros(0, np.int32)


@dataclass(slots=True)
class _Walk:
    """How far a sequence follows the tree in whole pages: to the end of `node`, then `pages` pages into `edge`."""

    node: Node
    offset: int  # bytes of the sequence on the path to the end of `node`
    runs: list[Int32Array]  # the pages on that path
    edge: Node | None = None
    pages: int = 0


class RadixTree:
    """The prefix cache. Not thread-safe: one actor owns it.

    The time of every operation grows with the nodes on one path and with log(children), not with the tree's size;
    tokens are compared at memory speed.
    """

    def __init__(
        self, pool: PagePool, page_size: int = 16, policy: EvictionPolicy | None = None, enabled: bool = True
    ) -> None:
        """`pool` gets evicted pages back. `enabled=False`: nothing matches and nothing is taken."""
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, not {page_size}")
        self.page_size = page_size
        self.enabled = enabled
        self.num_pages = 0  # owned by the tree
        self.num_evictable = 0  # of these, in unlocked nodes
        self.pins = Pins(self)
        self._pool = pool
        self._policy: EvictionPolicy = LRU() if policy is None else policy
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[str, Node] = {}  # none of them without children
        self._numbers = count()
        self._num_nodes = 0
        self._lookups = self._lookup_tokens = self._matched_tokens = 0
        self._inserted_pages = self._evicted_pages = 0

    def match(self, tokens: Int32Array, namespace: str = "") -> Match:
        """The longest cached prefix of `tokens` (int32 [n]), token-exact; its path counts as used.

        A caller that must compute at least one token (to get logits) leaves the last one out of `tokens`.
        May split a node, so that a lock on `node` holds no more than the matched pages.
        """
        key = _key(tokens)
        self._lookups += 1
        self._lookup_tokens += len(key) // TOKEN_BYTES
        root = self._roots.get(namespace)
        if root is None:
            return Match(self._detached_root(namespace), _NO_PAGES, -1, 0, 0)
        walk = self._walk(key, root)
        partial_page, partial_tokens = self._partial(key, walk)
        node = self._settle(walk)
        self._touch(node, hits=1)
        pages = np.concatenate(walk.runs) if walk.runs else _NO_PAGES
        length = len(pages) * self.page_size + partial_tokens
        self._matched_tokens += length
        return Match(node, pages, partial_page, partial_tokens, length)

    def match_length(self, tokens: Int32Array, namespace: str = "") -> int:
        """`match(...).length` without any effect: for ordering a queue."""
        root = self._roots.get(namespace)
        if root is None:
            return 0
        key = _key(tokens)
        walk = self._walk(key, root)
        whole = walk.offset // TOKEN_BYTES + walk.pages * self.page_size
        return whole + self._partial(key, walk)[1]

    def insert(self, tokens: Int32Array, pages: Int32Array, namespace: str = "") -> Inserted:
        """Makes computed KV reusable: tokens[i] lies in pages[i // page_size], int32 [n] and [ceil(n / page_size)].

        The tree takes pages[taken_from:]. Earlier ones it has already: its own (from `match` or an earlier insert)
        or, where two requests computed the same prefix at once, another copy; those are returned as `duplicates` and
        stay the caller's. So a finished request unlocks, frees `duplicates`, and is done; a running one inserts whole
        pages only (it still writes to its tail), locks `node`, and unlocks its previous node.
        An unlocked partial leaf that the new tokens contain is freed. Raises ValueError if the counts don't fit.
        """
        key = _key(tokens)
        pages = np.array(pages, dtype=np.int32)
        if len(pages) != -(-len(key) // self._page_bytes):
            raise ValueError(f"{len(key) // TOKEN_BYTES} tokens do not fill {len(pages)} pages of {self.page_size}")
        if not self.enabled or not key:
            return Inserted(self._detached_root(namespace), len(pages), pages)
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = self._detached_root(namespace)
        walk = self._walk(key, root)
        node = self._settle(walk)
        taken_from = known_pages = sum(map(len, walk.runs))
        if rest := key[known_pages * self._page_bytes :]:
            twin = self._tail_twin(node, rest)
            if twin is not None:
                walk.runs.append(twin.pages[:1])
                taken_from = len(pages)
            else:
                node = self._add(node, rest, pages[known_pages:])
        self._touch(node, hits=0)
        known = np.concatenate(walk.runs) if walk.runs else _NO_PAGES
        offered = pages[:taken_from]
        return Inserted(node, taken_from, offered[offered != known])

    def keep_logprobs(self, tokens: Int32Array, values: Float32Array, namespace: str = "", since: int = 0) -> None:
        """Keeps the logprobs of tokens under their prefixes beside their pages, as far as these are in the tree.

        values float32 [at most n, columns]: a token's own logprob and what the caller likes to keep with it; NaN where
        unknown: then what was known stays. `since`: those of the tokens before are in the tree already.
        """
        for node, begin, length in self._spans(_key(tokens), namespace):
            if begin + length > since:
                _learn(node, values[begin : begin + length])

    def logprobs(self, tokens: Int32Array, columns: int, namespace: str = "") -> Float32Array:
        """What is known of the logprobs of the first tokens: float32 [at most n, columns], NaN where unknown.

        Without effect: nothing counts as used.
        """
        spans = self._spans(_key(tokens), namespace)
        found = np.full((sum(length for _, _, length in spans), columns), np.nan, np.float32)
        for node, begin, length in spans:
            if node.logprobs is not None:
                known = node.logprobs[:length, :columns]
                found[begin : begin + length, : known.shape[1]] = known
        return found

    def lock(self, node: Node) -> None:
        """Keeps `node` and its ancestors from eviction until unlocked as often. Raises ValueError if it is gone."""
        if node.locks == GONE:
            raise ValueError("the node has been evicted: lock it right after match or insert")
        while node.parent is not None:
            if node.locks == 0:
                self._policy.remove(node)
                self.num_evictable -= len(node.pages)
            node.locks += 1
            node = node.parent
        node.locks += 1

    def unlock(self, node: Node) -> None:
        """Undoes one `lock` of the node; counts as a use. Raises ValueError if it isn't locked."""
        if node.locks <= 0:
            raise ValueError("unlock of a node that is not locked")
        while node.parent is not None:
            node.locks -= 1
            if node.locks == 0:
                self._policy.add(node)
                self.num_evictable += len(node.pages)
            node = node.parent
        node.locks -= 1

    def evict(self, num_pages: int) -> int:
        """Frees unlocked pages into the pool, least valuable first, tail pages first: as many as asked, or all.

        Returns the number of pages freed. O(1) per node freed, whatever the size of the tree.
        """
        freed: list[Int32Array] = []
        missing = num_pages
        while missing > 0 and (leaf := self._policy.victim()) is not None:
            if len(leaf.pages) <= missing:
                freed.append(self._remove(leaf))
            else:
                freed.append(self._trim(leaf, missing))
            missing -= len(freed[-1])
        if not freed:
            return 0
        self._pool.free(np.concatenate(freed))
        self._evicted_pages += num_pages - missing
        return num_pages - missing

    def clear(self) -> None:
        """Frees every page, pinned ones too. Raises ValueError, and frees none, while a node is locked otherwise."""
        self.pins.clear()
        if self.num_evictable != self.num_pages:
            raise ValueError(f"{self.num_pages - self.num_evictable} pages are locked by running requests")
        self.evict(self.num_pages)

    def expel(self, tokens: Int32Array, namespace: str = "") -> int:
        """Let nobody match any more what the tree has of `tokens`, nor what else begins with their first page.

        For KV that may be wrong: whatever was computed behind it may be, too. Unlocked pages are freed now, the others
        when they are unlocked, for they are evicted as all are. Locks stay valid; a node of it has another `namespace`
        from now on, and its owner must not insert what it computed. Returns the number of pages that were expelled.
        """
        root = self._roots.get(namespace)
        if root is None:
            return 0
        key = _key(tokens)
        walk = self._walk(key, root)
        top = walk.edge or (walk.node if walk.node is not root else self._beyond(key, walk)[0])
        if top is None:
            return 0
        while top.parent is not root:
            assert top.parent is not None
            top = top.parent
        self._take_out(root, top)
        hidden = Node(next(self._numbers), None, b"", _NO_PAGES, f"{_NO_TEXT}{top.id}")
        first = top.key[: self._page_bytes]
        hidden.children[first], hidden.order[:] = top, [first]
        hidden.locks, hidden.hits, top.parent = top.locks, top.hits, hidden
        root.locks -= top.locks
        self._roots[hidden.namespace] = hidden
        nodes = list(_subtree(top))
        expelled = sum(len(node.pages) for node in nodes)
        for node in nodes:
            node.namespace = hidden.namespace
        freed = [self._remove(node) for node in reversed(nodes) if not node.locks]
        if freed:
            self._pool.free(np.concatenate(freed))
        return expelled

    def snapshot(self, limit: int = 1000) -> list[NodeView]:
        """Up to `limit` nodes, level by level, for metrics or a picture; O(limit + roots). Holds no token ids."""
        return [
            NodeView(n.id, n.parent.id if n.parent else None, len(n.key) // TOKEN_BYTES, len(n.pages), n.locks, n.hits)
            for n in islice(self._nodes(), limit)
        ]

    def statistics(self) -> Statistics:
        """Sizes and counters; O(1)."""
        return Statistics(
            nodes=self._num_nodes,
            pages=self.num_pages,
            evictable_pages=self.num_evictable,
            namespaces=len(self._roots),
            lookups=self._lookups,
            lookup_tokens=self._lookup_tokens,
            matched_tokens=self._matched_tokens,
            inserted_pages=self._inserted_pages,
            evicted_pages=self._evicted_pages,
        )

    def check(self) -> None:
        """Asserts the invariants of the whole tree; O(tree), for tests and idle moments."""
        nodes = list(self._nodes())
        inner = [node for node in nodes if node.parent is not None]
        for node in nodes:
            self._check_node(node)
        assert all(root.namespace == name and root.children for name, root in self._roots.items())
        assert len(inner) == self._num_nodes
        pages = np.concatenate([node.pages for node in inner]) if inner else _NO_PAGES
        assert len(pages) == self.num_pages and len(np.unique(pages)) == len(pages), "a page has two places"
        assert not self._pool.is_free(pages).any(), "a page of the tree is free"
        assert sum(len(node.pages) for node in inner if not node.locks) == self.num_evictable
        seen: set[Node] = set()
        for node in self._policy:
            assert node not in seen and all(child in seen for child in node.children.values()), "a parent goes first"
            seen.add(node)
        assert seen == {node for node in inner if not node.locks}, "the policy must hold exactly the unlocked nodes"

    def _check_node(self, node: Node) -> None:
        assert sorted(node.children) == node.order and node.locks >= 0
        for first, child in node.children.items():
            assert child.parent is node and child.namespace == node.namespace
            assert child.key[: self._page_bytes] == first and len(first) > 0
            assert child.locks <= node.locks and child.hits <= node.hits
        full = len(node.key) % self._page_bytes == 0
        assert full or not node.children, "only a leaf ends in a partial page"
        if node.parent is not None:
            assert len(node.pages) == -(-len(node.key) // self._page_bytes) > 0
        assert node.logprobs is None or len(node.logprobs) == len(node.key) // TOKEN_BYTES

    def _nodes(self) -> Iterator[Node]:
        """Every node, roots too, level by level; no further than it is read."""
        parents = deque(self._roots.values())
        yield from self._roots.values()
        while parents:
            for child in parents.popleft().children.values():
                yield child
                parents.append(child)

    def _walk(self, key: bytes, root: Node) -> _Walk:
        """Follows whole pages: one turn per node, whatever the length of its edge."""
        size = self._page_bytes
        node, offset = root, 0
        runs: list[Int32Array] = []
        while True:
            first = key[offset : offset + size]
            child = node.children.get(first)
            if child is None or len(first) < size:
                return _Walk(node, offset, runs)
            edge = child.key
            if len(edge) % size or not key.startswith(edge, offset):
                same = _common_bytes(edge, key[offset : offset + len(edge)])
                return _Walk(node, offset, runs, child, same // size)
            node = child
            offset += len(edge)
            runs.append(child.pages)

    def _partial(self, key: bytes, walk: _Walk) -> tuple[int, int]:
        """The page after the walk's end that shares most tokens with what follows there: (page or -1, tokens)."""
        node, tokens = self._beyond(key, walk)
        return (-1, 0) if node is None else (int(node.pages[walk.pages]), tokens)

    def _beyond(self, key: bytes, walk: _Walk) -> tuple[Node | None, int]:
        """The node whose page after the walk's end shares most tokens with what follows there, and how many: or none.

        It is the walk's edge, or a child of its node.
        """
        start = walk.offset + walk.pages * self._page_bytes
        rest = key[start : start + self._page_bytes]
        if walk.edge is not None:
            at = walk.pages * self._page_bytes
            same = _common_bytes(rest, walk.edge.key[at : at + self._page_bytes])
            return (walk.edge, same // TOKEN_BYTES) if same >= TOKEN_BYTES else (None, 0)
        order = walk.node.order
        place = bisect_left(order, rest)
        best, found = TOKEN_BYTES - 1, None
        for first in order[max(place - 1, 0) : place + 1]:
            same = _common_bytes(rest, first)
            if same > best:
                best, found = same, walk.node.children[first]
        return (found, best // TOKEN_BYTES) if found is not None else (None, 0)

    def _spans(self, key: bytes, namespace: str) -> list[tuple[Node, int, int]]:
        """(node, the place of its first token, how many of its tokens are those of `key`) along its path, in order."""
        root = self._roots.get(namespace)
        if root is None:
            return []
        walk = self._walk(key, root)
        spans: list[tuple[Node, int, int]] = []
        node, end = walk.node, walk.offset // TOKEN_BYTES
        while node.parent is not None:
            length = len(node.key) // TOKEN_BYTES
            end -= length
            spans.append((node, end, length))
            node = node.parent
        spans.reverse()
        beyond, tokens = self._beyond(key, walk)
        last = walk.edge if beyond is None else beyond
        if last is not None:
            spans.append((last, walk.offset // TOKEN_BYTES, walk.pages * self.page_size + tokens))
        return spans

    def _settle(self, walk: _Walk) -> Node:
        """The node that ends where the walk ended, split off if need be; completes `walk.runs`."""
        if walk.edge is None:
            return walk.node
        upper = self._split(walk.edge, walk.pages)
        walk.runs.append(upper.pages)
        return upper

    def _split(self, node: Node, pages: int) -> Node:
        """Puts a new node with the first `pages` pages above `node`, which keeps the rest, its locks and children.

        The caller touches the new node next, which puts its ancestors behind it in the policy's order.
        """
        assert node.parent is not None
        cut = pages * self._page_bytes
        upper = Node(next(self._numbers), node.parent, node.key[:cut], node.pages[:pages], node.namespace)
        upper.locks, upper.hits = node.locks, node.hits
        node.parent.children[upper.key[: self._page_bytes]] = upper
        node.parent, node.key, node.pages = upper, node.key[cut:], node.pages[pages:]
        if node.logprobs is not None:
            tokens = pages * self.page_size
            upper.logprobs, node.logprobs = node.logprobs[:tokens], node.logprobs[tokens:]
        first = node.key[: self._page_bytes]
        upper.children[first] = node
        upper.order.append(first)
        self._num_nodes += 1
        if not upper.locks:
            self._policy.add(upper)
        return upper

    def _tail_twin(self, node: Node, rest: bytes) -> Node | None:
        """The child whose first page begins with all of `rest`. Only a tail can have one: `_walk` takes full pages."""
        place = bisect_left(node.order, rest)
        if place < len(node.order) and node.order[place].startswith(rest):
            return node.children[node.order[place]]
        return None

    def _add(self, parent: Node, key: bytes, pages: Int32Array) -> Node:
        """A new leaf. Unlocked partial leaves beside it that its first page contains have become useless: freed."""
        first = key[: self._page_bytes]
        node = Node(next(self._numbers), parent, key, pages, parent.namespace)
        covered = [first[:n] for n in range(TOKEN_BYTES, len(first), TOKEN_BYTES)] if parent.children else []
        parent.children[first] = node
        insort(parent.order, first)
        self._policy.add(node)
        self._num_nodes += 1
        self.num_pages += len(pages)
        self.num_evictable += len(pages)
        self._inserted_pages += len(pages)
        for prefix in covered:
            old = parent.children.get(prefix)
            if old is not None and not old.locks:
                if old.logprobs is not None:
                    _learn(node, old.logprobs)
                self._pool.free(self._remove(old))
        return node

    def _remove(self, leaf: Node) -> Int32Array:
        """Takes an unlocked leaf out; returns its pages, which are nobody's until the caller frees them."""
        assert leaf.parent is not None and not leaf.children and not leaf.locks
        self._take_out(leaf.parent, leaf)
        self._policy.remove(leaf)
        self._num_nodes -= 1
        self.num_pages -= len(leaf.pages)
        self.num_evictable -= len(leaf.pages)
        leaf.parent, leaf.locks = None, GONE
        return leaf.pages

    def _take_out(self, parent: Node, child: Node) -> None:
        """Undoes the parent's side of their bond; a root without children is no root."""
        first = child.key[: self._page_bytes]
        del parent.children[first]
        del parent.order[bisect_left(parent.order, first)]
        if parent.parent is None and not parent.children:
            del self._roots[parent.namespace]

    def _trim(self, leaf: Node, pages: int) -> Int32Array:
        """Takes the last `pages` pages from an unlocked leaf that has more; returns them."""
        keep = len(leaf.pages) - pages
        gone = leaf.pages[keep:]
        leaf.key, leaf.pages = leaf.key[: keep * self._page_bytes], leaf.pages[:keep]
        if leaf.logprobs is not None:
            leaf.logprobs = leaf.logprobs[: keep * self.page_size]
        self.num_pages -= pages
        self.num_evictable -= pages
        return gone

    def _touch(self, node: Node, hits: int) -> None:
        """Counts a use of the path, deepest node first: the policy relies on that order."""
        while node.parent is not None:
            node.hits += hits
            if not node.locks:
                self._policy.touch(node)
            node = node.parent
        node.hits += hits

    def _detached_root(self, namespace: str) -> Node:
        """A root that is not in the tree (yet). Locks on roots are counted, but protect nothing."""
        return Node(next(self._numbers), None, b"", _NO_PAGES, namespace)


def _key(tokens: Int32Array) -> bytes:
    return np.ascontiguousarray(tokens, dtype=np.int32).tobytes()


def _learn(node: Node, values: Float32Array) -> None:
    """Takes in the logprobs of the node's first tokens, [n, columns], NaN: unknown."""
    known = ~np.isnan(values)
    if not known.any():
        return
    (rows, columns), had = values.shape, node.logprobs
    merged = np.full((len(node.tokens), max(columns, 0 if had is None else had.shape[1])), np.nan, np.float32)
    if had is not None:
        merged[:, : had.shape[1]] = had
    merged[:rows, :columns][known] = values[known]
    node.logprobs = merged


def _common_bytes(a: bytes, b: bytes) -> int:
    """Length of the common prefix of two token strings, in bytes, whole tokens only."""
    n = min(len(a), len(b)) // TOKEN_BYTES
    differ = np.frombuffer(a, np.int32, n) != np.frombuffer(b, np.int32, n)
    first = int(differ.argmax()) if n else 0
    return (first if n and differ[first] else n) * TOKEN_BYTES


def _subtree(top: Node) -> Iterator[Node]:
    """A node and all below it, parents first."""
    waiting = deque([top])
    while waiting:
        node = waiting.popleft()
        yield node
        waiting.extend(node.children.values())
