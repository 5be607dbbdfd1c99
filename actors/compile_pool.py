"""Killable compilers: the processes of fsm_worker.py as the fsm actor sees them, each with its deadline.

Invariant: of a `Worker` at most one process lives; after `close`, or when the owner ends, none does.
"""

import os
import signal
import socket
import subprocess
import sys
from typing import Final

import trio

from .environment import child_environment
from .fsm_worker import LENGTH, Answer, Failed, Job, Ready, Result, Setup, decode_answer, framed
from .messages import GrammarSpec

GRACE: Final = 0.4
"""Seconds beyond the limit that the worker keeps itself, before it is killed."""
START_SECONDS: Final = 120.0
_ENTRY: Final = "from actorserve.actors.fsm_worker import main; main()"


class WorkerDied(Exception):
    """The process ended in the middle of something."""


class Worker:
    """One compiler process, started at need and again after each end."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.setup = setup
        self.name = name
        self.refusal: str | None = None
        """Why there are no grammars at all."""
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: trio.SocketStream | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, if it runs."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Have a process with its tables built. Raises WorkerDied."""
        if self._stream is not None:
            return
        self._spawn()
        with trio.fail_after(START_SECONDS):
            answer = await self._ask(self.setup)
        if not isinstance(answer, Ready):
            raise WorkerDied("the compiler did not start")
        self.refusal = answer.refusal

    async def compile(self, spec: GrammarSpec) -> Result:
        """Compile within the deadline, else kill the process. Raises WorkerDied."""
        await self.start()
        if self.refusal is not None:
            return Failed("unsupported_value", self.refusal)
        with trio.move_on_after(self.setup.seconds + GRACE):
            answer = await self._ask(Job(spec))
            assert not isinstance(answer, Ready)
            return answer
        self.close()
        text = f"{spec.kind}: the grammar is too complex: compiling it takes more than {self.setup.seconds:g} s"
        return Failed("grammar_too_large", text, late=True)

    def close(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.socket.close()
        if process is not None:
            process.kill()
            process.wait()

    def _spawn(self) -> None:
        # Not trio's open_process: it spawns from a thread of a pool, with which the child would die.
        ours, theirs = socket.socketpair()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _ENTRY, str(theirs.fileno()), str(os.getpid()), f"--worker={self.name}"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=child_environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    async def _ask(self, order: Setup | Job) -> Answer:
        """Send and wait for the answer. Raises WorkerDied; cancelled: the process is killed, for it would lag."""
        assert self._stream is not None
        try:
            await self._stream.send_all(framed(order))
            head = await self._read(LENGTH.size)
            answer: Answer = decode_answer(await self._read(LENGTH.unpack(head)[0]))
            return answer
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            self.close()
            raise WorkerDied(str(error)) from error
        except BaseException:
            self.close()
            raise

    async def _read(self, size: int) -> bytes:
        assert self._stream is not None
        data = bytearray()
        while len(data) < size:
            part = await self._stream.receive_some(size - len(data))
            if not part:
                raise trio.BrokenResourceError("the compiler ended")
            data += part
        return bytes(data)
