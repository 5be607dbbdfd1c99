"""The output of /v1/messages, written from chunks: blocks (thinking, text, tool_use) and the events of a stream.

Used by messages.py; MessageWriter is an sse.Renderer. Invariant: the events of a stream, put together as Anthropic's
clients do it, are the message that the whole reply would have been.
"""

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from ..actors.messages import Chunk
from ..actors.stream import Stream
from .chat_replies import Answer
from .chat_tools import Reading
from .chat_types import Delta
from .message_types import Message, MessageUsage
from .openai_replies import MARK
from .protocol import encode
from .sse import event_format, named_event

_DELTAS: Final = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""By a block's type: its deltas' type, and the field of their text (the block's own, too, but for a call)."""
_REASONS: Final = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn", "abort": "end_turn"}


class MessageWriter:
    """`message`: the object as it is before there is output."""

    def __init__(self, message: Message, stream: Stream, reading: Reading, show_thoughts: bool = True) -> None:
        self._message = message
        self._stream = stream
        self._answer = Answer(reading)
        self._show_thoughts = show_thoughts
        self._blocks: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        """The last block, while it goes on; its text is in `_text`."""
        self._text: list[str] = []
        self._format = b""
        """Of the events with more of it."""
        self._call = -1
        """Index of the call that goes on."""
        self._events: list[bytes] = []

    def whole(self, chunks: list[Chunk]) -> Message:
        """Return the message of a request that was not streamed."""
        (chunk,) = chunks
        self.chunk(chunk)
        reason, sequence = self._end(chunk)
        return msgspec.structs.replace(
            self._message, content=self._blocks, stop_reason=reason, stop_sequence=sequence, usage=message_usage(chunk)
        )

    def head(self) -> Iterable[bytes]:
        last = self._stream.choices[0].last
        assert last is not None
        begun = msgspec.structs.replace(message_usage(last), output_tokens=0)
        self._event("message_start", message=msgspec.structs.replace(self._message, usage=begun))
        self._event("ping")
        return self._take()

    def chunk(self, chunk: Chunk) -> Iterable[bytes]:
        for delta in self._answer.deltas(chunk):
            self._add(delta)
        if chunk.finish is not None:
            self._close()
        return self._take()

    def tail(self) -> Iterable[bytes]:
        last = self._stream.choices[0].last
        assert last is not None
        reason, sequence = self._end(last)
        self._event(
            "message_delta", delta={"stop_reason": reason, "stop_sequence": sequence}, usage=message_usage(last)
        )
        self._event("message_stop")
        return self._take()

    def _add(self, delta: Delta) -> None:
        if isinstance(delta.content, str):
            self._say("text", delta.content)
        elif isinstance(delta.reasoning_content, str):
            self._say("thinking", delta.reasoning_content)
        elif isinstance(delta.tool_calls, list):
            for call in delta.tool_calls:
                if call.index != self._call:
                    self._call = call.index
                    self._begin({"type": "tool_use", "id": call.id, "name": call.function.name, "input": {}})
                if call.function.arguments:
                    self._more(call.function.arguments)

    def _say(self, kind: str, text: str) -> None:
        if self._open is None or self._open["type"] != kind:
            # A signature proves to Anthropic whose thoughts they are; ours need no proof.
            more = {"thinking": "", "signature": ""} if kind == "thinking" else {"text": "", "citations": None}
            self._begin({"type": kind, **more})
        if kind == "text" or self._show_thoughts:
            self._more(text)

    def _begin(self, block: dict[str, Any]) -> None:
        self._close()
        self._open, self._format = block, b""
        self._event("content_block_start", index=len(self._blocks), content_block=block)

    def _more(self, text: str) -> None:
        assert self._open is not None
        self._text.append(text)
        if not self._format:
            delta, name = _DELTAS[self._open["type"]]
            kind = "content_block_delta"
            fields = {"type": kind, "index": len(self._blocks), "delta": {"type": delta, name: MARK}}
            self._format = event_format(named_event(kind, encode(fields)), MARK)
        self._events.append(self._format % encode(text))

    def _close(self) -> None:
        """The block that is open, if there is one, is done."""
        if self._open is None:
            return
        kind, text = self._open["type"], "".join(self._text)
        said = {"input": _arguments(text)} if kind == "tool_use" else {_DELTAS[kind][1]: text}
        self._event("content_block_stop", index=len(self._blocks))
        self._blocks.append(self._open | said)
        self._open, self._text = None, []

    def _end(self, last: Chunk) -> tuple[str, str | None]:
        """(stop_reason, stop_sequence)."""
        reason = self._answer.finish_reason(last) or "stop"
        if reason == "stop" and isinstance(last.matched, str):
            return "stop_sequence", last.matched
        return _REASONS[reason], None

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append(named_event(kind, encode({"type": kind, **fields})))

    def _take(self) -> list[bytes]:
        events, self._events = self._events, []
        return events


def message_usage(chunk: Chunk) -> MessageUsage:
    """Return the token counts up to a chunk."""
    fresh = chunk.prompt_tokens - chunk.cached_tokens
    return MessageUsage(fresh, chunk.completion_tokens, chunk.cached_tokens)


def _arguments(text: str) -> Any:
    """A call's arguments; none where the output was cut amid them."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}
