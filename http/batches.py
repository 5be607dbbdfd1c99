"""/v1/batches: create, list, retrieve, cancel. The work is batch_runner.py's.

Routed by app.py; kept by batch_store.py. Invariant: a client sees the batches of its own API key only.
"""

from functools import partial
from typing import Final

import msgspec

from ..errors import RequestError
from . import batch_store
from .batch_types import BatchQuery, BatchRequest
from .error_replies import decode_body
from .exchange import Exchange
from .protocol import encode
from .service import Service

_decoder: Final = msgspec.json.Decoder(BatchRequest)


async def create(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/batches."""
    store = service.data
    request = decode_body(_decoder, await exchange.body(service.config.max_body_bytes))
    if request.endpoint not in service.batch_endpoints:
        what = f"endpoint must be one of {', '.join(service.batch_endpoints)}"
        raise RequestError(what, param="endpoint", code="unsupported_value")
    batch = await store.do(partial(batch_store.create, owner=exchange.owner, request=request))
    service.new_batch.set()
    await exchange.reply(encode(batch))


async def list_batches(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/batches: `after`, `limit`; newest first."""
    query = exchange.query(BatchQuery)
    work = partial(batch_store.list_batches, owner=exchange.owner, after=query.after, limit=query.limit)
    await exchange.reply(encode(await service.data.do(work)))


async def retrieve(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/batches/{id}."""
    _, batch = await service.data.do(partial(batch_store.get, owner=exchange.owner, name=exchange.path_id))
    await exchange.reply(encode(batch))


async def cancel(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/batches/{id}/cancel: what has no answer yet gets none."""
    batch = await service.data.do(partial(batch_store.cancel, owner=exchange.owner, name=exchange.path_id))
    await exchange.reply(encode(batch))
