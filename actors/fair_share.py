"""FairShare: whose turn it is among tenants that wait, by the tokens that each has had.

Part of the scheduler's decisions (schedule.py). The Virtual Token Counter of Sheng et al., "Fairness in Serving Large
Language Models" (OSDI 2024): the tenant with the least tokens for its weight goes first, and who comes back from being
idle starts level with the others. Invariant: among requests of one tenant, and with one tenant only, the policy's order
stands; a higher priority goes first whoever's it is.
"""

import heapq
from collections import deque
from collections.abc import Iterable

from .request import Request


class FairShare:
    """`served`: tokens computed for each tenant, prompts and outputs, divided by its weight."""

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._active: set[str] = set()

    def charge(self, request: Request) -> None:
        """Count the tokens of a seated request that were not counted yet."""
        new = len(request.tokens) - request.charged
        if new > 0:
            self.served[request.tenant] = self.served.get(request.tenant, 0.0) + new / request.weight
            request.charged = len(request.tokens)

    def arrange(self, waiting: list[Request], running: Iterable[Request]) -> list[Request]:
        """Return the waiting requests, which come in the policy's order, so that tenants take turns."""
        if len({request.tenant for request in waiting}) < 2:
            return waiting
        active = {request.tenant for request in waiting}
        for request in running:
            self.charge(request)
            active.add(request.tenant)
        self._lift(active)
        queues: dict[str, deque[Request]] = {}
        for request in waiting:
            queues.setdefault(request.tenant, deque()).append(request)
        heap = [(-queue[0].priority, self.served[name], name) for name, queue in queues.items()]
        heapq.heapify(heap)
        order = []
        while heap:
            _, served, name = heap[0]
            queue = queues[name]
            request = queue.popleft()
            order.append(request)
            if queue:
                cost = len(request.tokens) / request.weight
                heapq.heapreplace(heap, (-queue[0].priority, served + cost, name))
            else:
                heapq.heappop(heap)
        return order

    def _lift(self, active: set[str]) -> None:
        """Those who were idle begin level with the least served of those who were not: what they left is gone."""
        stayed = [self.served.get(name, 0.0) for name in active & self._active]
        level = min(stayed, default=0.0)
        for name in active:
            before = self.served.get(name, 0.0)
            self.served[name] = before if name in self._active else max(before, level)
        self._active = active
