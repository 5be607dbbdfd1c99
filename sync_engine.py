"""The embedded API for programs without an event loop: the same methods, blocking. Made by `Engine.sync`.

    with actorserve.Engine.sync(model="/models/smollm2") as engine:
        for delta in engine.stream("Once upon a time"):
            print(delta.text, end="", flush=True)

Invariant: it adds no behaviour. An asyncio loop in a thread of its own runs the Engine; calls may come from any thread.
"""

from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from anyio.from_thread import BlockingPortal, start_blocking_portal

from .actors.messages import Stats
from .config import ModelInfo
from .engine import Engine, Message, PromptLike
from .errors import EngineDown
from .outputs import Classification, Delta, Deltas, Embedding, Output
from .sampler.params import SamplingParams

T = TypeVar("T")


class SyncEngine:
    """See Engine for what the methods do, return and raise."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal("asyncio"))
            stack.enter_context(portal.wrap_async_context_manager(self._engine))
            self._portal = portal
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal = None
        self._stack.close()

    @property
    def model(self) -> ModelInfo:
        """What is served."""
        return self._engine.model

    @overload
    def generate(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, n: Literal[1] = 1, **overrides: Any
    ) -> Output: ...

    @overload
    def generate(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, n: int, **overrides: Any
    ) -> list[Output]: ...

    @overload
    def generate(
        self, prompt: Sequence[PromptLike], params: SamplingParams | None = None, *, n: int = 1, **overrides: Any
    ) -> list[Output]: ...

    def generate(self, prompt: Any, params: SamplingParams | None = None, **options: Any) -> Output | list[Output]:
        """Continue one prompt, or each of a list."""
        result: Output | list[Output] = self._call(partial(self._engine.generate, prompt, params, **options))
        return result

    @overload
    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, n: Literal[1] = 1, **options: Any
    ) -> Output: ...

    @overload
    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, n: int, **options: Any
    ) -> list[Output]: ...

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any
    ) -> Output | list[Output]:
        """Answer a conversation."""
        result: Output | list[Output] = self._call(partial(self._engine.chat, messages, params, **options))
        return result

    def stream(self, prompt: PromptLike, params: SamplingParams | None = None, **options: Any) -> Iterator[Delta]:
        """Continue a prompt, piece by piece."""
        return self._iterate(partial(self._engine.stream, prompt, params, **options))

    def chat_stream(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any
    ) -> Iterator[Delta]:
        """Answer a conversation, piece by piece."""
        return self._iterate(partial(self._engine.chat_stream, messages, params, **options))

    @overload
    def embed(self, prompt: PromptLike, **options: Any) -> Embedding: ...

    @overload
    def embed(self, prompt: Sequence[PromptLike], **options: Any) -> list[Embedding]: ...

    def embed(self, prompt: Any, **options: Any) -> Embedding | list[Embedding]:
        """Return the vector of a prompt, or of each of a list."""
        result: Embedding | list[Embedding] = self._call(partial(self._engine.embed, prompt, **options))
        return result

    @overload
    def classify(self, prompt: PromptLike, **options: Any) -> Classification: ...

    @overload
    def classify(self, prompt: Sequence[PromptLike], **options: Any) -> list[Classification]: ...

    def classify(self, prompt: Any, **options: Any) -> Classification | list[Classification]:
        """Return what a classification head says of a prompt, or of each of a list."""
        call = partial(self._engine.classify, prompt, **options)
        result: Classification | list[Classification] = self._call(call)
        return result

    def stats(self) -> Stats:
        """Return the scheduler's last report."""
        return self._running.call(self._engine.stats)

    @property
    def _running(self) -> BlockingPortal:
        if self._portal is None:
            raise EngineDown("the engine is not running: use it inside `with`")
        return self._portal

    def _call(self, function: "partial[Coroutine[Any, Any, T]]") -> T:
        """Have the loop run it. A caller who does not wait for the end, as after Ctrl-C, cancels it."""
        future: Future[T] = self._running.start_task_soon(function)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _iterate(self, start: "partial[Deltas]") -> Iterator[Delta]:
        portal = self._running
        deltas = portal.call(start)
        try:
            while (delta := self._running.call(_next, deltas)) is not None:
                yield delta
        finally:
            with suppress(RuntimeError):  # the loop has ended, or collects this itself: dropping `deltas` is enough
                portal.call(deltas.aclose)


async def _next(deltas: Deltas) -> Delta | None:
    return await anext(deltas, None)
