"""The replicas as the text actor sees them: which are up and serve, what each has, and which one gets a request.

A replica is a scheduler with its executors (topology.py); in most engines there is one. A request stays with the
replica that it was sent to, also while that is down: what killed one replica is not handed to the next. But another
machine's may be gone for long: what it had goes to others as soon as one serves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..config import EngineConfig
from .messages import NO_STATS, Stats
from .router import Router
from .topology import schedulers_among
from .totals import serves


@dataclass(slots=True, eq=False)
class Replica:
    """One of them. `scheduler` is the name of its actor."""

    number: int
    scheduler: str
    stats: Stats
    """Its scheduler's last ones."""
    remote: bool = False
    """It is on another machine."""
    up: bool = False
    """Its scheduler knows all that is here: it was told when it came up."""
    requests: int = 0
    """That it was sent and that are not over."""
    stale: bool = False
    """It came back without the weights that were exchanged meanwhile."""

    @property
    def serves(self) -> bool:
        """Whether all of it is up."""
        return self.up and serves(self.stats) and not self.stale

    @property
    def away(self) -> bool:
        """With its machine: nobody knows when it will be back."""
        return self.remote and not self.up

    @property
    def gone(self) -> bool:
        """It has no requests now, and may have none for long."""
        return self.away or self.stale


class Replicas:
    """All of them, by number."""

    def __init__(self, config: EngineConfig, peers: tuple[str, ...]) -> None:
        """`peers`: the actors that this one may send to, the schedulers among them."""
        names = schedulers_among(peers)
        self._all = [Replica(i, name, replace(NO_STATS, dp_rank=i)) for i, name in enumerate(names)]
        for replica in self._all:
            machine = config.machine_of(replica.number)
            if machine != config.node_rank:
                replica.remote = True
                replica.stats = replace(replica.stats, down=f"node {machine} has not joined")
        self._by_name = {replica.scheduler: replica for replica in self._all}
        self._router = Router(config) if len(names) > 1 else None

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def __getitem__(self, number: int) -> Replica:
        return self._all[number]

    def __len__(self) -> int:
        return len(self._all)

    def named(self, actor: str) -> Replica | None:
        """The one whose scheduler has this name; None for the name of another actor."""
        return self._by_name.get(actor)

    def choose(self, ids: NDArray[np.int32], salt: str, rank: int | None, pinned: int | None = None) -> Replica:
        """The one for a prompt: of this `rank`, unless that is gone; else where its `pinned` prefix is, if that serves;
        else the router's."""
        if self._router is None:
            return self._all[0]
        if rank is not None and self._all[rank].gone:
            rank = None
        if rank is None and pinned is not None and self._all[pinned].serves:
            rank = pinned
        among = [rank] if rank is not None else self._welcoming()
        return self._all[self._router.choose(ids, salt, [replica.requests for replica in self._all], among)]

    def _welcoming(self) -> list[int]:
        """Those that serve; where none does those that are as near to it as any."""
        serve = [replica.number for replica in self._all if replica.serves]
        known = [replica for replica in self._all if not replica.gone]
        return serve or [replica.number for replica in known if replica.up] or [replica.number for replica in known]

    def lost_cache(self, replica: Replica) -> None:
        """Nothing is cached there any more."""
        if self._router is not None:
            self._router.lost(replica.number)
