"""The scheduler's requests that the fsm actor follows, and what that actor knows of each.

Used by the scheduler actor, which sends what `due` says and hands in what comes back. Invariant: a request is asked for
its next mask exactly once for each of its tokens, and again from its first one when the fsm actor has died; that it
ended is said once.
"""

from dataclasses import dataclass

import numpy as np

from .messages import Masks, Match, Unmatch
from .request import Request, Stage


@dataclass(slots=True, eq=False)
class Followed:
    """A request, and how many of its generated tokens the fsm actor was sent; -1: it does not know the request."""

    request: Request
    known: int = -1


class GuidedRequests:
    """See the module's text."""

    def __init__(self) -> None:
        self._followed: dict[int, Followed] = {}

    def add(self, request: Request) -> None:
        """Follow a request from now on."""
        self._followed[request.rid] = Followed(request)

    def due(self) -> list[Match | Unmatch]:
        """Say what the fsm actor must be sent now, and take it for sent."""
        messages: list[Match | Unmatch] = []
        for rid, followed in list(self._followed.items()):
            request = followed.request
            if request.stage is Stage.ENDED:
                del self._followed[rid]
                messages.append(Unmatch(rid))
            elif request.waits_for_mask and request.generated > followed.known:
                messages.append(self._match(followed))
        return messages

    def _match(self, followed: Followed) -> Match:
        request, start = followed.request, max(followed.known, 0)
        assert request.guided is not None
        ids = request.tokens[request.prompt_length + start :]
        grammar = request.guided.grammar if not start else ""
        followed.known = request.generated
        return Match(request.rid, start, memoryview(ids.tobytes()), grammar)

    def came(self, m: Masks) -> list[Request]:
        """Give the masks to their requests; returns those that can draw now."""
        rids, lengths = np.frombuffer(m.rids, np.int64).tolist(), np.frombuffer(m.lengths, np.int32).tolist()
        masks = np.frombuffer(m.bitmask, np.int32).reshape(len(rids), -1)
        ready = []
        for rid, length, mask in zip(rids, lengths, masks, strict=True):
            followed = self._followed.get(rid)
            if followed is not None and followed.request.generated == length:
                request = followed.request
                assert request.guided is not None
                request.guided.mask = mask.copy()  # the lane's memory is reused
                ready.append(request)
        return ready

    def lost(self) -> None:
        """There is another fsm actor, which knows nothing; what was sent since the last one died is lost."""
        for followed in self._followed.values():
            followed.known = -1
