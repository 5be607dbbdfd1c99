"""Killable compilers: the processes of fsm_worker.py as the fsm actor sees them, each with its deadline.

One process, the `Mother`, builds the tokenizer's tables and compiles nothing for strangers; compilers are forks of it:
where one had to be killed another is there within milliseconds, and all share the tables' memory.
Invariant: of a `Worker` at most one process lives; after `close` of the mother, or when the owner ends, none does.
"""

import array
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

import trio

from ..fsm.budget import PATIENCE, charged
from .courtesy import MOST, REFILL
from .environment import child_environment
from .fsm_worker import CREDIT, GRACE, LENGTH, PID, Answer, Failed, Job, Ready, Result, Setup, decode_answer, framed
from .messages import GrammarSpec

START_SECONDS: Final = 120.0
TICK: Final = 0.05
"""Seconds between two looks at a compiler that gets little of the cores."""
_ENTRY: Final = "from actorserve.actors.fsm_worker import main; main()"


class WorkerDied(Exception):
    """The process ended in the middle of something."""


class Mother:
    """The process that compilers are forked from, started at need and again after its end."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.setup = setup
        self.name = name
        self.refusal: str | None = None
        """Why there are no grammars at all."""
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: trio.SocketStream | None = None
        self._turn = trio.Lock()

    async def start(self) -> None:
        """Have the process with its tables built. Raises WorkerDied, trio.TooSlowError."""
        async with self._turn:
            await self._start()

    async def fork(self, saved: float) -> tuple[trio.SocketStream, int, int]:
        """Return (its stream, a pidfd, the pid) of a new compiler. `saved`: what it may waste at first (courtesy.py).

        Raises WorkerDied, trio.TooSlowError.
        """
        async with self._turn:
            try:
                return await self._fork(saved)
            except WorkerDied:  # it may have ended before: that is no sign against the grammar
                return await self._fork(saved)

    def close(self) -> None:
        """Kill the process, and with it all that it forked."""
        process, self._process = self._process, None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.socket.close()
        if process is not None:
            process.kill()
            process.wait()

    async def _start(self) -> None:
        if self._stream is not None:
            return
        self._stream = self._spawn()
        with _deaths(self.close), trio.fail_after(START_SECONDS):
            answer = await _ask(self._stream, self.setup)
            if not isinstance(answer, Ready):
                raise trio.BrokenResourceError("the compiler did not start")
        self.refusal = answer.refusal

    async def _fork(self, saved: float) -> tuple[trio.SocketStream, int, int]:
        await self._start()
        ours, theirs = socket.socketpair()
        try:
            with _deaths(self.close):
                pid, descriptor = await self._delivered(theirs, saved)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours)), descriptor, pid

    async def _delivered(self, theirs: socket.socket, saved: float) -> tuple[int, int]:
        """Hand over the child's end of its socket; return its (pid, pidfd)."""
        assert self._stream is not None
        line = self._stream.socket
        rights = array.array("i", [theirs.fileno()])
        with trio.fail_after(START_SECONDS):
            await line.sendmsg([CREDIT.pack(saved)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes())])
            data, given, _, _ = await line.recvmsg(
                PID.size, socket.CMSG_SPACE(rights.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        found = array.array("i")
        for level, kind, content in given:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found.frombytes(content[: rights.itemsize])
        if len(data) != PID.size or not found:
            raise trio.BrokenResourceError("no compiler was born")
        return PID.unpack(data)[0], found[0]

    def _spawn(self) -> trio.SocketStream:
        # Not trio's open_process: it spawns from a thread of a pool, with which the child would die.
        ours, theirs = socket.socketpair()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _ENTRY, str(theirs.fileno()), str(os.getpid()), f"--worker={self.name}"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=child_environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1"),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours))


class Worker:
    """One compiler process, forked at need and again after each end."""

    def __init__(self, mother: Mother) -> None:
        self.mother = mother
        self.pid: int | None = None
        """Of the process, if it runs."""
        self._descriptor = -1
        self._stream: trio.SocketStream | None = None
        self._killed_at = -MOST / REFILL

    async def start(self) -> None:
        """Have a process. Raises WorkerDied, trio.TooSlowError."""
        if self._stream is None:
            saved = min(MOST, REFILL * (time.monotonic() - self._killed_at))
            self._stream, self._descriptor, self.pid = await self.mother.fork(saved)

    async def compile(self, spec: GrammarSpec) -> Result:
        """Compile within the deadline, else kill the process. Raises WorkerDied, trio.TooSlowError."""
        await self.start()
        if self.mother.refusal is not None:
            return Failed("unsupported_value", self.mother.refusal)
        assert self._stream is not None
        seconds = self.mother.setup.seconds
        with trio.move_on_after(PATIENCE * (seconds + GRACE)), _deaths(self.close):  # cancelled: it would lag
            await self._stream.send_all(framed(Job(spec)))
            if await self._answers(seconds + GRACE):
                answer = await _answer(self._stream)
                assert not isinstance(answer, Ready)
                return answer
        self.close()
        self._killed_at = time.monotonic()
        text = f"{spec.kind}: the grammar is too complex: compiling it takes more than {seconds:g} s"
        return Failed("grammar_too_large", text, late=True)

    async def _answers(self, seconds: float) -> bool:
        """Wait for an answer to begin; False when the process was charged so many seconds for it."""
        assert self._stream is not None
        began, used = trio.current_time(), self._used()
        while (left := seconds - charged(trio.current_time() - began, self._used() - used)) > 0:
            with trio.move_on_after(max(left, TICK)):
                await trio.lowlevel.wait_readable(self._stream.socket)
                return True
        return False

    def _used(self) -> float:
        """Seconds of a core that the process has had."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="ascii") as file:
                fields = file.read().rsplit(")", 1)[1].split()
        except OSError:  # it has ended: there is something to be read
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Kill the process, if there is one; its mother does not wait for it."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        stream.socket.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        os.close(self._descriptor)
        self.pid = None


@contextlib.contextmanager
def _deaths(close: Callable[[], None]) -> Iterator[None]:
    """Close at each exception. Raises WorkerDied for those of a socket whose other end is gone."""
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
        close()
        raise WorkerDied(str(error)) from error
    except BaseException:
        close()
        raise


async def _ask(stream: trio.SocketStream, order: Setup | Job) -> Answer:
    """Send and wait for the answer."""
    await stream.send_all(framed(order))
    return await _answer(stream)


async def _answer(stream: trio.SocketStream) -> Answer:
    head = await _read(stream, LENGTH.size)
    answer: Answer = decode_answer(await _read(stream, LENGTH.unpack(head)[0]))
    return answer


async def _read(stream: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        if not part:
            raise trio.BrokenResourceError("the compiler ended")
        data += part
    return bytes(data)
