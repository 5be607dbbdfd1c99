"""Service: what every HTTP handler needs, in one object that the front makes and hands to the routes.

Invariant: but for what is stored and the last look at the engine it is immutable, and it has no behaviour of its own
beyond answering "who are we and are we well".
"""

import asyncio
from dataclasses import dataclass, field

from starlette.types import ASGIApp

from ..actors.admission import no_replica
from ..actors.client import Client
from ..config import EngineConfig, ModelInfo
from ..errors import RequestError
from .data_store import DataStore
from .engine_view import Watch
from .metrics import Metrics
from .protocol import Health
from .response_store import ResponseStore
from .resume import EventLogs
from .tenants import TenantClient
from .tracing import Tracer


@dataclass(frozen=True, slots=True)
class Service:
    """`started` is Unix time in seconds. `batch_endpoints`: what answers a batch's lines, by path."""

    client: Client | TenantClient
    config: EngineConfig
    model: ModelInfo
    metrics: Metrics
    started: int
    responses: ResponseStore = field(default_factory=ResponseStore)
    watch: Watch = field(default_factory=Watch)
    streams: EventLogs = field(default_factory=EventLogs)
    store: DataStore | None = None
    tracer: Tracer | None = None
    new_batch: asyncio.Event = field(default_factory=asyncio.Event)
    batch_endpoints: dict[str, ASGIApp] = field(default_factory=dict)

    @property
    def data(self) -> DataStore:
        """Where files and batches are kept; raises RequestError (404) without --data-dir."""
        if self.store is None:
            what = "this server keeps no files and batches; start it with --data-dir FOLDER"
            raise RequestError(what, code="no_data_dir", status=404)
        return self.store

    @property
    def model_name(self) -> str:
        """The name in /v1/models and in replies."""
        return self.config.served_model_name or self.model.name

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) for a model that is not served; no name means the served one."""
        if name and name != self.model_name:
            raise RequestError(
                f"the model `{name}` does not exist; this server has `{self.model_name}`",
                param="model",
                code="model_not_found",
                status=404,
            )

    def rank_of(self, routed_dp_rank: int | None, data_parallel_rank: int | None) -> int | None:
        """Return the replica that a request names, in SGLang's field or in its older one; None: any.

        Raises RequestError for one that there is not.
        """
        newer = routed_dp_rank is not None
        rank = routed_dp_rank if newer else data_parallel_rank
        if rank is not None and rank >= self.config.dp_size:
            raise no_replica(rank, self.config, "routed_dp_rank" if newer else "data_parallel_rank")
        return rank

    def check_batch(self, count: int, param: str) -> None:
        """Raise RequestError for a list of too many prompts."""
        most = self.config.max_batch_prompts
        if count > most:
            raise RequestError(f"{param} has {count} entries; the most is {most}", param=param, code="too_many")

    def health(self) -> Health:
        """Return "ok" when text actor, scheduler and executor are up; of several replicas, those of one."""
        reason = self.client.reason_down()
        return Health("ok", self.client.reason_degraded()) if reason is None else Health("unavailable", reason)

    def readiness(self) -> Health:
        """Return "ok" when new requests are welcome."""
        if self.client.draining:
            return Health("draining", "the server is shutting down")
        return self.health()
