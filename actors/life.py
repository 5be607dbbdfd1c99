"""A node as the supervisor sees it, and its incarnations: how one begins, that it ended and why, how to end it.

A `Life` is one incarnation; there are three kinds with one interface: a process, a task in the supervisor's loop, a
guest. `Node` is the record over all lives. Used by supervisor.py alone. Invariant: after `close` nothing of a life is
left, neither process nor descriptor.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import trio

from .control import ControlSocket, Failed, control_pair
from .environment import child_environment
from .node import innermost, run_node
from .topology import NodeSpec

_ENTRY = "from actorserve.actors.node import main; main()"
LATELY = 10.0
"""Seconds; the memory of a large process takes some to be taken apart."""
_SPIN_COUNT = "2000"
"""Looks that a thread of torch's OpenMP takes for more work before it sleeps, about 0.1 ms. Its own number is 300,000:
on a CPU they would watch through all of the next forward, on cores that it needs."""


class Life(Protocol):
    """What the supervisor needs of an incarnation."""

    control: ControlSocket
    pid: int | None
    """The process, if it has one of its own."""
    linger: ClassVar[float]
    """Seconds between the end of the control socket and `kill`."""
    killable: ClassVar[bool]
    """`kill` works even if the node's loop is stuck."""
    killed: bool
    """It was ended by SIGKILL, or in another way that says nothing of what it did."""

    async def ended(self) -> str:
        """Wait for the end; why it ended. To be awaited once, and the life of an inline node is this call."""

    def kill(self) -> None:
        """End it now, whatever it does."""

    def dump_stacks(self) -> None:
        """Let it write where its threads are to stderr."""

    def close(self) -> None:
        """Kill what is left and free everything."""


class ProcessLife:
    """A fresh interpreter. It dies with the thread that makes this object."""

    linger: ClassVar[float] = 1.0
    killable: ClassVar[bool] = True

    def __init__(self, name: str) -> None:
        """`name` is the node's, for whoever reads the process list. Raises OSError if no process can be made."""
        self.control, theirs = control_pair()
        # A Ctrl-C while the child boots would print its KeyboardInterrupt: blocked signals are inherited, main()
        # ignores them before it unblocks them. -P: nothing in the working directory may shadow a module.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _ENTRY, str(theirs.fileno()), str(os.getpid()), f"--node={name}"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"GOMP_SPINCOUNT": _SPIN_COUNT} | child_environment(),
            )
        except OSError:
            self.control.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        self.pid: int | None = self._process.pid
        self.killed = False
        self._pidfd = os.pidfd_open(self._process.pid)

    async def ended(self) -> str:
        """A real exit status is required: a readable pidfd alone says no more than that there is one."""
        await trio.lowlevel.wait_readable(self._pidfd)
        code = self._process.wait()
        self.killed = code == -signal.SIGKILL
        if code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return f"killed by {name}" + (" (kill -9, or out of memory)" if -code == signal.SIGKILL else "")
        return f"killed by signal {-code}"

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def dump_stacks(self) -> None:
        """SIGUSR1, for which the node registered faulthandler before it said Hello."""
        self._process.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        """Waits until the kernel has taken the process apart."""
        self._process.kill()
        self._process.wait()
        os.close(self._pidfd)
        self.control.close()


def kills_for_memory() -> int | None:
    """How many processes the kernel has killed for want of memory, in any cgroup; None where it does not tell."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
    return None


class MemoryKills:
    """Whether the kernel killed somebody for want of memory lately."""

    def __init__(self) -> None:
        self._counts = [kills_for_memory()] * 2
        """Of LATELY to twice LATELY ago, and since."""
        self._at = time.monotonic()

    def look(self) -> None:
        """Called again and again."""
        if time.monotonic() - self._at > LATELY:
            self._counts, self._at = [self._counts[1], kills_for_memory()], time.monotonic()

    def lately(self) -> bool:
        """Or whether the kernel does not tell."""
        count = kills_for_memory()
        return count is None or count != self._counts[0]


class InlineLife:
    """A task in the supervisor's loop: the task that awaits `ended`."""

    linger: ClassVar[float] = 1.0
    killable: ClassVar[bool] = False

    def __init__(self) -> None:
        self.control, theirs = control_pair()
        self.pid: int | None = None
        self.killed = False
        self._node_control = ControlSocket(theirs)
        self._scope = trio.CancelScope()

    async def ended(self) -> str:
        """Hosts the node."""
        try:
            with self._scope:
                await run_node(self._node_control)
                return "returned"
        except Exception as error:  # the node said more in Failed
            return f"raised {type(innermost(error)).__name__}"
        return "cancelled"

    def kill(self) -> None:
        """At its next checkpoint."""
        self._scope.cancel()

    def dump_stacks(self) -> None:
        """Not possible: who would ask is in the same loop."""

    def close(self) -> None:
        """The node closed its end itself, if it ever began."""
        self._node_control.close()
        self.control.close()


class AttachedLife:
    """A guest behind its control socket; all we can do is to close that."""

    linger: ClassVar[float] = 0.0
    killable: ClassVar[bool] = False

    def __init__(self, control: ControlSocket) -> None:
        self.control = control
        self.pid: int | None = None
        self.killed = True
        self._gone = trio.Event()

    async def ended(self) -> str:
        """When it closed its socket: deliberately or with its process."""
        await self._gone.wait()
        return "detached"

    def kill(self) -> None:
        """Forget it."""
        self._gone.set()

    def dump_stacks(self) -> None:
        """Not ours to ask."""

    def close(self) -> None:
        """The guest sees the end of its socket."""
        self.control.close()


@dataclass(frozen=True)
class NodeHealth:
    """How a node is. `state`: new, starting, running, down or stopped."""

    state: str
    epoch: int
    """Incarnations so far."""
    last_error: str | None
    """Why the last one ended, if any did."""
    pid: int | None


class Node:
    """A node over its lives."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.state = "new"
        self.epoch = 0
        self.life: Life | None = None
        self.was_ready = False
        self.failures: deque[float] = deque()
        self.last_error: str | None = None
        self.stopped = trio.Event()
        self.guests: deque[ControlSocket] = deque()
        self.guest_came = trio.Event()
        self.desk = -1
        """What this life works on (desk.py)."""
        self.leaving = False  # has been told to stop: there will be no next life
        self.begin(None)

    def begin(self, life: Life | None) -> None:
        """Forget the last life."""
        self.life = life
        self.heard_at = time.monotonic()
        self.greeted = False
        self.failed: Failed | None = None
        self.verdict: str | None = None  # why we ended it
        self.with_group = False  # ended because another node of its group failed
        self.outside = False  # ... which was killed from outside
        self.at_fault = True  # its end was of its own making
        self.pinged = False  # and has not answered yet

    def kill(self, verdict: str) -> None:
        """End this life, if there is one."""
        if self.life is not None:
            self.verdict = self.verdict or verdict
            self.life.kill()

    def health(self) -> NodeHealth:
        """A snapshot."""
        pid = self.life.pid if self.life is not None else None
        return NodeHealth(self.state, self.epoch, self.last_error, pid)

    def why(self, end: str) -> str:
        """The reason of the end, as others are told."""
        if self.spec.away and self.failed is not None and self.verdict is None:
            return self.failed.summary.partition(": ")[2]
        reason = self.verdict or end
        return f"{reason}: {self.failed.summary}" if self.failed else reason

    def judge(self, life: Life, for_memory: bool) -> None:
        """Set `at_fault`, at the end of a life. `for_memory`: the kernel may have killed it for what it took."""
        outside = self.verdict is None and life.killed and not for_memory
        self.at_fault = not (self.outside if self.with_group else outside)

    def has(self, actor: str) -> bool:
        """Whether the actor lives here."""
        return any(actor == one.name for one in self.spec.actors)
