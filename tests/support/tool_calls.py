"""Running the parsers of tool calls in tests, and taking their events apart."""

from typing import Any

import pytest
from chat_texts import counter

from actorserve.models.parse_events import CallArguments, CallEnd, CallStart, Content, Event
from actorserve.models.tool_families import TOOL_FAMILIES
from actorserve.models.tool_parser import ToolParser

NAMES = ("hermes", "llama3", "mistral", "deepseekv3", "deepseekv31", "command-r", "pythonic", "json", "qwen3_coder")
each_family = pytest.mark.parametrize("name", NAMES)


def parser(name: str, known: Any = None) -> ToolParser:
    return ToolParser(TOOL_FAMILIES[name], counter(), known)


def calls_of(events: list[Event]) -> list[tuple[str, str, bool]]:
    """(name, arguments, complete) of each call; checks that the events of a call are in order."""
    calls: list[tuple[str, str, bool]] = []
    opened: int | None = None
    for event in events:
        match event:
            case CallStart(index, call_id, name):
                assert opened is None and index == len(calls) and call_id == f"call_{index}"
                opened = index
                calls.append((name, "", False))
            case CallArguments(index, text):
                assert opened == index and text
                calls[index] = (calls[index][0], calls[index][1] + text, False)
            case CallEnd(index, complete):
                assert opened == index
                calls[index] = (*calls[index][:2], complete)
                opened = None
            case _:
                assert opened is None
    assert opened is None
    return calls


def content_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))
