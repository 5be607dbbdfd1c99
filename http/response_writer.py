"""The output of /v1/responses, written from chunks: items (thoughts, message, calls) and the events of a stream.

Used by responses.py; ResponseWriter is an sse.Renderer. Invariant: events are numbered from 0 without gaps; every item
and part that is added is also done, with the text of all its deltas; the last event has the whole response.
"""

import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from ..actors.conversation import ChatMessage
from ..actors.messages import Chunk
from ..actors.stream import Stream
from .chat_replies import Answer
from .chat_tools import Reading
from .chat_types import Delta
from .openai_replies import MARK, usage
from .protocol import encode
from .response_types import CachedTokens, ReasoningTokens, Response, ResponseUsage
from .sse import event_format, named_event

_COUNT_MARK: Final = 987_654_321_987
"""Stands for the number of an event that becomes a format."""
_PARTS: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "message": ("content_part", "output_text", {"annotations": [], "logprobs": []}),
    "reasoning": ("content_part", "reasoning_text", {}),
}
"""By an item's type: how the events of its part are called, its part's type, and what else is in that."""


class ResponseWriter:
    """`response`: the object as it is before there is output. `on_end` gets the finished one, and its turn."""

    def __init__(
        self, response: Response, stream: Stream, reading: Reading, on_end: Callable[[Response, ChatMessage], None]
    ) -> None:
        self._response = response
        self._stream = stream
        self._answer = Answer(reading)
        self._on_end = on_end
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        """The last item, while it goes on; its text is in `_text`."""
        self._text: list[str] = []
        self._format = b""
        """Of the events with more of it."""
        self._call = -1
        """Index of the call that goes on."""
        self._count = 0
        self._events: list[bytes] = []

    def whole(self, chunks: list[Chunk]) -> Response:
        """Return the response of a request that was not streamed."""
        (chunk,) = chunks
        self.chunk(chunk)
        return self._finished(chunk)

    def head(self) -> Iterable[bytes]:
        for kind in ("created", "in_progress"):
            self._event(f"response.{kind}", response=self._response)
        return self._take()

    def chunk(self, chunk: Chunk) -> Iterable[bytes]:
        for delta in self._answer.deltas(chunk):
            self._add(delta)
        if chunk.finish is not None:
            self._close("completed" if chunk.finish == "stop" else "incomplete")
        return self._take()

    def tail(self) -> Iterable[bytes]:
        last = self._stream.choices[0].last
        assert last is not None
        response = self._finished(last)
        self._event(f"response.{response.status}", response=response)
        return self._take()

    # ------------------------------------------------------------------ items

    def _add(self, delta: Delta) -> None:
        if isinstance(delta.content, str):
            self._say("message", "response.output_text.delta", delta.content)
        elif isinstance(delta.reasoning_content, str):
            self._say("reasoning", "response.reasoning_text.delta", delta.reasoning_content)
        elif isinstance(delta.tool_calls, list):
            for call in delta.tool_calls:
                if call.index != self._call:
                    self._call = call.index
                    self._begin(
                        {"type": "function_call", "call_id": call.id, "name": call.function.name, "arguments": ""}
                    )
                if call.function.arguments:
                    self._more("response.function_call_arguments.delta", call.function.arguments)

    def _say(self, kind: str, event: str, text: str) -> None:
        if self._open is None or self._open["type"] != kind:
            item: dict[str, Any] = {"type": kind, "content": []}
            more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            self._begin(item | more)
            self._event(f"response.{_PARTS[kind][0]}.added", **self._place(), part=self._part(""))
        self._more(event, text)

    def _begin(self, item: dict[str, Any]) -> None:
        self._close("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[item["type"]]
        self._open = {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **item}
        self._format = b""
        self._event("response.output_item.added", output_index=len(self._items), item=self._open)

    def _more(self, event: str, text: str) -> None:
        self._text.append(text)
        if not self._format:
            extra: dict[str, Any] = {"logprobs": []} if event == "response.output_text.delta" else {}
            fields = {"type": event, "sequence_number": _COUNT_MARK, **self._place(), "delta": MARK, **extra}
            self._format = event_format(named_event(event, encode(fields)), _COUNT_MARK, MARK)
        self._events.append(self._format % (encode(self._count), encode(text)))
        self._count += 1

    def _close(self, status: str) -> None:
        """The item that is open, if there is one, is done."""
        item, text = self._open, "".join(self._text)
        if item is None:
            return
        if item["type"] == "function_call":
            item = item | {"arguments": text, "status": status}
            self._event("response.function_call_arguments.done", **self._place(), name=item["name"], arguments=text)
        else:
            event, kind, _ = _PARTS[item["type"]]
            part = self._part(text)
            item = item | {"content": [part], "status": status}
            extra: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
            self._event(f"response.{kind}.done", **self._place(), text=text, **extra)
            self._event(f"response.{event}.done", **self._place(), part=part)
        self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._open, self._text = None, []

    def _part(self, text: str) -> dict[str, Any]:
        assert self._open is not None
        _, kind, more = _PARTS[self._open["type"]]
        return {"type": kind, "text": text, **more}

    def _place(self) -> dict[str, Any]:
        """Where a delta belongs."""
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self._items)}
        return place if self._open["type"] == "function_call" else place | {"content_index": 0}

    # ------------------------------------------------------------------ the end

    def _finished(self, last: Chunk) -> Response:
        """The response, handed to `on_end` as well."""
        complete = last.finish == "stop"
        reason = {"length": "max_output_tokens"}.get(last.finish or "", "aborted")
        counts = usage([last], 1)
        response = msgspec.structs.replace(
            self._response,
            status="completed" if complete else "incomplete",
            output=self._items,
            incomplete_details=None if complete else {"reason": reason},
            usage=ResponseUsage(
                counts.prompt_tokens,
                CachedTokens(counts.prompt_tokens_details.cached_tokens),
                counts.completion_tokens,
                ReasoningTokens(0),
                counts.total_tokens,
            ),
        )
        self._on_end(response, self._turn())
        return response

    def _turn(self) -> ChatMessage:
        """What was said, as the assistant's turn."""
        text = "".join(item["content"][0]["text"] for item in self._items if item["type"] == "message")
        calls = [
            {
                "id": item["call_id"],
                "type": "function",
                "function": {"name": item["name"], "arguments": item["arguments"]},
            }
            for item in self._items
            if item["type"] == "function_call"
        ]
        return ChatMessage("assistant", text if text or not calls else None, tool_calls=calls or None)

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append(named_event(kind, encode({"type": kind, "sequence_number": self._count, **fields})))
        self._count += 1

    def _take(self) -> list[bytes]:
        events, self._events = self._events, []
        return events
