"""SglFunction: a program, and every way to run it. Made by the decorator `function`.

A plain body runs on the caller's thread, or on one of a pool in batches; an `async def` body runs in an event loop and
holds no thread at all. What the model does runs in the loop of loop.py either way, however many states there are.
Invariant: running adds nothing to a program's meaning: all ways give the same state.
"""

import inspect
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache, partial
from typing import Any, Final

import anyio
from tqdm import tqdm

from ..errors import RequestError
from .api import strings
from .backend import Backend, resolve
from .expressions import Sampling, Untraceable
from .interpreter import Executor
from .loop import LOOP
from .recording import record
from .remote_run import run_remotely
from .state import ProgramState
from .tracing import Trace, constant_prefix, trace_program, tracing

RUN_FIELDS: Final = frozenset(
    "max_new_tokens n stop stop_token_ids stop_regex temperature top_p top_k min_p frequency_penalty presence_penalty"
    " ignore_eos return_logprob logprob_start_len top_logprobs_num return_text_in_logprobs".split()
)
"""The sampling parameters of SGLang's `run`."""
OWN_FIELDS: Final = frozenset("min_new_tokens repetition_penalty seed logit_bias priority".split())
"""Ours; an argument of the program that bears such a name goes first."""
LEAST_PREFIX: Final = 64
"""Characters from which a common prefix is worth a call of its own."""
MOST_THREADS: Final = max(96, 16 * (os.cpu_count() or 1))
"""For plain bodies that run at once."""
CHUNK: Final = 200
"""Programs that a generator-style batch keeps ahead of its reader."""


class SglFunction:
    """A program. `bind_arguments`: arguments that are fixed."""

    def __init__(
        self,
        func: Callable[..., Any],
        num_api_spec_tokens: int | None = None,
        bind_arguments: dict[str, Any] | None = None,
    ) -> None:
        """Raises RequestError if the first parameter is not named `s`."""
        names = inspect.getfullargspec(func)
        if names.args[:1] != ["s"]:
            raise RequestError("the first parameter of a program must be `s`")
        self.func = func
        self.num_api_spec_tokens = num_api_spec_tokens
        self.bind_arguments = bind_arguments or {}
        self.arg_names = names.args[1:]
        self.arg_defaults = list(names.defaults or ())
        self.required = [name for name in self.arg_names if name not in self._defaulted]
        """Arguments without a default value."""
        self.__doc__ = func.__doc__
        self.__name__ = func.__name__

    @property
    def _defaulted(self) -> list[str]:
        return self.arg_names[len(self.arg_names) - len(self.arg_defaults) :]

    @property
    def is_async(self) -> bool:
        """Whether the body is `async def`."""
        return inspect.iscoroutinefunction(self.func)

    def bind(self, **arguments: Any) -> "SglFunction":
        """The program with these arguments fixed. Raises RequestError for one it does not have."""
        unknown = [name for name in arguments if name not in self.arg_names]
        if unknown:
            raise RequestError(f"the program has no argument {unknown[0]!r}")
        return SglFunction(self.func, self.num_api_spec_tokens, self.bind_arguments | arguments)

    # ------------------------------------------------------------------ one run

    def run(
        self,
        *args: Any,
        stream: bool = False,
        backend: Any = None,
        use_thread: bool = True,
        remote: bool = False,
        **kwargs: Any,
    ) -> ProgramState:
        """Run the body with `args` and `kwargs` and return its state, in which the model may still be at work.

        Among `kwargs` are the sampling parameters that hold where a `gen` says nothing: max_new_tokens=128,
        temperature=1.0, stop and so on (RUN_FIELDS, OWN_FIELDS). `stream`: return at once; the body runs in a thread,
        for `text_iter`. `use_thread=False`: each statement ends before the next one begins. `remote`: the backend's
        server runs the program as a whole, if it can be said as data (recording.py); otherwise it runs here, and
        `state.local_reason` says why. Raises what the body raises; with `remote` it is raised by `state.ret_value`.
        """
        reason = None
        if remote:
            found = self._send(args, kwargs, backend, stream)
            if isinstance(found, ProgramState):
                return found
            reason = found
        state, call = self._prepare(args, kwargs, backend, stream, eager=not use_thread)
        state.local_reason = reason
        if stream:
            self._begin(state, call, _start_thread)
        elif self.is_async:
            LOOP.call(_run_async, state, call)
        else:
            with _Ending(state):
                state.ret_value = call()
        return state

    async def arun(
        self, *args: Any, stream: bool = False, backend: Any = None, remote: bool = False, **kwargs: Any
    ) -> ProgramState:
        """As `run`, in any event loop: an `async def` body runs here, a plain one in a thread."""
        reason = None
        if remote:
            found = self._send(args, kwargs, backend, stream)
            if isinstance(found, ProgramState):
                return found
            reason = found
        state, call = self._prepare(args, kwargs, backend, stream)
        state.local_reason = reason
        if self.is_async and not stream:
            await _run_async(state, call)
            return state
        self._begin(state, call, _bodies().submit)
        if not stream:
            await state.stream_executor.life.reached()
            if state.body_error is not None:
                raise state.body_error
        return state

    __call__ = run

    # ------------------------------------------------------------------ batches

    def run_batch(
        self,
        batch_kwargs: Sequence[Any],
        *,
        backend: Any = None,
        num_threads: str | int = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        remote: bool = False,
        **sampling: Any,
    ) -> Any:
        """Run once for each item, a dict or a tuple of arguments; returns the states in this order, all done.

        `num_threads`: how many programs run at once; "auto": as many as the backend takes. `generator_style`: an
        iterator that runs ahead of its reader a little. What a body raises is raised where its state is read, and by
        `state.error()`; the others go on. `remote`: as in `run`.
        """
        if len(batch_kwargs) > 1:
            self.cache(backend)
        runs = self._batch(batch_kwargs, backend, num_threads, generator_style, sampling, remote)
        states = _wait_all(runs, len(batch_kwargs), progress_bar)
        return states if generator_style else list(states)

    async def arun_batch(self, batch_kwargs: Sequence[Any], **options: Any) -> list[ProgramState]:
        """As `run_batch`, in any event loop."""
        return [state async for state in self.arun_batch_iter(batch_kwargs, **options)]

    async def arun_batch_iter(
        self,
        batch_kwargs: Sequence[Any],
        *,
        backend: Any = None,
        num_threads: str | int = "auto",
        progress_bar: bool = False,
        remote: bool = False,
        **sampling: Any,
    ) -> AsyncIterator[ProgramState]:
        """As `run_batch` in generator style, in any event loop."""
        if len(batch_kwargs) > 1:
            await self.acache(backend)
        runs = self._batch(batch_kwargs, backend, num_threads, True, sampling, remote)
        with tqdm(total=len(batch_kwargs), disable=not progress_bar) as bar:
            for state in runs:
                await state.stream_executor.life.reached()
                await state
                bar.update()
                yield state

    # ------------------------------------------------------------------ without running

    def trace(self, *, backend: Any = None, **kwargs: Any) -> Trace:
        """The program as data; see tracing.py. `backend` is taken for SGLang's sake."""
        return trace_program(self, self.bind_arguments | kwargs)

    def cache(self, backend: Any = None) -> None:
        """Compute the text that every run begins with into the backend's prefix cache, if it is long enough."""
        LOOP.call(self._cache, resolve(backend))

    async def acache(self, backend: Any = None) -> None:
        """As `cache`, in any event loop."""
        await LOOP.acall(self._cache, resolve(backend))

    # ------------------------------------------------------------------ inner

    def _prepare(
        self, args: Sequence[Any], kwargs: dict[str, Any], backend: Any, stream: bool = False, eager: bool = False
    ) -> tuple[ProgramState, Callable[[], Any]]:
        """A new state, and the call of the body with it."""
        if tracing.get() is not None:
            raise Untraceable("the program runs another program")
        sampling, arguments = self._split(kwargs)
        executor = Executor(
            resolve(backend), sampling, stream=stream, spec_tokens=self.num_api_spec_tokens, eager=eager
        )
        state = ProgramState(executor)
        return state, partial(self.func, state, *args, **(arguments | self.bind_arguments))

    def _send(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        backend: Any,
        stream: bool = False,
        gate: "Gate | None" = None,
    ) -> ProgramState | str:
        """A state that the backend's server will fill, or why it cannot."""
        where = resolve(backend)
        if stream:
            return "a stream is run here: the server sends a program's outcome as a whole"
        if not where.takes_programs:
            return f"{type(where).__name__} ({where.name}) runs no programs"
        sampling, arguments = self._split(kwargs)
        values = dict(zip(self.arg_names, args, strict=False))
        if len(args) > len(self.arg_names) or values.keys() & (arguments | self.bind_arguments).keys():
            return "its arguments have no names, or come twice"
        values |= arguments | self.bind_arguments
        try:
            recorded = record(self.func, values)
        except Untraceable as error:
            return error.message
        state = ProgramState(Executor(where, sampling))
        state.remote = True

        async def run(executor: Executor) -> None:
            async with gate.places if gate else nullcontext():
                await run_remotely(state, recorded, where, executor)

        state.stream_executor.run_elsewhere(run)
        return state

    def _split(self, kwargs: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
        """What of the keyword arguments says how to draw, and what is the program's."""
        own = OWN_FIELDS - set(self.arg_names)
        sampling = {name: value for name, value in kwargs.items() if name in RUN_FIELDS or name in own}
        arguments = {name: value for name, value in kwargs.items() if name not in sampling}
        for name in ("stop", "stop_regex"):
            sampling[name] = strings(sampling.get(name))
        if sampling.get("stop_token_ids") is not None:
            sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
        return Sampling(**sampling), arguments

    async def _cache(self, backend: Backend) -> None:
        prefix = constant_prefix(self, backend.chat_template)
        if len(prefix) > LEAST_PREFIX:
            async with backend.turn:
                await backend.cache_prefix(prefix)

    def _begin(
        self,
        state: ProgramState,
        call: Callable[[], Any],
        start: Callable[[Callable[[], None]], Any],
        gate: "Gate | None" = None,
    ) -> None:
        """Run the body somewhere else; what it raises becomes the state's error. `gate`: how many may run at once."""
        if self.is_async:
            LOOP.start(_run_async_quietly, state, call, gate)
        else:
            start(partial(_run_quietly, state, call, gate))

    def _batch(
        self,
        batch: Sequence[Any],
        backend: Any,
        num_threads: str | int,
        lazily: bool,
        sampling: dict[str, Any],
        remote: bool = False,
    ) -> Iterator[ProgramState]:
        """Start the programs and give out their states in order, perhaps not done yet. Closed before its end: programs
        that have not begun never do, and nobody waits for the others."""
        items = [self._arguments(item) for item in batch]
        where = resolve(backend)
        gate = None if num_threads == "auto" else Gate(int(num_threads))
        threads = gate.size if gate else MOST_THREADS
        started: deque[ProgramState] = deque()
        pool = ThreadPoolExecutor(min(threads, max(len(items), 1)))
        try:
            for item in items:
                if lazily and len(started) >= CHUNK:
                    yield started.popleft()
                sent = self._send((), item | sampling, where, gate=gate) if remote else None
                if isinstance(sent, ProgramState):
                    started.append(sent)
                    continue
                state, call = self._prepare((), item | sampling, where)
                state.local_reason = sent
                self._begin(state, call, pool.submit, gate)
                started.append(state)
            yield from started
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()

    def _arguments(self, item: Any) -> dict[str, Any]:
        """An item of a batch as keyword arguments. Raises RequestError if their number is wrong."""
        if isinstance(item, dict):
            return item
        if not len(self.required) <= len(item) <= len(self.arg_names):
            raise RequestError(f"the program takes {len(self.required)} to {len(self.arg_names)} arguments: {item!r}")
        return dict(zip(self.arg_names, item, strict=False))


class Gate:
    """Lets `size` programs run at once, from the start of the body to the end of the last `gen`.

    Plain bodies hold a thread of a pool of this size so long; `async def` ones a place here.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._places: anyio.Semaphore | None = None

    @property
    def places(self) -> anyio.Semaphore:
        """Used in the loop only, where it has to be made."""
        if self._places is None:
            self._places = anyio.Semaphore(self.size)
        return self._places


class _Ending:
    """Around a body: its life ends with it, however it ends."""

    def __init__(self, state: ProgramState) -> None:
        self._state = state

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, Exception):  # sys.exit, Ctrl-C, a cancellation
            error = RequestError(f"the program was ended by {type(error).__name__}", code="program_ended")
        self._state.body_error = error
        self._state.stream_executor.end(self._state.body_error)


def function(func: Callable[..., Any] | None = None, num_api_spec_tokens: int | None = None) -> Any:
    """Make a program of a function whose first parameter is `s`; plain or `async def`.

    `num_api_spec_tokens`: how many tokens a call to an API may ask for beyond what is wanted (speculation.py).
    """
    if func is not None:
        return SglFunction(func, num_api_spec_tokens)
    return lambda func: SglFunction(func, num_api_spec_tokens)


async def _run_async(state: ProgramState, call: Callable[[], Any]) -> None:
    with _Ending(state):
        state.ret_value = await call()


async def _run_async_quietly(state: ProgramState, call: Callable[[], Any], gate: Gate | None) -> None:
    """Run an `async def` body in the loop; what it raises is the state's error."""
    async with gate.places if gate else nullcontext():
        with suppress(Exception):
            await _run_async(state, call)
        if gate:
            await state


def _run_quietly(state: ProgramState, call: Callable[[], Any], gate: Gate | None) -> None:
    """Run a plain body on this thread; what it raises is the state's error."""
    with suppress(Exception), _Ending(state):
        state.ret_value = call()
    if gate:
        state.sync()


def _wait_all(runs: Iterator[ProgramState], total: int, progress_bar: bool) -> Iterator[ProgramState]:
    with tqdm(total=total, disable=not progress_bar) as bar:
        for state in runs:
            state.stream_executor.life.wait()
            state.sync()
            bar.update()
            yield state


def _start_thread(body: Callable[[], None]) -> None:
    threading.Thread(target=body, daemon=True).start()


@cache
def _bodies() -> ThreadPoolExecutor:
    """The threads of plain bodies that are awaited."""
    return ThreadPoolExecutor(MOST_THREADS)
