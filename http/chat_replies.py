"""The replies of /v1/chat/completions, written from chunks: message, tool calls, thoughts, logprobs and usage.

Used by openai.py; ChatWriter is an sse.Renderer. Invariant: the frames of a stream, put together as clients do it, are
the message that the whole reply would have had, with the same finish_reason.
"""

from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType

from ..actors.messages import Chunk, TokenLogprob
from ..actors.stream import Stream
from ..models.chat_reply import ChatReply
from ..models.parse_events import CallArguments, CallEnd, CallStart, Event
from ..models.parsers import ChatParser
from .chat_tools import Reading
from .chat_types import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    ChunkChoice,
    Delta,
    TopLogprob,
)
from .openai_replies import MARK, Head, UsageFrames, finite, token_name, usage
from .protocol import Usage, encode, said
from .sse import DONE, data_event, event_format


def chat_logprobs(items: list[TokenLogprob]) -> ChatLogprobs:
    """Return the chat form of logprobs."""
    content = []
    for item in items:
        top = [TopLogprob(token_name(text), finite(p), list(text)) for _, p, text in item.top]
        content.append(ChatTokenLogprob(token_name(item.text), finite(item.logprob), list(item.text), top))
    return ChatLogprobs(content)


class Answer:
    """One choice: its text, read as it comes."""

    __slots__ = ("_parser", "_reading", "_reply", "_started")

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._reply = ChatReply()
        self._parser: ChatParser | None = None
        self._started = False

    @property
    def is_plain(self) -> bool:
        """Its text is content as it comes; known from the first chunk on."""
        return self._started and self._parser is None

    def deltas(self, chunk: Chunk) -> list[Delta]:
        """Take the next chunk; return what it adds, one a frame."""
        if not self._started:
            self._started = True
            self._parser = self._reading.parser(chunk.thinking)
        if self._parser is None:
            return [Delta(content=chunk.text)] if chunk.text else []
        events = self._parser.feed(chunk.text)
        if chunk.finish is not None:
            events += self._parser.finish()
        if self._reading.single:
            events = [event for event in events if not _is_further_call(event)]
        return [
            msgspec.convert(delta, Delta) if "tool_calls" in delta else Delta(**delta)
            for delta in self._reply.add(events)
        ]

    def whole(self, chunk: Chunk) -> tuple[AssistantMessage, str | None]:
        """Return the message and the finish reason of an answer that is one chunk."""
        self.deltas(chunk)
        if self._parser is None:
            return AssistantMessage("assistant", chunk.text), chunk.finish
        return msgspec.convert(self._reply.message(), AssistantMessage), self.finish_reason(chunk)

    def finish_reason(self, last: Chunk) -> str | None:
        """OpenAI's, for an answer that ends with this chunk."""
        return last.finish and self._reply.finish_reason(last.finish)


class ChatWriter:
    """A frame with the role, frames with what is said, one with the finish reason."""

    def __init__(
        self,
        head: Head,
        stream: Stream,
        reading: Reading,
        with_logprobs: bool,
        usage_frames: UsageFrames,
        prompt_ids: list[int] | None = None,
    ) -> None:
        """`prompt_ids`: of the prompt, where token ids are wanted."""
        self._head = head
        self._with_ids = prompt_ids is not None
        self._prompt_ids: list[int] | UnsetType = UNSET if prompt_ids is None else prompt_ids
        self._stream = stream
        self._answers = [Answer(reading) for _ in stream.choices]
        self._with_logprobs = with_logprobs
        self._usage = usage_frames
        self._plain = not with_logprobs and not usage_frames.each and not self._with_ids
        """Most events have content or thoughts and nothing else."""
        self._formats: dict[tuple[int, bool], bytes] = {}
        """Of those; by choice, and whether it is thoughts."""

    def whole(self, chunks: list[Chunk]) -> ChatCompletion:
        """Return the reply of a request that was not streamed."""
        choices = []
        for index, chunk in enumerate(chunks):
            message, finish = self._answers[index].whole(chunk)
            logprobs = chat_logprobs(chunk.logprobs) if self._with_logprobs else None
            choices.append(ChatChoice(index, message, logprobs, finish, said(chunk.valid), self._ids(chunk)))
        head, counts = self._head, usage(chunks, len(chunks))
        return ChatCompletion(
            head.id,
            "chat.completion",
            head.created,
            head.model,
            None,
            choices,
            counts,
            head.timeline,
            self._prompt_ids,
        )

    def head(self) -> Iterable[bytes]:
        role = Delta(role="assistant", content="", refusal=None)
        return [self._event(ChunkChoice(i, role, None, None)) for i in range(len(self._stream.choices))]

    def chunk(self, chunk: Chunk) -> Iterable[bytes]:
        index = chunk.rid - self._stream.rid
        answer = self._answers[index]
        self._usage.written[index] = chunk
        if self._plain and chunk.finish is None and answer.is_plain:
            return (self._text(index, chunk.text),) if chunk.text else ()
        deltas = answer.deltas(chunk)
        if self._plain and chunk.finish is None:
            return [self._delta(index, delta) for delta in deltas]
        logprobs = chat_logprobs(chunk.logprobs) if self._with_logprobs and chunk.logprobs else None
        ids = self._ids(chunk)
        if not deltas and (logprobs is not None or ids):
            deltas.append(Delta())  # the tokens of markup have logprobs and ids, too
        # A chunk's logprobs go with its first frame: OpenAI's streams do not say more about their place either.
        choices = [
            ChunkChoice(index, delta, None if i else logprobs, None, token_ids=[] if i and self._with_ids else ids)
            for i, delta in enumerate(deltas)
        ]
        if chunk.finish is not None:
            choices.append(ChunkChoice(index, Delta(), None, answer.finish_reason(chunk), said(chunk.valid)))
        return map(self._event, choices)

    def _ids(self, chunk: Chunk) -> list[int] | UnsetType:
        return chunk.ids if self._with_ids else UNSET

    def tail(self) -> Iterable[bytes]:
        if not self._usage.at_end and self._head.timeline is UNSET:
            return (DONE,)
        return (data_event(encode(self._object([], self._usage.last()))), DONE)

    def _delta(self, index: int, delta: Delta) -> bytes:
        """An event with this delta and nothing else."""
        if isinstance(delta.content, str):
            return self._text(index, delta.content)
        if isinstance(delta.reasoning_content, str):
            return self._text(index, delta.reasoning_content, thoughts=True)
        return self._event(ChunkChoice(index, delta, None, None))

    def _text(self, index: int, text: str, thoughts: bool = False) -> bytes:
        known = self._formats.get((index, thoughts))
        if known is None:
            delta = Delta(reasoning_content=MARK) if thoughts else Delta(content=MARK)
            known = event_format(self._event(ChunkChoice(index, delta, None, None)), MARK)
            self._formats[index, thoughts] = known
        return known % encode(text)

    def _event(self, choice: ChunkChoice) -> bytes:
        return data_event(encode(self._object([choice], self._usage.so_far())))

    def _object(self, choices: list[ChunkChoice], counts: Usage | UnsetType | None) -> ChatCompletionChunk:
        head = self._head
        timeline = UNSET if choices else head.timeline
        prompt_ids, self._prompt_ids = self._prompt_ids, UNSET
        return ChatCompletionChunk(
            head.id, "chat.completion.chunk", head.created, head.model, None, choices, counts, timeline, prompt_ids
        )


def _is_further_call(event: Event) -> bool:
    return isinstance(event, CallStart | CallArguments | CallEnd) and event.index > 0
