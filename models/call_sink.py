"""CallSink: the events of one output with tool calls, and the call that is being read; and what its readers look like.

ToolParser and its readers write into one. Invariant: CallStart, CallArguments and CallEnd of a call come in this order,
and calls one after the other.
"""

from enum import Enum
from typing import Protocol

from .parse_events import CallArguments, CallEnd, CallStart, Content, Event, Known, NewId


class CallSink:
    """The events of one output, and the call that is being read."""

    __slots__ = ("_events", "_new_id", "calls", "ended", "known", "name", "open", "whole")

    def __init__(self, new_id: NewId, known: Known | None) -> None:
        """`known` None: every name is a function's."""
        self._events: list[Event] = []
        self._new_id = new_id
        self.known = known
        self.calls = 0
        """Calls that started."""
        self.ended = 0
        self.open = False
        """A call started and has not ended."""
        self.whole = False
        """The arguments of the last call are a whole object."""
        self.name = ""
        """Of the call that comes, where name and arguments are read apart."""

    def accepts(self, name: str) -> bool:
        """Whether it can be a function's name: printable, so that it can be sent; and known."""
        return bool(name) and name.isprintable() and (self.known is None or name in self.known)

    def content(self, text: str) -> None:
        if text:
            self._events.append(Content(text))

    def start(self, name: str) -> None:
        self._events.append(CallStart(self.calls, self._new_id(), name))
        self.calls += 1
        self.open, self.whole = True, False

    def arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self.calls - 1, text))

    def end(self) -> None:
        self._events.append(CallEnd(self.calls - 1, self.whole))
        self.ended += 1
        self.open = False

    def whole_call(self, name: str, arguments: str) -> None:
        self.start(name)
        self.arguments(arguments)
        self.whole = True
        self.end()

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events


class Verdict(Enum):
    MORE = 0
    """All text is read and the thing is not complete."""
    DONE = 1
    FAIL = 2
    """It is not what the reader reads."""


class Reader(Protocol):
    """Reads one thing that begins where it is first called."""

    verdict: Verdict

    def read(self, text: str, at: int) -> int:
        """Go on at `text[at:]`; return the first place that is not used up. Text from there on comes again."""
