"""POST /parse_function_call and /separate_reasoning, as SGLang's: the chat parsers for a text that is there already.

Routed by app.py. Invariant: a text is read as a chat completion would read it as a whole answer (models/parsers.py);
a long one is read piece by piece, so that nobody else's events wait for it.
"""

import asyncio
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from ..errors import RequestError
from ..models.parse_events import CallArguments, CallStart, Content, Event, Known, Parser, Reasoning, joined
from ..models.parsers import names, reasoning_parser, tool_parser
from .chat_tools import MAX_TOOLS
from .chat_types import Tool
from .error_replies import decode_body
from .exchange import Exchange
from .protocol import encode
from .service import Service

PIECE: Final = 1024
"""Characters; the slowest parser takes a millisecond or two for them."""
MAX_CHARS: Final = 1 << 20
Text = Annotated[str, Meta(max_length=MAX_CHARS)]


class ParseCallsRequest(Struct, frozen=True, kw_only=True):
    """`tool_call_parser`: as the server's flag; without one the model's own. `tools`: what may be called."""

    text: Text
    tools: list[Tool]
    tool_call_parser: str | None = None


class ParsedCall(Struct, frozen=True):
    """`parameters` is JSON text, as the model wrote it."""

    tool_index: int
    name: str
    parameters: str


class ParsedCalls(Struct, frozen=True):
    """`normal_text`: what is left without the calls."""

    normal_text: str
    calls: list[ParsedCall]


class SeparateRequest(Struct, frozen=True, kw_only=True):
    """`reasoning_parser`: as the server's flag; without one the model's own."""

    text: Text
    reasoning_parser: str | None = None


class Separated(Struct, frozen=True):
    reasoning_text: str
    text: str


_calls_decoder: Final = msgspec.json.Decoder(ParseCallsRequest)
_separate_decoder: Final = msgspec.json.Decoder(SeparateRequest)


async def parse_function_call(service: Service, exchange: Exchange) -> None:
    """Serve POST /parse_function_call: the tool calls in a text."""
    request = decode_body(_calls_decoder, await exchange.body(service.config.max_body_bytes))
    if not 1 <= len(request.tools) <= MAX_TOOLS:
        raise RequestError(f"tools must be 1 to {MAX_TOOLS}", param="tools")
    known: Known = {tool.function.name: tool.function.parameters or {} for tool in request.tools}
    name = request.tool_call_parser or service.model.tool_parser
    _check_name(name, names().tools, "tool_call_parser")
    events = await _events(tool_parser(name, known=known), request.text)
    await exchange.reply(encode(ParsedCalls(_text(events), _calls(events))))


async def separate_reasoning(service: Service, exchange: Exchange) -> None:
    """Serve POST /separate_reasoning: the thoughts in a text, and the rest."""
    request = decode_body(_separate_decoder, await exchange.body(service.config.max_body_bytes))
    name = request.reasoning_parser or service.model.reasoning_parser
    if name is None:
        what = "the model has no reasoning parser of its own: name one"
        raise RequestError(what, param="reasoning_parser", code="missing_required_parameter")
    _check_name(name, names().reasoning, "reasoning_parser")
    events = await _events(reasoning_parser(name), request.text)
    thoughts = "".join(event.text for event in events if isinstance(event, Reasoning))
    await exchange.reply(encode(Separated(thoughts, _text(events))))


def _check_name(name: str, known: tuple[str, ...], param: str) -> None:
    if name not in known:
        raise RequestError(f"{param} {name!r} is unknown; there are: {', '.join(sorted(known))}", param=param)


async def _events(parser: Parser, text: str) -> list[Event]:
    events: list[Event] = []
    for start in range(0, len(text), PIECE):
        events += parser.feed(text[start : start + PIECE])
        await asyncio.sleep(0)
    return joined([*events, *parser.finish()])


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def _calls(events: list[Event]) -> list[ParsedCall]:
    arguments: dict[int, str] = {}
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index] = arguments.get(event.index, "") + event.text
    return [
        ParsedCall(event.index, event.name, arguments.get(event.index, ""))
        for event in events
        if isinstance(event, CallStart)
    ]
