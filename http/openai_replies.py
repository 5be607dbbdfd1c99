"""The replies of /v1/completions, written from chunks: whole ones and frames of a stream; and what chat_replies.py
shares with them: logprobs and usage.

Used by openai.py; the writer is an sse.Renderer. Invariant: the frames of a stream, joined, say what the whole reply
would have said.
"""

import codecs
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec import UNSET, UnsetType

from ..actors.messages import Chunk, TokenLogprob
from ..actors.stream import Stream
from .openai_types import Completion, CompletionChoice, CompletionLogprobs
from .protocol import PromptTokensDetails, Usage, encode, said
from .sse import DONE, data_event, event_format
from .timelines import RequestTimeline

MARK: Final = "\ue000 the text \ue000"
"""Stands for the text in an event that becomes a format."""
NO_LOGPROB: Final = -9999.0
"""What OpenAI writes for a logprob of minus infinity, which JSON cannot say."""


@dataclass(slots=True)
class Head:
    """What all frames of a reply have in common; `created` is Unix time in seconds."""

    id: str
    created: int
    model: str
    timeline: list[RequestTimeline] | UnsetType = UNSET
    """For the end of the reply, where the request asked for it."""


def finite(logprob: float) -> float:
    """Return a logprob that JSON can carry."""
    return max(logprob, NO_LOGPROB) if not math.isnan(logprob) else NO_LOGPROB


def token_name(text: bytes) -> str:
    """Return a token as text; one that is not UTF-8 on its own as OpenAI writes it, ``bytes:\\xe2\\x80``."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def usage(chunks: Sequence[Chunk | None], n: int) -> Usage:
    """Return the token counts of a reply from each choice's last chunk; every n choices share a prompt."""
    prompts = [chunk for chunk in chunks[::n] if chunk is not None]
    prompt_tokens = sum(chunk.prompt_tokens for chunk in prompts)
    completion_tokens = sum(chunk.completion_tokens for chunk in chunks if chunk is not None)
    cached = PromptTokensDetails(sum(chunk.cached_tokens for chunk in prompts))
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, cached)


class UsageFrames:
    """The token counts in the frames of a stream: none, in a last frame, or also so far in each one.

    Invariant: a frame counts the tokens of what was written up to it.
    """

    __slots__ = ("_n", "at_end", "each", "written")

    def __init__(self, choices: int, n: int, at_end: bool = False, each: bool = False) -> None:
        """`n` choices in a row share a prompt."""
        self.at_end = at_end
        self.each = each
        self._n = n
        self.written: list[Chunk | None] = [None] * choices
        """The newest chunk of each choice."""

    def so_far(self) -> Usage | UnsetType | None:
        """The `usage` of a frame with output."""
        if self.each:
            return self.total()
        return None if self.at_end else UNSET

    def last(self) -> Usage | UnsetType:
        """The `usage` of the last frame, which has no choices."""
        return self.total() if self.at_end or self.each else UNSET

    def total(self) -> Usage:
        return usage(self.written, self._n)


def best(chunks: list[Chunk], n: int) -> list[Chunk]:
    """Return the n continuations with the highest logprob per token, best first; all n of n as they are."""
    if n == len(chunks):
        return chunks

    def per_token(chunk: Chunk) -> float:
        return sum(item.logprob for item in chunk.logprobs) / max(1, len(chunk.logprobs))

    return sorted(chunks, key=per_token, reverse=True)[:n]


class LegacyLogprobs:
    """The /v1/completions form for one choice: `text_offset` counts characters from the start of its text, which is
    `echo` and the continuation."""

    def __init__(self, echo: str, num_top: int) -> None:
        self._echo = echo
        self._num_top = num_top
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._in_prompt = True

    def write(self, prompt: list[TokenLogprob], items: list[TokenLogprob]) -> CompletionLogprobs:
        """Return the lists for the next tokens of the prompt and of the continuation."""
        rows: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        for item in prompt:
            first = math.isnan(item.logprob)  # nothing came before it
            top = None if first else self._top(item)
            rows.append((token_name(item.text), None if first else finite(item.logprob), top, self._offset))
            self._offset += self._echoed(self._decoder.decode(item.text))
        for item in items:
            if self._in_prompt:
                self._in_prompt, self._offset = False, len(self._echo)
                self._decoder.reset()
            rows.append((token_name(item.text), finite(item.logprob), self._top(item), self._offset))
            self._offset += len(self._decoder.decode(item.text))
        tokens, logprobs, tops, offsets = (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 4
        return CompletionLogprobs(tokens, logprobs, tops if self._num_top else None, offsets)

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        return {token_name(text): finite(p) for _, p, text in item.top}

    def _echoed(self, text: str) -> int:
        """How many characters of the echo a token of the prompt is: none if it stands for no text, as BOS."""
        for part in (text, text.lstrip(" ")):  # a SentencePiece space at the start is in no text
            if self._echo.startswith(part, self._offset):
                return len(part)
        return 0


class CompletionWriter:
    """The replies of /v1/completions. `echoes`: a text before each prompt's continuations, or empty.

    Of each prompt's `best_of` continuations the n best are shown; a stream has no more than n.
    """

    def __init__(
        self,
        head: Head,
        stream: Stream,
        n: int,
        best_of: int,
        echoes: list[str],
        logprobs: int | None,
        usage_frames: UsageFrames,
        prompt_ids: list[list[int]] | None = None,
    ) -> None:
        """`prompt_ids`: of each prompt, where token ids are wanted."""
        self._head = head
        self._stream = stream
        self._n = n
        self._best_of = best_of
        self._echoes = dict(enumerate(echo for echo in echoes for _ in range(n)))
        self._with_ids = prompt_ids is not None
        self._prompt_ids = dict(enumerate(ids for ids in prompt_ids or [] for _ in range(n)))
        self._logprobs: list[LegacyLogprobs] = []
        if logprobs is not None:
            shown = (self._echoes.get(i, "") for i in range(len(stream.choices)))
            self._logprobs = [LegacyLogprobs(echo, logprobs) for echo in shown]
        self._usage = usage_frames
        self._plain = logprobs is None and not echoes and not usage_frames.each and not self._with_ids
        """Most events have a text and nothing else."""
        self._formats: dict[int, bytes] = {}
        """Of those, by choice."""

    def whole(self, chunks: list[Chunk]) -> Completion:
        """Return the reply of a request that was not streamed."""
        groups = [chunks[i : i + self._best_of] for i in range(0, len(chunks), self._best_of)]
        shown = [chunk for group in groups for chunk in best(group, self._n)]
        choices = [self._choice(i, chunk) for i, chunk in enumerate(shown)]
        return self._object(choices, usage(chunks, self._best_of), self._head.timeline)

    def head(self) -> Iterable[bytes]:
        return ()

    def chunk(self, chunk: Chunk) -> Iterable[bytes]:
        index = chunk.rid - self._stream.rid
        if self._plain and chunk.finish is None:
            if not chunk.text:
                return ()
            self._usage.written[index] = chunk
            return ((self._formats.get(index) or self._format(index)) % encode(chunk.text),)
        choice = self._choice(index, chunk)
        if not choice.text and choice.logprobs is None and choice.finish_reason is None and not choice.token_ids:
            return ()  # the first bytes of a character
        self._usage.written[choice.index] = chunk
        return (data_event(encode(self._object([choice], self._usage.so_far()))),)

    def tail(self) -> Iterable[bytes]:
        if not self._usage.at_end and self._head.timeline is UNSET:
            return (DONE,)
        return (data_event(encode(self._object([], self._usage.last(), self._head.timeline))), DONE)

    def _format(self, index: int) -> bytes:
        shown = self._object([CompletionChoice(MARK, index, None, None)], self._usage.so_far())
        self._formats[index] = event_format(data_event(encode(shown)), MARK)
        return self._formats[index]

    def _choice(self, index: int, chunk: Chunk) -> CompletionChoice:
        logprobs = self._logprobs[index].write(chunk.prompt_logprobs, chunk.logprobs) if self._logprobs else None
        return CompletionChoice(
            self._echoes.pop(index, "") + chunk.text,
            index,
            logprobs,
            chunk.finish,
            said(chunk.valid),
            chunk.ids if self._with_ids else UNSET,
            self._prompt_ids.pop(index, UNSET),
        )

    def _object(
        self,
        choices: list[CompletionChoice],
        counts: Usage | UnsetType | None,
        timeline: list[RequestTimeline] | UnsetType = UNSET,
    ) -> Completion:
        head = self._head
        return Completion(head.id, "text_completion", head.created, head.model, None, choices, counts, timeline)
