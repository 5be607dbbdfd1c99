"""GET /v1/loads and /get_load, as SGLang's, and /load, as vLLM's: how busy the engine is, for who spreads requests.

Routed by app.py. Invariant: the numbers are the schedulers' last reports, at most a moment old; nothing is asked of
them.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Final

from msgspec import UNSET, Meta, Struct, UnsetType

from ..actors.admission import no_replica
from ..actors.messages import Stats
from ..errors import EngineDown, RequestError
from .control_routes import package_version
from .exchange import Exchange
from .protocol import DpRank, encode
from .service import Service

SECTIONS: Final = ("core", "memory", "spec", "lora", "disagg", "queues", "all")
"""What `include` may name; an engine without a part says nothing of it."""


class LoadQuery(Struct, frozen=True):
    """`include`: sections by name, with commas between them. `dp_rank`: of this replica only."""

    include: Annotated[str, Meta(max_length=256)] = "all"
    dp_rank: DpRank | None = None


class QueueLoad(Struct, frozen=True):
    """`waiting`: all that wait; of these `grammar` for a grammar to be compiled."""

    waiting: int
    grammar: int


class Load(Struct, frozen=True):
    """`num_used_tokens`: in pages of running requests alone, without what the prefix cache could give up.

    `gen_throughput`: tokens a second at the present steps' pace. `utilization`: the larger of token_usage and the share
    of running requests that are the most, where there is such a number.
    """

    dp_rank: int
    timestamp: float
    num_running_reqs: int
    num_waiting_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float
    gen_throughput: float
    cache_hit_rate: float
    utilization: float
    max_running_requests: int | None
    queues: QueueLoad | UnsetType = UNSET


class TotalLoad(Struct, frozen=True):
    total_running_reqs: int
    total_waiting_reqs: int
    total_reqs: int
    avg_token_usage: float
    avg_throughput: float
    avg_utilization: float


class Loads(Struct, frozen=True):
    """`timestamp`: ISO 8601, UTC."""

    timestamp: str
    version: str
    dp_rank_count: int
    loads: list[Load]
    aggregate: TotalLoad


class OldLoad(Struct, frozen=True):
    """SGLang's /get_load: `num_reqs` is running and waiting ones together."""

    dp_rank: int
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


class ServerLoad(Struct, frozen=True):
    """vLLM's /load: requests that are being worked on or wait."""

    server_load: int


async def loads(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/loads."""
    query = exchange.query(LoadQuery)
    sections = query.include.split(",")
    for section in sections:
        if section not in SECTIONS:
            what = f"include names {section!r}; there are: {', '.join(SECTIONS)}"
            raise RequestError(what, param="include")
    if query.dp_rank is not None and query.dp_rank >= service.config.dp_size:
        raise no_replica(query.dp_rank, service.config, "dp_rank")
    found = _loads(service, queues=bool({"queues", "all"} & set(sections)))
    if query.dp_rank is not None:
        found = [one for one in found if one.dp_rank == query.dp_rank]
    running, waiting = sum(one.num_running_reqs for one in found), sum(one.num_waiting_reqs for one in found)
    total = TotalLoad(
        running,
        waiting,
        running + waiting,
        _mean([one.token_usage for one in found]),
        _mean([one.gen_throughput for one in found]),
        _mean([one.utilization for one in found]),
    )
    now = datetime.now(UTC).isoformat()
    await exchange.reply(encode(Loads(now, package_version(), service.config.dp_size, found, total)))


async def get_load(service: Service, exchange: Exchange) -> None:
    """Serve GET /get_load: SGLang's of old, see /v1/loads."""
    found = [
        OldLoad(one.dp_rank, one.num_running_reqs + one.num_waiting_reqs, one.num_waiting_reqs, one.num_used_tokens)
        for one in _loads(service)
    ]
    await exchange.reply(encode(found))


async def server_load(service: Service, exchange: Exchange) -> None:
    """Serve GET /load: vLLM's, how many requests there are."""
    await exchange.reply(encode(ServerLoad(sum(stats.running + stats.waiting for stats in _reports(service)))))


def _reports(service: Service) -> list[Stats]:
    reports = service.client.reports()
    if not reports:
        raise EngineDown("the scheduler has not reported yet; try again")
    return reports


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _loads(service: Service, queues: bool = False) -> list[Load]:
    """Of each replica that has reported."""
    return [_load(service, stats, queues) for stats in _reports(service)]


def _load(service: Service, stats: Stats, queues: bool) -> Load:
    page, most = service.config.page_size, service.config.max_running_requests
    usage = stats.pages_running / max(1, stats.pages_total)
    return Load(
        dp_rank=stats.dp_rank,
        timestamp=time.time(),
        num_running_reqs=stats.running,
        num_waiting_reqs=stats.waiting,
        num_used_tokens=stats.pages_running * page,
        max_total_num_tokens=stats.pages_total * page,
        token_usage=usage,
        gen_throughput=stats.running / stats.step_us * 1e6 if stats.step_us else 0.0,
        cache_hit_rate=stats.cached_tokens / max(1, stats.prompt_tokens),
        utilization=max(usage, stats.running / most) if most else usage,
        max_running_requests=most,
        queues=QueueLoad(stats.waiting, stats.grammar_waiting) if queues else UNSET,
    )
