"""GET /v1/loads and /get_load, as SGLang's, and /load, as vLLM's: how busy the engine is, for who spreads requests.

Routed by app.py. Invariant: the numbers are the scheduler's last report, at most a moment old; nothing is asked of it.
"""

import time
from datetime import UTC, datetime
from typing import Annotated, Final

from msgspec import UNSET, Meta, Struct, UnsetType

from ..actors.messages import Stats
from ..errors import EngineDown, RequestError
from .control_routes import package_version
from .exchange import Exchange
from .protocol import encode
from .service import Service

SECTIONS: Final = ("core", "memory", "spec", "lora", "disagg", "queues", "all")
"""What `include` may name; an engine without a part says nothing of it."""


class LoadQuery(Struct, frozen=True):
    """`include`: sections by name, with commas between them. There is one engine, whose rank is 0."""

    include: Annotated[str, Meta(max_length=256)] = "all"
    dp_rank: Annotated[int, Meta(ge=0, le=0)] | None = None


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
    sections = exchange.query(LoadQuery).include.split(",")
    for section in sections:
        if section not in SECTIONS:
            what = f"include names {section!r}; there are: {', '.join(SECTIONS)}"
            raise RequestError(what, param="include")
    one = _load(service, queues=bool({"queues", "all"} & set(sections)))
    total = TotalLoad(
        one.num_running_reqs,
        one.num_waiting_reqs,
        one.num_running_reqs + one.num_waiting_reqs,
        one.token_usage,
        one.gen_throughput,
        one.utilization,
    )
    now = datetime.fromtimestamp(one.timestamp, UTC).isoformat()
    await exchange.reply(encode(Loads(now, package_version(), 1, [one], total)))


async def get_load(service: Service, exchange: Exchange) -> None:
    """Serve GET /get_load: SGLang's of old, see /v1/loads."""
    one = _load(service)
    requests = one.num_running_reqs + one.num_waiting_reqs
    await exchange.reply(encode([OldLoad(one.dp_rank, requests, one.num_waiting_reqs, one.num_used_tokens)]))


async def server_load(service: Service, exchange: Exchange) -> None:
    """Serve GET /load: vLLM's, how many requests there are."""
    stats = _stats(service)
    await exchange.reply(encode(ServerLoad(stats.running + stats.waiting)))


def _stats(service: Service) -> Stats:
    if service.client.stats is None:
        raise EngineDown("the scheduler has not reported yet; try again")
    return service.client.stats


def _load(service: Service, queues: bool = False) -> Load:
    stats, page, most = _stats(service), service.config.page_size, service.config.max_running_requests
    usage = stats.pages_running / max(1, stats.pages_total)
    return Load(
        dp_rank=0,
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
