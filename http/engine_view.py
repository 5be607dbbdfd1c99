"""GET /v1/engine/stats: what the engine is doing now, for the page at / and for whoever wants to draw it.

Routed by app.py. Invariant: one look at the engine serves all who ask within a moment, and none waits longer than
LOOK_SECONDS; an engine that is down is an answer here, not an error.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from msgspec import Struct

from ..actors.messages import Seen
from ..errors import ActorserveError
from .exchange import Exchange
from .protocol import encode

if TYPE_CHECKING:
    from ..actors.questions import Questions
    from .service import Service

NODES: Final = 240
"""Radix nodes of an answer, those nearest to the roots."""
REQUESTS: Final = 48
FRESH_SECONDS: Final = 0.1
LOOK_SECONDS: Final = 2.0


class ActorState(Struct, frozen=True):
    """`epoch`: how often it was started, 0 where that is not known."""

    name: str
    up: bool
    epoch: int


class LaneState(Struct, frozen=True):
    """A lane: `waiting` messages are in it now, `sent` were since it was made, `full` times there was no room."""

    source: str
    target: str
    up: bool
    waiting: int
    sent: int
    full: int


class TreeNode(Struct, frozen=True):
    """A run of tokens in the prefix cache. `parent` is -1 for a namespace's root; `locks`: requests that use it now;
    `hits`: prompts that found it."""

    id: int
    parent: int
    tokens: int
    pages: int
    locks: int
    hits: int


class Tree(Struct, frozen=True):
    """The prefix cache: `total` nodes, of which `nodes` has those nearest to the roots, level by level."""

    total: int
    nodes: list[TreeNode]


class RequestState(Struct, frozen=True):
    """A request in the engine; lengths in tokens. `computed`: how many have their KV; `limit`: the most it can get."""

    stage: Literal["waiting", "prefill", "decode"]
    prompt: int
    computed: int
    generated: int
    limit: int


class EngineStats(Struct, frozen=True):
    """`scheduler` is its last report (see /metrics for what the numbers mean), None before the first."""

    object: Literal["engine.stats"]
    model: str
    context_length: int
    page_size: int
    started: int
    time: float
    """Unix time of this look, seconds."""
    status: Literal["ok", "unavailable", "draining"]
    reason: str | None
    paused: bool
    scheduler: dict[str, Any] | None
    actors: list[ActorState]
    lanes: list[LaneState]
    requests: list[RequestState]
    tree: Tree


@dataclass(slots=True)
class Watch:
    """The last look at the engine, for all that ask within FRESH_SECONDS. `seen` is None where nobody answered."""

    seen: Seen | None = None
    at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def look(self, questions: "Questions") -> Seen | None:
        """Return a fresh look, or None where there is none to be had."""
        async with self.lock:
            if time.monotonic() - self.at > FRESH_SECONDS:
                self.seen = await self._ask(questions)
                self.at = time.monotonic()
        return self.seen

    async def _ask(self, questions: "Questions") -> Seen | None:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                return await questions.look(NODES, REQUESTS)
        except (ActorserveError, TimeoutError):
            return None


async def engine_stats(service: "Service", exchange: Exchange) -> None:
    """Serve GET /v1/engine/stats: actors, lanes, requests, pages and the radix tree, as they are now."""
    seen = await service.watch.look(service.client.questions)
    health = service.readiness()
    status, reason = health.status, health.reason
    if seen is None and status == "ok":
        status, reason = "unavailable", "the scheduler does not answer"
    stats = service.client.stats if seen is None else seen.stats
    reply = EngineStats(
        object="engine.stats",
        model=service.model_name,
        context_length=service.model.context_length,
        page_size=service.config.page_size,
        started=service.started,
        time=time.time(),
        status=status,
        reason=reason,
        paused=seen is not None and seen.paused,
        scheduler=None if stats is None else msgspec.structs.asdict(stats),
        actors=[] if seen is None else _actors(seen),
        lanes=[] if seen is None else msgspec.convert(seen.lanes, list[LaneState], from_attributes=True),
        requests=[] if seen is None else msgspec.convert(seen.requests, list[RequestState], from_attributes=True),
        tree=Tree(0, []) if seen is None else _tree(seen),
    )
    await exchange.reply(encode(reply), headers=[(b"cache-control", b"no-store")])


def _actors(seen: Seen) -> list[ActorState]:
    """Who has a lane, in the order in which a request meets them: an actor is up when a lane to or from it is."""
    up: dict[str, bool] = {}
    epochs: dict[str, int] = {}
    for lane in seen.lanes:
        epochs[lane.target] = max(epochs.get(lane.target, 0), lane.epoch)
        for name in (lane.source, lane.target):
            up[name] = up.get(name, False) or lane.up
    return [ActorState(name, up[name], epochs.get(name, 0)) for name in sorted(up)]


def _tree(seen: Seen) -> Tree:
    return Tree(seen.tree_nodes, msgspec.convert(seen.nodes, list[TreeNode], from_attributes=True))
