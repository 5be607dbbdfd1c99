"""The one event loop of the language, in a thread of its own, and how other threads and loops wait for what it does.

All states of all programs run as tasks of this loop; a state that waits for nothing has no task. Bodies of programs run
where they are called. A forked child has a loop of its own, which starts when it is first used there: of threads only
the forking one goes on in it. Invariant: nothing that runs in the loop's thread blocks it: `Signal.wait` refuses to.
"""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from contextvars import Context
from typing import Any, Final, TypeVar

import anyio
import trio
from anyio.from_thread import BlockingPortal

T = TypeVar("T")


class Tasks:
    """Tasks of the loop that `start` is called in: for a server, which has one. `cancel` ends them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, function: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Run a coroutine function as a task. It must not raise."""
        task = asyncio.get_running_loop().create_task(function(*args))
        self._tasks.add(task)  # the loop itself holds its tasks weakly
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()

    async def end(self) -> None:
        """Cancel them, and wait until all have ended."""
        while self._tasks:
            self.cancel()
            await asyncio.wait(self._tasks)


class LoopThread(Tasks):
    """Starts at the first use, and ends with the program: its thread is a daemon."""

    def __init__(self) -> None:
        super().__init__()
        self._loop: asyncio.AbstractEventLoop
        self.forks = -1
        """Between the process that imported this and this one: what belongs to another loop has another number."""
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Be as at first."""
        self.forks += 1
        self._tasks = set()
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._thread: threading.Thread | None = None

    def start(self, function: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """As Tasks.start, from any thread, also from a finalizer."""
        self._running()
        if threading.current_thread() is self._thread:
            super().start(function, *args)
        else:
            # Not in the caller's context, which may say that this is trio.
            self._loop.call_soon_threadsafe(super().start, function, *args, context=Context())

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run a coroutine function and wait for its result. Raises what it raises."""
        self.refuse_inside()
        return self._running().call(function, *args)

    async def acall(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """As `call`, awaited in any event loop."""
        if threading.current_thread() is self._thread:
            return await function(*args)
        future, done = self._running().start_task_soon(function, *args), Signal()
        future.add_done_callback(lambda _: done.set())
        try:
            await done.reached()
        except BaseException:
            future.cancel()
            raise
        return future.result()

    def hold(self, manager: AbstractAsyncContextManager[Any]) -> AbstractContextManager[Any]:
        """An asynchronous context manager of the loop as one for this thread."""
        self.refuse_inside()
        return self._running().wrap_async_context_manager(manager)

    def refuse_inside(self) -> None:
        """Raise RuntimeError in the loop's own thread, which must not wait for itself."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "this would block the event loop that runs the programs: in an `async def` program await the values"
                " (`await s`, `await s.aget_var(name)`, `await program.arun(...)`)"
            )

    def _running(self) -> BlockingPortal:
        if self._portal is None:
            with self._lock:
                if self._portal is None:
                    self._portal = self._open()
        return self._portal

    def _open(self) -> BlockingPortal:
        ready = threading.Event()
        portals: list[BlockingPortal] = []

        async def main() -> None:
            async with BlockingPortal() as portal:
                self._loop = asyncio.get_running_loop()
                portals.append(portal)
                ready.set()
                await portal.sleep_until_stopped()

        options = {"use_uvloop": True}
        self._thread = threading.Thread(
            target=lambda: anyio.run(main, backend="asyncio", backend_options=options), name="lang", daemon=True
        )
        self._thread.start()
        ready.wait()
        return portals[0]


LOOP: Final = LoopThread()
"""The loop is the process's: states of different programs share engines and connections, which belong to one loop."""


class Signal:
    """Happens once. May be set from any thread, and waited for from any thread, asyncio or trio."""

    __slots__ = ("_callbacks", "_done")
    _lock = threading.Lock()

    @classmethod
    def _forget(cls) -> None:
        """In a forked child: who had the lock is not there to release it."""
        cls._lock = threading.Lock()

    def __init__(self) -> None:
        self._done = False
        self._callbacks: list[Callable[[], object]] = []

    @property
    def is_set(self) -> bool:
        return self._done

    def set(self) -> None:
        """Without effect the second time."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
            self._done = True
        for callback in callbacks:
            callback()

    def when_set(self, callback: Callable[[], object]) -> None:
        """Call when it happens, on that thread, or at once if it has."""
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        callback()

    def wait(self, timeout: float | None = None) -> bool:
        """Block this thread until it is set; False after `timeout` seconds. Raises RuntimeError in the loop."""
        if not self._done:
            LOOP.refuse_inside()
            event = threading.Event()
            self.when_set(event.set)
            event.wait(timeout)
        return self._done

    async def reached(self) -> None:
        """Wait for it in whatever event loop this is."""
        if not self._done:
            event = anyio.Event()
            self.when_set(_waker(event))
            await event.wait()


os.register_at_fork(after_in_child=Signal._forget)


def _waker(event: anyio.Event) -> Callable[[], object]:
    """What sets an event of the current loop from any thread."""
    if trio.lowlevel.in_trio_task():
        token = trio.lowlevel.current_trio_token()

        def wake_trio() -> None:
            with suppress(trio.RunFinishedError):  # nobody waits there any more
                token.run_sync_soon(event.set)

        return wake_trio
    loop = asyncio.get_running_loop()

    def wake_asyncio() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            loop.call_soon_threadsafe(event.set)

    return wake_asyncio
