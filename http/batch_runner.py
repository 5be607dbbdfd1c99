"""BatchRunner: does the lines of /v1/batches between live requests. One task of the front.

Lines go the way that requests from outside go, at the lowest priority. They are started while no live request is in the
engine, and one at a time while there is one: a batch always moves, and never by many rows of somebody's decode step.
Invariant: a line's answer is on disk before the line counts as done; what the end of the process or of an actor cut off
is done again, and nothing else.
"""

import asyncio
import contextlib
import logging
import time
from functools import partial
from typing import Any, Final

import msgspec

from . import batch_store
from .batch_store import Job, Line
from .batch_types import InputLine, LineError, LineResponse, OutputLine, line_body
from .data_store import DataStore
from .error_replies import RETRY_STATUSES
from .inner_call import inner_call
from .protocol import LOWEST_PRIORITY
from .service import Service

log = logging.getLogger("actorserve.http")

SHARE: Final = 0.75
"""Of the engine's rows, what batches take at most: a live request finds one free."""
ROWS: Final = 64
"""The engine's rows, where --max-running-requests does not say."""
LOOK_SECONDS: Final = 0.1
RETRY_SECONDS: Final = 1.0
OTHERS_SECONDS: Final = 1.0
MOST_TRIES: Final = 20
"""Of a line under which a part of the engine went down again and again."""
_decoder: Final = msgspec.json.Decoder(InputLine)
_EXPIRED: Final = LineError("batch_expired", "the completion window ended before the line's turn")
_CANCELLED: Final = LineError("batch_cancelled", "the batch was cancelled before the line's turn")


class BatchRunner:
    """See the module's text."""

    def __init__(self, service: Service, store: DataStore) -> None:
        self._service = service
        self._store = store
        self._running: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None
        config = service.config
        rows = int(SHARE * (config.max_running_requests or ROWS))
        self._most = max(1, min(rows, config.max_queued_requests // 2))

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                job = await self._store.do(batch_store.next_job)
                if job is None:
                    await self._new_batch()
                else:
                    await self._advance(job)
            except Exception:
                log.exception("a batch cannot go on; trying again")
                await asyncio.sleep(RETRY_SECONDS)
            finally:
                await self._drop()

    async def _new_batch(self) -> None:
        """Wait for one; of those that come to other fronts, nobody tells."""
        seconds = OTHERS_SECONDS if self._service.config.http_workers > 1 else None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._service.new_batch.wait(), seconds)
        self._service.new_batch.clear()

    async def _advance(self, job: Job) -> None:
        """Bring a batch to its next status."""
        match job.batch.status:
            case "validating":
                most = self._service.config.max_body_bytes
                await self._store.do(partial(batch_store.validate, job=job, most_bytes=most))
            case "cancelling":
                await self._store.do(partial(batch_store.finish, job=job, end="cancelled", reason=_CANCELLED))
            case _:
                if await self._answer_all(job):
                    await self._store.do(partial(batch_store.finish, job=job, end="completed"))

    async def _answer_all(self, job: Job) -> bool:
        """Answer what has no answer; False if the batch was ended before that."""
        last = -1
        while True:
            if time.time() >= job.batch.expires_at:
                await self._drop()
                await self._store.do(partial(batch_store.finish, job=job, end="expired", reason=_EXPIRED))
                return False
            if await self._store.do(partial(batch_store.status, row=job.row)) == "cancelling":
                return False
            room = self._room()
            lines = await self._store.do(partial(batch_store.open_lines, job=job, after=last, limit=room))
            for line in lines:
                last = line.place
                self._start(job, line)
            await self._look()
            if not self._running and not lines and room:
                return True

    def _room(self) -> int:
        """How many lines may be started now."""
        client = self._service.client
        if client.draining or client.reason_down() is not None:
            return 0
        most = 1 if client.busy(LOWEST_PRIORITY) else self._most
        return max(0, most - len(self._running))

    def _start(self, job: Job, line: Line) -> None:
        task = asyncio.create_task(self._answer(job, line))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed = task.exception()

    async def _look(self) -> None:
        """Wait until it is worth looking again. Raises what a line's task raised: the disk is full, or the like."""
        if self._running:
            await asyncio.wait(self._running, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        elif not self._room():
            await asyncio.sleep(LOOK_SECONDS)
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    async def _drop(self) -> None:
        """Stop the lines that run; they stay without an answer."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _answer(self, job: Job, line: Line) -> None:
        """Ask for a line's answer until there is one, and keep it."""
        request = _decoder.decode(line.request)
        output, good = await ask(self._service, request, job.owner, priority=LOWEST_PRIORITY)
        await self._store.do(partial(batch_store.answer, row=job.row, place=line.place, good=good, line=output))


async def ask(service: Service, request: InputLine, owner: str = "", **fields: Any) -> tuple[OutputLine, bool]:
    """Return (the answer to a line, whether it is a good one). While the engine refuses work, this waits.

    `fields` are set in the line's body; nothing is streamed.
    """
    tries = 0
    name = batch_store.new_line_id()
    body = line_body(request.body, stream=False, **fields)
    while True:
        reply = await inner_call(service.batch_endpoints[request.url], request.url, body, owner, name)
        if reply.status not in RETRY_STATUSES or tries >= MOST_TRIES:
            break
        client = service.client
        if reply.status == 503 and not client.draining and client.reason_down() is None:
            tries += 1
        await asyncio.sleep(RETRY_SECONDS)
    response = LineResponse(reply.status, name, msgspec.Raw(reply.body))
    return OutputLine(name, request.custom_id, response, None), reply.status == 200
