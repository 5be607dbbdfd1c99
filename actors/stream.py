"""Stream: a request's output on its way to its reader, and its choices. Made and fed by the Client (client.py).

Invariant: a stream ends exactly once; a reader that is slow finds its chunks joined.
"""

import asyncio
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Final, Protocol, Self

from ..errors import ActorserveError, EngineDown
from . import messages
from .questions import Wakeup

JOIN_EVERY: Final = 64
"""A stalled reader's chunks are joined in blocks of this many: memory stays near the text's own size."""


class Owner(Protocol):
    """What a stream needs of its client."""

    new_wakeup: Callable[[], Wakeup]

    def forget(self, stream: "Stream") -> None: ...


class LoopWakeup:
    """The wakeup of asyncio and uvloop; a bare future costs a third of anyio.Event (3.3 against 8.6 us a cycle)."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        await self._future


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation on its way. Times are CLOCK_MONOTONIC ns, taken when the front received the chunk."""

    rid: int
    stream: "Stream"
    pending: list[messages.Chunk]
    arrival_ns: int
    cost: int
    """Bytes; see Admission."""
    first_ns: int = 0
    last_ns: int = 0
    last: messages.Chunk | None = None
    name: str = ""
    """Its Submission's."""
    ids: "array[int]" = field(default_factory=lambda: array("i"))
    """Tokens received, int32."""
    chars: int = 0
    logprobs: int = 0
    """Received so far, as the tokens."""
    prompt_logprobs: int = 0
    aborted: bool = False

    def received(self, chunk: messages.Chunk) -> None:
        """Count a chunk's content."""
        self.ids.extend(chunk.ids)
        self.chars += len(chunk.text)
        if chunk.logprobs or chunk.prompt_logprobs:
            self.logprobs += len(chunk.logprobs)
            self.prompt_logprobs += len(chunk.prompt_logprobs)
        self.last = chunk

    def resumed(self) -> messages.Resumed:
        """What a new text actor must know of it."""
        cached, forced, jumps = (c.cached_tokens, c.forced_tokens, c.jumps) if (c := self.last) else (0, 0, 0)
        ids = memoryview(self.ids.tobytes())
        return messages.Resumed(self.rid, ids, self.chars, self.logprobs, cached, forced, jumps, self.prompt_logprobs)


class Stream:
    """The choices of one request, numbered 0, 1, ... prompt by prompt.

    `take` is for one reader at a time and gives every chunk that waits, one a choice at most; iterating gives them one
    by one. Both end after each choice's final chunk, or raise what ended the request, after the chunks before it.
    """

    __slots__ = (
        "_client", "_error", "_ready", "_taken", "_wakeup", "_whole", "choices", "direct", "groups", "open",
        "priority", "requests", "rid",
    )  # fmt: skip

    def __init__(self, client: Owner, rid: int, counts: Sequence[int], costs: Sequence[int], priority: int = 0) -> None:
        """`counts`: the number of choices of each prompt; their ids are `rid` and those that follow.

        `costs`: what a choice of each prompt comes to; see Admission.
        """
        now = time.monotonic_ns()
        self.requests: list[messages.Generate] = []
        """What was asked, prompt by prompt."""
        self.rid = rid
        self.priority = priority
        self.groups = list(zip(accumulate(counts, initial=rid), counts, strict=False))
        """(first id, number of choices) of each prompt."""
        each = chain.from_iterable([cost] * n for cost, n in zip(costs, counts, strict=True))
        self.choices = [Choice(rid + i, self, [], now, cost) for i, cost in enumerate(each)]
        self.open = len(self.choices)
        """Choices whose final chunk has not arrived; 0 also once the stream was cancelled or failed."""
        self.direct: Callable[[messages.Chunk], bool] | None = None
        """Where output that is not its choice's last goes while the reader waits in `take`, which spares waking it;
        False: it is the reader's. What it raises ends the stream."""
        self._client = client
        self._ready: list[Choice] = []
        self._error: Exception | None = None
        self._taken: deque[messages.Chunk] = deque()
        self._wakeup: Wakeup | None = None
        self._whole = False

    @property
    def ended(self) -> bool:
        """True when `take` has nothing more to give: no output, no error, nothing owed."""
        return not self.open and not self._ready and self._error is None

    def index(self, chunk: messages.Chunk) -> int:
        """Return the number of the choice that `chunk` continues."""
        return chunk.rid - self.rid

    async def take(self) -> list[messages.Chunk]:
        """Wait for output and return all of it; an empty list when every choice has ended."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if not self.open:
                return []
            self._wakeup = self._client.new_wakeup()
            await self._wakeup.wait()
        chunks = [_join(choice.pending) for choice in self._ready]
        for choice in self._ready:
            choice.pending.clear()
        self._ready.clear()
        return chunks

    async def collect(self) -> list[messages.Chunk]:
        """Wait for the end and return each choice's whole output as one chunk; the reader sleeps until then."""
        self._whole = True
        parts: list[list[messages.Chunk]] = [[] for _ in self.choices]
        while chunks := await self.take():
            for chunk in chunks:
                parts[self.index(chunk)].append(chunk)
        if not all(parts):
            raise EngineDown("the request was cancelled", code="cancelled")
        return [_join(part) for part in parts]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> messages.Chunk:
        if not self._taken:
            self._taken.extend(await self.take())
        if not self._taken:
            raise StopAsyncIteration
        return self._taken.popleft()

    def cancel(self, error: ActorserveError | None = None) -> None:
        """Stop what still runs; a reader that waits gets `error`, or the end of the stream. Safe to call again."""
        self._client.forget(self)
        self.fail(error)

    def push(self, choice: Choice, chunk: messages.Chunk) -> None:
        """Append output of a choice and wake the reader, or show it directly. Only the client calls this."""
        if chunk.finish is not None:
            self.open -= 1
        elif self.direct is not None and self._wakeup is not None:
            # The reader has all that came before.
            try:
                if self.direct(chunk):
                    return
            except Exception as error:  # of this request alone; its reader raises it
                self._client.forget(self)
                self.fail(error)
                return
        if not choice.pending:
            self._ready.append(choice)
        elif len(choice.pending) >= JOIN_EVERY:
            choice.pending[:] = [_join(choice.pending)]
        choice.pending.append(chunk)
        if not (self._whole and self.open):
            self._wake()

    def fail(self, error: Exception | None) -> None:
        """End the stream with an error, if it has not ended yet. Only the client calls this from outside."""
        if self.open and self._error is None:
            self._error = error
        self.open = 0
        self._wake()

    def _wake(self) -> None:
        if self._wakeup is not None:
            self._wakeup.set()
            self._wakeup = None


def _join(chunks: list[messages.Chunk]) -> messages.Chunk:
    """Return consecutive chunks of one choice as one; the counters are the last one's."""
    if len(chunks) == 1:
        return chunks[0]
    last = chunks[-1]
    return messages.Chunk(
        last.rid,
        "".join([chunk.text for chunk in chunks]),
        [token for chunk in chunks for token in chunk.ids],
        [logprob for chunk in chunks for logprob in chunk.logprobs],
        last.finish,
        last.matched,
        last.prompt_tokens,
        last.completion_tokens,
        last.cached_tokens,
        last.forced_tokens,
        last.jumps,
        last.thinking,
        last.valid,
        [logprob for chunk in chunks for logprob in chunk.prompt_logprobs],
        last.vector,
        last.dp_rank,
        last.end_logprobs,
    )
