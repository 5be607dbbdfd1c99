"""The host's hold on an embedded engine's root: it starts it, listens to it, and ends it. Used by engine.py.

Invariant: after `close` the root is gone, process or thread; a process that does not leave in time is killed, and its
children die with it.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio
import msgspec
import trio

from ..config import EngineConfig
from . import lifeline

CLOSE_SECONDS: Final = 2.6
"""The supervisor's own grace is 2 s."""
_ENTRY: Final = "from actorserve.actors.embedded_root import main; main()"


class Root:
    """A running root. `guest` is the host's control socket, to be handed to an Attachment."""

    def __init__(self, config: EngineConfig) -> None:
        """Start it: a process, or a thread with placement "inline"."""
        self.guest, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lifeline, lifeline_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        if config.placement == "inline":
            # A daemon: a host that forgets to close the engine can still end.
            arguments = (config, guest, lifeline_end)
            self._thread = threading.Thread(target=_run_in_thread, args=arguments, name="actorserve", daemon=True)
            self._thread.start()
        else:
            with guest, lifeline_end:
                fds = [guest.fileno(), lifeline_end.fileno()]
                # -P: nothing in the host's working directory may shadow a module.
                command = [sys.executable, "-P", "-c", _ENTRY, *map(str, fds)]
                with memory_file(msgspec.json.encode(config)) as settings:  # the process list is for everybody
                    self._process = subprocess.Popen(command, pass_fds=fds, stdin=settings)

    @property
    def pid(self) -> int | None:
        """The root's process; None for a thread."""
        return self._process.pid if self._process is not None else None

    async def status(self) -> lifeline.AnyStatus | None:
        """Wait for the next thing it says; None when it has ended."""
        while True:
            await anyio.wait_readable(self._lifeline)
            try:
                return lifeline.receive(self._lifeline)
            except BlockingIOError:
                continue

    async def close(self) -> None:
        """End it, orderly if that takes no more than CLOSE_SECONDS. Not cancellable, so that nothing is left."""
        deadline = time.monotonic() + CLOSE_SECONDS
        try:
            self._lifeline.shutdown(socket.SHUT_WR)
        except OSError:
            deadline = time.monotonic()  # the other side is gone already
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            while await self.status() is not None:
                continue
        self._lifeline.close()
        self.guest.close()  # if nobody took it over
        if self._process is not None:
            try:
                self._process.wait(max(0.2, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._thread is not None:
            self._thread.join(max(0.2, deadline - time.monotonic()))


@contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    """A descriptor of a nameless file with this content."""
    descriptor = os.memfd_create("settings", os.MFD_CLOEXEC)
    try:
        os.pwrite(descriptor, content, 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _run_in_thread(config: EngineConfig, guest: socket.socket, lifeline_end: socket.socket) -> None:
    from .embedded_root import run_root

    trio.run(run_root, config, guest, lifeline_end)
