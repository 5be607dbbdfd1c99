"""The root of an embedded engine: a supervisor for one guest, in a process or a thread of its own.

Started by embedded_host.py, which holds the other ends of two sockets: the guest's control socket and the lifeline.
Invariant: the engine ends, and everything of it, when the host shuts the lifeline or is gone, however it went.
"""

import os
import signal
import socket
import sys
from typing import Final

import msgspec
import trio

from ..config import EngineConfig, ModelInfo
from ..errors import StartupError
from ..models.resolve import resolve_model
from .lifeline import Speaker
from .node import configure_logging
from .supervisor import GiveUp, Supervisor
from .topology import attached_client, engine_topology

GUEST: Final = "client"


async def run_root(config: EngineConfig, guest: socket.socket, lifeline: socket.socket) -> None:
    """Run an engine for the guest until the lifeline ends. Owns both sockets. Raises nothing the host is told."""
    speaker = Speaker(lifeline)
    with lifeline:
        try:
            with guest:
                model = await _resolve(config, lifeline, speaker)
                if model is None:
                    return
                topology = engine_topology(config, [attached_client(GUEST)])
                supervisor = Supervisor(topology, config, model, on_event=speaker.event)
                supervisor.attach(GUEST, guest.dup())
            await _supervise(supervisor, lifeline)
        except (StartupError, GiveUp) as error:
            speaker.fail(str(error))
        except Exception as error:
            speaker.fail(f"{type(error).__name__}: {error}")
            raise


async def _resolve(config: EngineConfig, lifeline: socket.socket, speaker: Speaker) -> ModelInfo | None:
    """Return the model, or None when the host left meanwhile."""
    outcome: ModelInfo | Exception | None = None

    async def resolve() -> None:
        nonlocal outcome
        try:
            # In a thread that may be left behind: a download must not keep us from seeing the host's end.
            outcome = await trio.to_thread.run_sync(resolve_model, config, speaker.transfer, abandon_on_cancel=True)
        except Exception as error:
            outcome = error  # past the nursery, which would wrap it in a group
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(resolve)
        await trio.lowlevel.wait_readable(lifeline)
        nursery.cancel_scope.cancel()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def _supervise(supervisor: Supervisor, lifeline: socket.socket) -> None:
    failure: Exception | None = None

    async def watch() -> None:
        await trio.lowlevel.wait_readable(lifeline)
        supervisor.request_stop()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            await supervisor.run()
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def main() -> None:
    """Entry of the process: `python -c "...; main()" GUEST_FD LIFELINE_FD < config.json`. Exit code 0."""
    # The host's terminal sends Ctrl-C to us too; the host decides what it means.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    guest, lifeline = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    configure_logging("root", config.log_level)
    trio.run(run_root, config, guest, lifeline)
    sys.stderr.flush()
    os._exit(0)  # a thread with a download may be left behind
