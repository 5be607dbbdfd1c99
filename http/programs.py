"""POST /v1/programs: whole programs of the frontend language, sent as data, run here beside the engine.

The program's statements go to lang/replay.py, which uses the engine as this request's tenant. Invariant: when the
reply is sent, or the client has gone, nothing of the program runs any more.
"""

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec

from ..errors import ActorserveError
from ..lang.remote import ProgramRequest
from .error_replies import decode_body
from .exchange import Exchange
from .protocol import encode
from .service import Service

if TYPE_CHECKING:
    from ..lang.loop import Tasks
    from ..lang.remote import ProgramReply

_decoder: Final = msgspec.json.Decoder(ProgramRequest)


class _Running:
    """A program at work, which a client that goes away cancels."""

    def __init__(self, reply: "asyncio.Task[ProgramReply]", tasks: "Tasks") -> None:
        self.reply = reply
        self._tasks = tasks
        self._error: ActorserveError | None = None

    def cancel(self, error: ActorserveError | None = None) -> None:
        """End the program; whoever waits for it gets the error."""
        self._error = self._error or error
        self.reply.cancel()
        self._tasks.cancel()

    async def result(self) -> "ProgramReply":
        try:
            return await self.reply
        except asyncio.CancelledError:
            if self._error is None:
                raise
            raise self._error from None


async def run(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/programs: run a program of the frontend language."""
    from ..lang.replay import ServedBackend, ServedEngine, replay  # the engine's whole API, for those who use it

    request = decode_body(_decoder, await exchange.body(service.config.max_body_bytes))
    engine = ServedEngine(service.client, service.config, service.model)
    backend = ServedBackend(engine, request.template)
    running = _Running(asyncio.create_task(replay(request, backend)), backend.loop)
    try:
        async with exchange.watched(running):
            reply = await running.result()
    finally:
        await backend.close()
    await exchange.reply(encode(reply))
