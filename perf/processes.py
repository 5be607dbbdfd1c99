"""The engine's processes as a benchmark sees them: CPU time by actor, and a server of ours for the run.

Used by offline.py and serve.py. A share of a core near 1 in text, sched, front or client says that the GPU may be
waiting for Python. Linux only (/proc).
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from actorserve.perf.engines import free_port

TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 300.0


def cpu_seconds(root: int) -> dict[str, float]:
    """CPU seconds so far of each node below the process `root`, by name, and of the root itself as "root"."""
    found = {"root": _seconds(root)}
    waiting = [root]
    while waiting:
        for child in children_of(waiting.pop()):
            waiting.append(child)
            name = node_name(child)
            if name is not None:
                found[name] = found.get(name, 0.0) + _seconds(child)
    return found


def children_of(pid: int) -> list[int]:
    children = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    return children


def node_name(pid: int) -> str | None:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((a.removeprefix(b"--node=").decode() for a in arguments if a.startswith(b"--node=")), None)


def _seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


class CpuShares:
    """Shares of a core that the nodes below `root` used in the block, in `shares`."""

    def __init__(self, root: int | None) -> None:
        self._root = root
        self.shares: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._before = cpu_seconds(self._root) if self._root else {}
        return self

    def __exit__(self, *_: object) -> None:
        if self._root:
            wall = time.monotonic() - self._began
            after = cpu_seconds(self._root)
            self.shares = {name: (s - self._before.get(name, 0.0)) / wall for name, s in sorted(after.items())}


@contextlib.contextmanager
def launched(flags: str) -> Iterator[tuple[str, int, float]]:
    """Run `actorserve run` with these flags for the block: its URL, process, and the seconds until it was ready.

    Its output is shown if it does not start. Raises RuntimeError then.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "actorserve", "run", "--port", str(port), *shlex.split(flags)]
        began = time.monotonic()
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while not _ready(url):
                if server.poll() is not None or time.monotonic() - began > START_SECONDS:
                    log.seek(0)
                    said = log.read().decode(errors="replace")[-4000:]
                    raise RuntimeError(f"the server did not start (exit code {server.poll()}):\n{said}")
                time.sleep(0.02)
            yield url, server.pid, time.monotonic() - began
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
