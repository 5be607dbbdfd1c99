"""What a parser of chat output says: text, reasoning and tool calls, in pieces and in order.

ReasoningParser and ToolParser make these events, chat_reply.py turns them into OpenAI's fields. Invariant (the law of
all parsers here): for every way to cut a text into chunks, `joined` of the events is the same, and so is what a client
puts together from a stream and what it gets at once.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any, Final, Protocol, TypeAlias

from msgspec import Struct

SPACE: Final = " \t\n\r"
"""Whitespace that belongs to markup when it is next to markup: JSON's, so that no text is lost that a reader sees."""


class Content(Struct, frozen=True, gc=False):
    """Text of the visible answer."""

    text: str


class Reasoning(Struct, frozen=True, gc=False):
    """Text of the model's thoughts."""

    text: str


class ReasoningEnd(Struct, frozen=True, gc=False):
    """The thoughts are over; follows the last Reasoning, and does not come without one."""


class CallStart(Struct, frozen=True, gc=False):
    """A tool call begins. `index` counts from 0 over the output."""

    index: int
    id: str
    name: str


class CallArguments(Struct, frozen=True, gc=False):
    """More of the arguments' JSON text."""

    index: int
    text: str


class CallEnd(Struct, frozen=True, gc=False):
    """A call ends. `complete`: its arguments are a whole JSON object; else they broke off and cannot be used."""

    index: int
    complete: bool


Event: TypeAlias = Content | Reasoning | ReasoningEnd | CallStart | CallArguments | CallEnd
NewId: TypeAlias = Callable[[], str]
"""Makes the id of the next call."""
Known: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The functions a model may call: name -> JSON schema of the parameters (empty if there is none)."""


class Parser(Protocol):
    """Text in, events out."""

    def feed(self, text: str) -> list[Event]:
        """Take the next chunk; return what it decides."""

    def finish(self) -> list[Event]:
        """The text ended: return what was held back. Nothing may be fed afterwards."""


def joined(events: Iterable[Event]) -> list[Event]:
    """Join neighbours that continue one another: the same list for every cutting of the text, in linear time."""
    whole: list[Event] = []
    for _, group in groupby(events, _kind):
        run = list(group)
        text = "".join([event.text for event in run if isinstance(event, Content | Reasoning | CallArguments)])
        match run[0]:
            case Content():
                whole.append(Content(text))
            case Reasoning():
                whole.append(Reasoning(text))
            case CallArguments(index):
                whole.append(CallArguments(index, text))
            case _:
                whole += run
    return whole


def _kind(event: Event) -> tuple[type[Event], int | None]:
    """The same for neighbours that continue one another."""
    return type(event), event.index if isinstance(event, CallArguments) else None


def parse(parser: Parser, text: str) -> list[Event]:
    """A whole text at once: what an answer that is not streamed is made of. `parser` is used up."""
    return joined([*parser.feed(text), *parser.finish()])
