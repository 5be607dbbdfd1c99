"""`actorserve run`: from an EngineConfig to a served port, until a signal. Used by cli.py; it is the root process.

The root fetches the model's files, owns the listening socket, and supervises; the work is in its children. Invariant:
it stays free of torch, and when it ends nothing of the engine remains.
"""

import json
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import trio

from . import __version__
from .actors.machines import check_machines
from .actors.node import configure_logging
from .actors.supervisor import GiveUp, Supervisor
from .actors.topology import MeetingPoint, engine_topology, http_front
from .config import EngineConfig, ModelInfo
from .display import Display
from .errors import StartupError
from .member import meeting_point, members
from .models.resolve import resolve_model

BACKLOG = 2048
QUESTION = "What is the capital of France?"


def serve(config: EngineConfig) -> int:
    """Serve until SIGINT, SIGTERM or the end of the terminal; returns the exit code. Raises StartupError."""
    configure_logging("root" if config.nnodes == 1 else f"node {config.node_rank}", config.log_level)
    check_machines(config)
    with Display() as display:
        try:
            if config.node_rank:
                return trio.run(_until_signal, members(config, _resolved(config, display), display), 0.0)
            with listen(config.host, config.port) as listener, meeting_point(config) as point:
                model = _resolved(config, display)
                with shared_metrics(config.http_workers):
                    supervisor = _head(config, model, listener, point, display)
                    return trio.run(_until_signal, [supervisor], config.drain_timeout)
        except KeyboardInterrupt:
            return 0
        except GiveUp as error:
            display.line(f"actorserve: gave up: {error}")
            return 1


@contextmanager
def shared_metrics(fronts: int) -> Iterator[None]:
    """With several fronts each of them answers /metrics for all, from files in a folder that the library wants named
    by its variable before it is imported; see http/metrics.py."""
    if fronts == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="actorserve-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        yield


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that a half-made download or conversion is cleaned up."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def listen(host: str, port: int) -> socket.socket:
    """The listening socket, which outlives the front's restarts. Raises StartupError, e.g. when the port is taken."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise StartupError(f"--host {host} is not an address of this machine ({error.strerror})") from error
    except OSError as error:
        hint = "; pass another --port" if port else ""
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StartupError(f"cannot listen on {host} port {port}: {reason}{hint}") from error


def _resolved(config: EngineConfig, display: Display) -> ModelInfo:
    with terminate_as_interrupt():
        return resolve_model(config, display.transfer)


def _head(
    config: EngineConfig, model: ModelInfo, listener: socket.socket, point: MeetingPoint | None, display: Display
) -> Supervisor:
    """The engine behind the listening socket."""
    banner = greeting(model, base_url(config.host, listener, "https" if config.ssl_certfile else "http"))

    def on_event(kind: str, node: str, detail: str, fraction: float) -> None:
        display.event(kind, node, detail, fraction)
        if kind == "up":
            display.greet(banner)

    fronts = [http_front(i, listener.fileno()) for i in range(config.http_workers)]
    return Supervisor(engine_topology(config, fronts, point=point), config, model, on_event=on_event)


async def _until_signal(supervisors: list[Supervisor], drain: float) -> int:
    """Run them until a signal, or until one gives up. `drain`: seconds that requests have after SIGTERM."""
    failures: list[Exception] = []
    code = 0

    def stop(seconds: float) -> None:
        for supervisor in supervisors:
            supervisor.request_stop(seconds)

    async def obey(signals: AsyncIterator[int]) -> None:
        nonlocal code
        async for number in signals:
            if told.is_set():
                code = 128 + number
                nursery.cancel_scope.cancel(reason="a second signal")
            told.set()
            stop(drain if number == signal.SIGTERM else 0.0)

    async def run(supervisor: Supervisor) -> None:
        try:
            await supervisor.run()
        except (StartupError, GiveUp) as error:
            failures.append(error)  # past the nursery, which would wrap it in a group
        stop(0.0)

    told = trio.Event()
    obeyed = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it, and so do we then
        obeyed.append(signal.SIGHUP)
    with trio.open_signal_receiver(*obeyed) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, signals)
            async with trio.open_nursery() as running:
                for supervisor in supervisors:
                    running.start_soon(run, supervisor)
            nursery.cancel_scope.cancel()
    if failures and not told.is_set():
        raise failures[0]
    return code


def base_url(host: str, listener: socket.socket, scheme: str = "http") -> str:
    """The URL to paste on this machine; a wildcard address becomes the loopback's."""
    name = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    port = listener.getsockname()[1]
    return f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}"


def greeting(model: ModelInfo, url: str) -> str:
    """What a user needs when the engine is up: the address, and a line to paste."""
    path, body = example(model)
    data = json.dumps({"model": model.name, **body}, ensure_ascii=False).replace("'", r"'\''")
    page = f"a page to chat and to watch the engine; in a terminal: actorserve chat --url {url}"
    return (
        f"\nactorserve {__version__} serves {model.name} on {url}\n\n"
        f"In a browser that is {page if model.pooling is None else 'a page to watch the engine'}\n\n"
        f"curl -N {url}/v1/{path} -H 'Content-Type: application/json' -d '{data}'\n"
    )


def example(model: ModelInfo) -> tuple[str, dict[str, object]]:
    """Return a first request to a model: (path, body)."""
    streamed: dict[str, object] = {"temperature": 0, "stream": True}
    if model.pooling is not None:
        return "embeddings" if model.pooling.task == "embed" else "classify", {"input": QUESTION}
    if model.has_chat_template:
        return "chat/completions", {"messages": [{"role": "user", "content": QUESTION}]} | streamed
    return "completions", {"prompt": "The capital of France is"} | streamed
