"""ChatReply: a parser's events as OpenAI's fields: the deltas of a stream, and the message of a whole answer.

One for each choice of a chat completion. Invariant: the deltas of an output, put together as OpenAI's clients do it,
are its message; and both end with the same finish_reason.
"""

from collections.abc import Iterable
from typing import Any

from .parse_events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    ReasoningEnd,
    joined,
)


def delta(event: Event) -> dict[str, Any] | None:
    """The `delta` of a frame; None for events that OpenAI's streams do not show."""
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case CallEnd() | ReasoningEnd():
            return None


class ChatReply:
    """What has been said so far."""

    __slots__ = ("_events", "_usable")

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._usable = False
        """A call is complete."""

    def add(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        """Take the next events; return their deltas, one a frame."""
        new = joined(events)
        self._events += new
        self._usable = self._usable or any(isinstance(event, CallEnd) and event.complete for event in new)
        return [shown for event in new if (shown := delta(event)) is not None]

    def message(self) -> dict[str, Any]:
        """The assistant's message. `content` is null where a call or thoughts are all there is."""
        content, thoughts = "", ""
        calls: list[dict[str, Any]] = []
        for event in joined(self._events):
            match event:
                case Content(text):
                    content += text
                case Reasoning(text):
                    thoughts += text
                case CallStart(_, call_id, name):
                    calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}})
                case CallArguments(index, text):
                    calls[index]["function"]["arguments"] += text
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        if not content and (thoughts or calls):
            message["content"] = None
        return message

    def finish_reason(self, finish: str) -> str:
        """`finish` is why the text ended. "stop" becomes "tool_calls" if there is a call that can be made."""
        return "tool_calls" if finish == "stop" and self._usable else finish
