"""HttpFront: the actor that speaks HTTP. uvicorn on uvloop, the Starlette application, and a Client to the engine.

The supervisor runs one process of it (or several on one listening socket, handed over as files["listen"]).
Invariant: everything runs in one event loop, and output in slices, so that no request waits for all that is written.
At the end running streams may finish until Drain's deadline, and get a last error event then, never a silent cut.
"""

import asyncio
import functools
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final, Literal

import uvicorn

from ..actors.actor import Actor, Context
from ..actors.client import Client
from ..actors.messages import Chunk, Chunks, Drain, FrontInbox
from ..actors.stream import LoopWakeup
from ..errors import Overloaded, StartupError
from .app import build_app
from .batch_runner import BatchRunner
from .connection import limited
from .data_store import DataStore
from .metrics import Metrics
from .service import Service
from .tracing import Tracer

KEEP_ALIVE_SECONDS: Final = 75
POLL_SECONDS: Final = 0.02
SLICE: Final = 16
"""Chunks in a row; then requests have their turn. They take a fifth of a millisecond where caches are warm."""
FIRST: Final = "front.0"
"""Of several fronts, the one that does the lines of batches."""


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the supervisor says when to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpFront(Actor):
    """See the module's text."""

    inbox_type: ClassVar[Any] = FrontInbox
    loop: ClassVar[Literal["trio", "asyncio"]] = "asyncio"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        metrics = Metrics(context.config.dp_size)
        self.client = Client(
            context.ref("text"),
            context.config,
            context.model,
            index=int(context.name.rpartition(".")[2]),
            epoch=context.epoch,
            on_end=metrics.observe,
            new_wakeup=LoopWakeup,
        )
        several = context.config.http_workers > 1
        store = None
        if context.config.data_dir:
            store = DataStore(context.config.data_dir, os.getppid() if several else None)
        tracer = Tracer(context.config.otlp_endpoint) if context.config.otlp_endpoint else None
        self.service = Service(
            self.client, context.config, context.model, metrics, int(time.time()), store=store, tracer=tracer
        )
        self._server = Server(server_config(self.service))
        self._server.servers = []
        self._served = asyncio.Event()
        self._deadline_ns = 0
        """Until then running requests may end; Drain's."""
        self._late: list[Chunk] = []
        """Received, and not delivered yet; nothing else is received meanwhile."""
        self._again: asyncio.Handle | None = None
        """The next `drain`, where one is due whatever arrives."""

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        inbox = self.context.inbox
        # The descriptor stays the node's: the server closes its own copy.
        listener = socket.socket(fileno=os.dup(self.context.files["listen"]))
        loop.add_reader(inbox.fileno(), self.drain)
        batches = asyncio.create_task(self._run_batches())
        try:
            await self._server.serve(sockets=[listener])
            self._served.set()
            await asyncio.Event().wait()  # an actor's run ends by cancellation only
        finally:
            batches.cancel()
            await asyncio.gather(batches, return_exceptions=True)
            if self.service.store is not None:
                self.service.store.close()
            if self.service.tracer is not None:
                await self.service.tracer.close()
            loop.remove_reader(inbox.fileno())
            if self._again is not None:
                self._again.cancel()
            for server in self._server.servers:
                server.close()

    def drain(self) -> None:
        """Receive what has arrived, at most SLICE chunks and messages. For the rest it comes again by itself, or
        `inbox.fileno()` stays readable."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        inbox, room, look = self.context.inbox, SLICE, True
        while room > 0:
            if self._late:
                chunks, self._late = self._late[:room], self._late[room:]
                self.client.deliver(chunks)
                room -= len(chunks)
                continue
            item = inbox.poll(look=look)
            look = False
            if item is None:
                break
            if isinstance(item[0], Chunks):
                self._late = item[0].chunks
            else:
                self.receive(*item)
                room -= 1
        if self._late:
            self._again = asyncio.get_running_loop().call_soon(self.drain)
        else:
            inbox.listen()

    def receive(self, message: Any, source: str) -> None:
        """Pass messages to the client; from a Drain on, new requests are refused and old ones have a deadline."""
        self.client.receive(message, source)
        if isinstance(message, Drain):
            self._deadline_ns = message.deadline_ns
            seconds = (message.deadline_ns - time.monotonic_ns()) / 1e9
            asyncio.get_running_loop().call_later(max(0.0, seconds), self._end_requests)

    async def stop(self) -> None:
        """Leave running requests their time, end the rest with an error, and close all connections."""
        # Until then connections are taken and answered with 503: the listening socket is the supervisor's too, so
        # who came after a close would hang in its queue.
        self.client.draining = True
        begun = set(self._server.server_state.tasks)
        while self.client.table or not all(task.done() for task in begun):
            if time.monotonic_ns() >= self._deadline_ns:
                break
            await asyncio.sleep(POLL_SECONDS)
        self._end_requests()
        self._server.should_exit = True
        await self._served.wait()

    async def _run_batches(self) -> None:
        if self.service.store is not None and self.context.name == FIRST:
            await BatchRunner(self.service, self.service.store).run()

    def _end_requests(self) -> None:
        self.client.fail_all(Overloaded("the server is shutting down; try again", status=503))


def server_config(service: Service) -> uvicorn.Config:
    """Return how uvicorn runs the application: httptools, TLS if asked for, no banner, no websockets.

    Raises StartupError for a certificate that cannot be used.
    """
    settings = service.config
    config = uvicorn.Config(
        build_app(service),
        loop="none",
        http=limited(settings, functools.partial(service.metrics.count, "none")),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
    )
    if settings.ssl_certfile is None and (settings.ssl_keyfile or settings.ssl_ca_certs):
        raise StartupError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise StartupError(f"--ssl-certfile {settings.ssl_certfile}: {error}") from error
    return config
