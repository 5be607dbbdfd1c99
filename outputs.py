"""What the embedded API returns: whole outputs, and output as it comes. Used by engine.py and sync_engine.py.

Invariant: a request whose result nobody waits for any more, however that came about, is cancelled.
"""

from typing import Any, Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from .actors.client import Client
from .actors.messages import Chunk
from .actors.messages import TokenLogprob as TokenLogprob
from .actors.stream import Stream
from .errors import EngineDown


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """New output of one choice. The last one of a choice has a `finish_reason`; counts are totals so far."""

    index: int
    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length", "abort"] | None
    matched: int | str | None
    """The stop token id or stop string that ended it."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    logprobs: list[TokenLogprob]
    """One a token, also of the one that ended it, if `SamplingParams.logprobs` asked for them."""
    prompt_logprobs: list[TokenLogprob] = []
    """Of the prompt's tokens from `SamplingParams.logprob_start_len` on; the first of them has none, NaN."""
    forced_tokens: int = 0
    """Completion tokens that a grammar forced and no step had to draw."""
    jumps: int = 0
    """In how many runs they came."""
    valid: bool | None = None
    """At the end of an output with a grammar: whether the text matches it; limits and stops may prevent that."""


class Output(Delta, frozen=True, kw_only=True):
    """A whole continuation; `index` is its place in the list that came back."""


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt's vector; `index` is its place in the list that came back."""

    index: int
    vector: NDArray[np.float32]
    """float32 [dimensions]; of length 1 unless the model's folder or the call says otherwise."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""


class Classification(msgspec.Struct, frozen=True, kw_only=True):
    """What a classification or reward head says of a prompt."""

    index: int
    label: str
    """The likeliest."""
    logits: NDArray[np.float32]
    """float32 [labels]; of a reward model its one score."""
    probabilities: NDArray[np.float64]
    """float64 [labels]; they sum to 1 unless several labels may hold."""
    labels: tuple[str, ...]
    prompt_tokens: int
    cached_tokens: int


class Deltas:
    """The output of a request as it comes: an asynchronous iterator of Delta, with `aclose` and `async with`.

    It raises what ends the request early. A reader that is slow finds the output since its last step joined.
    """

    def __init__(self, client: Client, stream: Stream) -> None:
        self._client = client
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        try:
            chunk = await anext(self._stream)
        except BaseException:
            self._stream.cancel()
            raise
        return Delta(**_fields(self._stream, chunk))

    async def aclose(self) -> None:
        """Stop the work; without effect at the end."""
        self._stream.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stream.cancel()

    def __del__(self) -> None:
        if self._stream.open:  # perhaps on another thread: the client cancels it on its own
            self._client.orphans.append(self._stream)


async def collect(stream: Stream, as_list: bool) -> Output | list[Output]:
    """Wait for a whole request; returns its outputs, or without `as_list` the only one."""
    try:
        outputs = [Output(**_fields(stream, chunk)) for chunk in await stream.collect()]
    finally:
        stream.cancel()
    return outputs if as_list else outputs[0]


async def collect_vectors(stream: Stream) -> list[Chunk]:
    """Wait for all vectors of a request: chunks that have one each."""
    try:
        chunks = await stream.collect()
    finally:
        stream.cancel()
    if not all(chunk.vector for chunk in chunks):
        raise EngineDown("the request was cancelled", code="cancelled")
    return chunks


def _fields(stream: Stream, chunk: Chunk) -> dict[str, Any]:
    return {
        "index": stream.index(chunk),
        "text": chunk.text,
        "ids": chunk.ids,
        "finish_reason": chunk.finish,
        "matched": chunk.matched,
        "prompt_tokens": chunk.prompt_tokens,
        "completion_tokens": chunk.completion_tokens,
        "cached_tokens": chunk.cached_tokens,
        "logprobs": [*chunk.logprobs, *chunk.end_logprobs],
        "prompt_logprobs": chunk.prompt_logprobs,
        "forced_tokens": chunk.forced_tokens,
        "jumps": chunk.jumps,
        "valid": chunk.valid,
    }
