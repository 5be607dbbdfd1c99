"""The KV pages of an executor group: the pool, the radix tree, and what each request holds of both.

Owned by the Schedule. Invariant: every page is free, the tree's or a running request's.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np

from ..config import EngineConfig
from ..kvstore.eviction import make_policy
from ..kvstore.pages import PagePool
from ..kvstore.radix import Match, RadixTree
from .request import Request, common_prefix

IN_BATCH_PREFIX: Final = 32  # tokens: sharing less than this is not worth waiting for


class KVPages:
    """See the module's text. `reuses`: KV of one prompt may serve another."""

    def __init__(self, config: EngineConfig, num_pages: int, reuses: bool) -> None:
        self.page = config.page_size
        self.pool = PagePool(num_pages)
        policy = make_policy(config.eviction_policy)
        self.tree = RadixTree(self.pool, self.page, policy, enabled=reuses and not config.disable_radix_cache)
        self.tree_state = 0
        """Another number whenever the tree may have changed."""

    @property
    def obtainable(self) -> int:
        """Pages that are free or can be evicted."""
        return self.pool.num_free + self.tree.num_evictable

    def allocate(self, n: int) -> list[int]:
        """Return n pages, evicting from the tree if needed; callers made sure that they are obtainable."""
        short = n - self.pool.num_free
        if short > 0:
            self.tree.evict(short)
            self.tree_state += 1
        pages: list[int] = self.pool.allocate(n).tolist()
        return pages

    def insert(self, request: Request, ids: np.ndarray) -> None:
        """Give the pages of these tokens to the tree, as far as it lacks them, and lock them there.

        Not what was computed behind pages that were expelled meanwhile.
        """
        if request.node is not None and request.node.namespace != request.namespace:
            return
        count = -(-len(ids) // self.page)
        done = self.tree.insert(ids, np.array(request.pages[:count], dtype=np.int32), request.namespace)
        if request.scores is not None:
            request.scores.keep(self.tree, ids, request.namespace)
        request.owned[done.taken_from : count] = [False] * max(count - done.taken_from, 0)
        self.tree.lock(done.node)
        if request.node is not None:
            self.tree.unlock(request.node)
        request.node = done.node
        self.tree_state += 1

    def keep(self, request: Request, pin: int = 0) -> None:
        """Give what is computed to the tree, free the rest, drop the lock; `pin` gets one of its own."""
        if request.computed and self.tree.enabled:
            self.insert(request, request.ids()[: request.computed])
            if pin and request.node is not None and request.node.namespace == request.namespace:
                self.tree.pins.hold(pin, request.node)
        self.drop(request)

    def drop(self, request: Request) -> None:
        """Free its own pages and drop its lock on the tree's."""
        self.pool.free([p for p, own in zip(request.pages, request.owned, strict=True) if own])
        if request.node is not None:
            self.tree.unlock(request.node)
        request.pages, request.owned, request.node = [], [], None

    def match(self, request: Request) -> Match:
        """Return the cached prefix that it may use; see Request.reusable."""
        return self.tree.match(self._usable(request), request.namespace)

    def matched(self, request: Request) -> int:
        """How many tokens `match` would find; remembered while the tree does not change."""
        if request.matched[0] != self.tree_state:
            tokens = self.tree.match_length(self._usable(request), request.namespace)
            request.matched = (self.tree_state, tokens)
        return request.matched[1]

    def _usable(self, request: Request) -> np.ndarray:
        if request.scores is not None:
            request.scores.look_up(self.tree, request.ids(), request.namespace)
        return request.ids()[: request.reusable]

    def partial_page(self, number: int, running: list[Request], request: Request, match: Match) -> tuple[int, int]:
        """Return (page, tokens) that continue the match inside a page, to be copied: the tree's or a running request's.

        A running request's last page is its own, for it still grows, but what is computed in it never changes. Not
        of one seated in this very window, `number`: its page may wait for a copy of its own.
        """
        page, tokens = match.partial_page, match.partial_tokens
        start = len(match.pages) * self.page
        wanted = request.ids()[start : min(start + self.page, request.reusable)]
        for other in running:
            if other.node is match.node and other.window != number and other.computed > start + tokens:
                shared = common_prefix(wanted, other.ids()[start : other.computed])
                if shared > tokens:
                    page, tokens = other.pages[len(match.pages)], shared
        return page, tokens

    def give_up_pin(self, idle: bool) -> bool:
        """Give up a pin, so that a request fits: while others run only of the half that pins have beyond their half."""
        pins = self.tree.pins
        return (idle or 2 * pins.pages() > self.pool.num_pages) and pins.drop()

    def expel(self, request: Request) -> int:
        """What it used of the tree may be the cause, and what it gave to it is wrong: others compute it afresh.

        Returns how many pages the tree lost.
        """
        self.tree_state += 1
        return self.tree.expel(request.ids(), request.namespace)

    def prefix_is_coming(self, request: Request, prefilling: Iterable[Request]) -> bool:
        """Whether a prefilling request is about to provide a much longer prefix than the tree has now."""
        if not self.tree.enabled:
            return False
        ids, reach = request.ids(), 0
        head = ids[:IN_BATCH_PREFIX].tobytes()
        for other in prefilling:
            provided = other.ids()[: other.target]
            if other.namespace != request.namespace or provided[:IN_BATCH_PREFIX].tobytes() != head:
                continue
            shared = common_prefix(ids[:-1], provided) // self.page * self.page
            if request.scores is not None and (other.scores is None or not other.scores.provides(request.scores)):
                shared = min(shared, request.reusable)
            if shared > max(reach, other.confirmed):
                reach = shared
        return reach > 0 and reach - self.matched(request) >= IN_BATCH_PREFIX

    def clear(self) -> None:
        """Forget all KV that no running request uses."""
        self.tree.clear()
        self.tree_state += 1
